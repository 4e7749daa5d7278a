"""The cut in one pass against re-cutting the tree at every height, and clusters that were planted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrecon.expand_cluster.clustering import average_linkage, best_cut, cluster, distances, mean_cosine, members


def count_by_recutting(merges, height, students, unit, sign_free, need, beta, rule):
    count = 0
    for group in members(merges, height):
        if rule == "published":
            count += len(group) >= need
            continue
        total = unit[group[0]].copy()
        for i in group[1:]:
            total += unit[i] * (-1 if sign_free and total @ unit[i] < 0 else 1)
        aligned = mean_cosine(total, len(group)) >= math.cos(beta)
        count += len(set(students[group].tolist())) >= need and aligned
    return count


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(["distinct", "published"]))
def test_one_pass_cut_equals_recutting_at_every_height(seed, rule):
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    vectors_VK = torch.cat([centers + 0.05 * torch.randn(4, 3, generator=generator) for _ in range(5)])
    vectors_VK = torch.cat([vectors_VK, 3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)])
    students = np.concatenate([np.repeat(np.arange(5), 4), np.arange(8) % 5])
    merges = average_linkage(vectors_VK, "none")
    unit = torch.nn.functional.normalize(vectors_VK, dim=1).numpy()
    arguments = (students, unit, False, math.ceil(0.8 * 5), 0.5, rule)
    heights = np.concatenate([[merges[0, 2] / 2], merges[:, 2]])
    most = max(count_by_recutting(merges, height, *arguments) for height in heights)
    cut = best_cut(merges, students, vectors_VK, False, 5, 0.8, 0.5, rule)
    assert count_by_recutting(merges, cut, *arguments) == most


@pytest.mark.parametrize("symmetry", ["none", "odd", "odd_constant", "even_linear", "scaled"])
def test_planted_neurons_are_found_whatever_their_signs_and_scales(symmetry, generator):
    planted = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    vectors, students = [], []
    for student in range(10):
        copies = planted + 1e-3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
        if symmetry != "none":
            copies = copies * (torch.randint(2, (6, 1), generator=generator) * 2 - 1)
        if symmetry == "scaled":
            copies = copies * (torch.rand(6, 1, generator=generator) + 0.5)
        extra = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        vectors += [copies, extra]
        students += [student] * 10
    vectors_VK = torch.cat(vectors)
    found = cluster(vectors_VK, np.array(students), np.arange(100), symmetry, 10, 0.8, math.pi / 6)
    assert len(found.clusters) == 6
    for group in found.clusters:
        assert sorted(np.array(students)[group]) == list(range(10))
        matches = [
            int(distances(torch.stack([vectors_VK[i], p]), symmetry)[0, 1] < 0.1) for i in group for p in planted
        ]
        assert sum(matches) == 10
    assert min(found.alignment) > 0.999
    assert found.similarity().shape == (100, 100)


def test_many_copies_in_one_student_are_no_cluster(generator):
    shared = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    single = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    vectors_VK = torch.cat([shared.expand(5, 5), single.expand(8, 5)]) + 1e-4 * torch.randn(13, 5, generator=generator)
    students = np.array([0, 1, 2, 3, 4] + [2] * 8)
    found = cluster(vectors_VK.double(), students, np.arange(13), "none", 5, 0.8, math.pi / 6)
    assert [sorted(group.tolist()) for group in found.clusters] == [[0, 1, 2, 3, 4]]
    published = cluster(vectors_VK.double(), students, np.arange(13), "none", 5, 0.8, math.pi / 6, "published")
    assert len(published.clusters) == 2
