"""Distances, trees and the cut in one pass against slow references, and clusters that were planted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrecon.expand_cluster.config import ClusteringConfig
from distrecon.expand_cluster.neurons import Pool, average_linkage, best_cut, cluster, distances, members
from distrecon.expand_cluster.tree import Tree, mean_cosine


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
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(["distinct", "published"]), gamma=st.sampled_from([0.2, 0.8]))
def test_one_pass_cut_equals_recutting_at_every_height(seed, rule, gamma):
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    vectors_VK = torch.cat([centers + 0.05 * torch.randn(4, 3, generator=generator) for _ in range(5)])
    vectors_VK = torch.cat([vectors_VK, 3 * torch.randn(8, 3, generator=generator, dtype=torch.float64)])
    students = np.concatenate([np.repeat(np.arange(5), 4), np.arange(8) % 5])
    merges = average_linkage(vectors_VK, "none")
    unit = torch.nn.functional.normalize(vectors_VK, dim=1).numpy()
    arguments = (students, unit, False, math.ceil(gamma * 5), 0.5, rule)
    heights = np.concatenate([[merges[0, 2] / 2], merges[:, 2]])
    most = max(count_by_recutting(merges, height, *arguments) for height in heights)
    pool = Pool(vectors_VK, students, torch.zeros(5))
    cut = best_cut(merges, pool, False, ClusteringConfig(gamma, 0.5, rule))
    assert count_by_recutting(merges, cut, *arguments) == most


def walked(merges, students, unit, sign_free):
    """Distinct students and mean cosine of every node, merge by merge."""
    owners, sums, sizes = [{int(s)} for s in students], list(unit), [1] * len(unit)
    for a, b in merges[:, :2].astype(int):
        sign = -1.0 if sign_free and sums[a] @ sums[b] < 0 else 1.0
        owners.append(owners[a] | owners[b])
        sums.append(sums[a] + sign * sums[b])
        sizes.append(sizes[a] + sizes[b])
    cosines = [mean_cosine(total, size) for total, size in zip(sums, sizes, strict=True)]
    return np.array([len(group) for group in owners]), np.array(cosines)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 60),
    students=st.integers(1, 12),
    sign_free=st.booleans(),
    shape=st.sampled_from(["random", "tied", "chain"]),
)
def test_a_tree_read_at_once_equals_a_walk_over_its_merges(seed, count, students, sign_free, shape):
    generator = torch.Generator().manual_seed(seed)
    vectors_VK = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    if shape == "tied":
        vectors_VK = vectors_VK[torch.randint(3, (count,), generator=generator) % count]
    if shape == "chain":
        vectors_VK = (vectors_VK.sign() + 1e-3 * vectors_VK) * 3.0 ** torch.arange(count)[:, None]  # no two alike
    students = np.random.default_rng(seed).integers(0, students, count)
    merges = average_linkage(vectors_VK, "odd" if sign_free else "none")
    unit = torch.nn.functional.normalize(vectors_VK, dim=1).numpy()
    distinct, cosines = walked(merges, students, unit, sign_free)
    tree = Tree(merges)
    np.testing.assert_array_equal(tree.distinct(students), distinct)
    found = tree.mean_cosine(vectors_VK, sign_free, np.arange(2 * count - 1))
    np.testing.assert_allclose(found, cosines, atol=1e-10)
    for node in range(2 * count - 1):
        below = tree.order[tree.start[node] : tree.start[node] + tree.size[node]]
        if node >= count:  # the merge's two sides, in this order
            left, right = merges[node - count, :2].astype(int)
            assert tree.start[node] == tree.start[left]
            assert tree.start[right] == tree.start[left] + tree.size[left]
        else:
            assert list(below) == [node]


@pytest.mark.parametrize("symmetry", ["none", "odd", "scaled"])
def test_distances_are_those_of_every_pair_whatever_the_signs_and_scales(symmetry, generator):
    vectors_VK = torch.randn(75, 4, generator=generator, dtype=torch.float64)
    expected = []
    for i in range(75):
        for j in range(i + 1, 75):
            u, v = vectors_VK[i], vectors_VK[j]
            if symmetry == "scaled":
                u, v = u / u.norm(), v / v.norm()
            ways = [(u - v).norm()] + ([(u + v).norm()] if symmetry != "none" else [])
            expected.append(min(ways))
    torch.testing.assert_close(distances(vectors_VK, symmetry), torch.stack(expected), rtol=1e-9, atol=1e-9)


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
    found = cluster(Pool(vectors_VK, np.array(students), torch.zeros(10)), symmetry, ClusteringConfig())
    assert len(found.clusters) == 6
    for group in found.clusters:
        assert sorted(np.array(students)[group]) == list(range(10))
        matches = [int(distances(torch.stack([vectors_VK[i], p]), symmetry)[0] < 0.1) for i in group for p in planted]
        assert sum(matches) == 10
    similarity_VV = found.similarity()
    assert similarity_VV.shape == (100, 100)
    assert all(similarity_VV[np.ix_(group, group)].min() > 0.99 for group in found.clusters)


def test_many_copies_in_one_student_are_no_cluster(generator):
    shared = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    of_one_student = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    vectors_VK = torch.cat([shared.expand(5, 5), of_one_student.expand(8, 5)]) + 1e-4 * torch.randn(
        13, 5, generator=generator
    )
    students = np.array([0, 1, 2, 3, 4] + [2] * 8)
    pool = Pool(vectors_VK.double(), students, torch.zeros(5))
    found = cluster(pool, "none", ClusteringConfig())
    assert [sorted(group.tolist()) for group in found.clusters] == [[0, 1, 2, 3, 4]]
    published = cluster(pool, "none", ClusteringConfig(rule="published"))
    assert len(published.clusters) == 2
