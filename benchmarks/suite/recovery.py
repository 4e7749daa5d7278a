"""Expand-and-Cluster's two heavy parts: fitting the students and clustering their neurons."""

import math
import time
from statistics import median

import numpy as np
import torch

from benchmarks import recovery_solvers as solvers
from benchmarks.suite import baselines
from benchmarks.suite.harness import Row, turns
from distrecon.expand_cluster import network, synthetic_teacher
from distrecon.expand_cluster.config import ClusteringConfig
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import Pool, average_linkage, best_cut, cluster
from distrecon.expand_cluster.problem import TrainingData
from distrecon.nets.activations import activation as find_activation

PROBLEMS = ((4, 4), (8, 4), (16, 4), (4, 2), (8, 2), (16, 2), (4, 3), (8, 3), (16, 3), (2, 2))
STUDENTS, RHO = 10, 4


def students(quick: bool) -> list[Row]:
    """Time of the median student to a relative loss, against full-batch Adam with plateau decay; median of problems."""
    problems, seconds = (PROBLEMS[:2], 3.0) if quick else (PROBLEMS, 10.0)
    traces = []
    for seed, (inputs, width) in enumerate(problems):
        draw = torch.Generator().manual_seed(seed)
        x_QI = torch.randn(1000, inputs, generator=draw, dtype=torch.float64)
        data = TrainingData.of(x_QI, x_QI, network(synthetic_teacher(inputs, width, "g", seed), "g")(x_QI))
        net = DenseNet((inputs, RHO * width, 1), find_activation("g"))
        theta_NP = net.random(STUDENTS, draw)
        adam = solvers.adam(net, theta_NP, data.z_QR, data.y_QO, seconds)
        traces.append((adam, solvers.solver(net, theta_NP, data.z_QR, data.y_QO)))
    rows = [_to(target, traces) for target in (1e-4, 1e-8, 1e-16)]
    own = [(adam[-1][0], solvers.first_below(ours, adam[-1][1])) for adam, ours in traces]
    ratios = [theirs / ours for theirs, ours in own]
    note = f"Adam stopped at {seconds:g} s, at a median loss of {median(adam[-1][1] for adam, _ in traces):.0e}"
    what = f"students to Adam's own final loss, {len(problems)} problems"
    ours, theirs = median(o for _, o in own), median(t for t, _ in own)
    return [*rows, Row(what, ours, theirs, median(ratios), min(ratios), max(ratios), note)]


def _to(target: float, traces: list[tuple[solvers.Trace, solvers.Trace]]) -> Row:
    """Where Adam did not get there its time is the limit: the ratio is then a lower bound."""
    reached = sum(solvers.first_below(adam, target) < math.inf for adam, _ in traces)
    solved = [(adam, ours) for adam, ours in traces if solvers.first_below(ours, target) < math.inf]
    times = [
        (min(solvers.first_below(adam, target), adam[-1][0]), solvers.first_below(ours, target))
        for adam, ours in solved
    ]
    note = f"reached on {len(solved)} of {len(traces)} problems, by Adam on {reached}"
    what = f"students to a loss of {target:g}"
    if not times:
        return Row(what, math.nan, note=note)
    ratios = [theirs / ours for theirs, ours in times]
    ours, theirs = median(o for _, o in times), median(t for t, _ in times)
    bound = "; a lower bound where Adam failed" if reached < len(traces) else ""
    return Row(what, ours, theirs, median(ratios), min(ratios), max(ratios), note + bound)


def linkage(quick: bool) -> list[Row]:
    """Finding the cut, and the whole clustering, against cutting the tree again at every height."""
    counts, limit = ((500, 1000), 2.0) if quick else ((500, 1000, 2000, 4000, 8000), 10.0)
    return [row for count in counts for row in _linkage(count, limit)]


def _linkage(count: int, limit: float) -> list[Row]:
    per_student = count // STUDENTS
    draw = torch.Generator().manual_seed(count)
    centres = torch.randn(per_student, 16, generator=draw, dtype=torch.float64)
    noise = torch.randn(STUDENTS, per_student, 16, generator=draw, dtype=torch.float64)
    vectors_VK = (centres + 0.05 * noise).flatten(0, 1)
    pool = Pool(vectors_VK, np.repeat(np.arange(STUDENTS), per_student), torch.zeros(STUDENTS))
    rule = ClusteringConfig(gamma=0.5)
    merges = average_linkage(vectors_VK, "none")
    ways = {
        "cut": lambda: best_cut(merges, pool, False, rule),
        "sign-free cut": lambda: best_cut(merges, pool, True, rule),
        "whole": lambda: cluster(pool, "none", rule),
    }
    ours: dict[str, list[float]] = {name: [] for name in ways}
    trees, searches = [], []
    for _ in range(3):  # ours and the baseline by turns; a search of milliseconds is run often
        tree, search = baselines.whole_clustering(vectors_VK, STUDENTS // 2, limit, time.process_time)
        trees.append(tree)
        searches.append(search)
        for name, seconds in turns(ways, 9).items():
            ours[name].append(median(seconds))
    searched = [s / o for s, o in zip(searches, ours["cut"], strict=True)]
    free = [s / o for s, o in zip(searches, ours["sign-free cut"], strict=True)]
    whole = [(t + s) / o for t, s, o in zip(trees, searches, ours["whole"], strict=True)]
    every = median(searches)
    return [
        _row(f"cut of {count} vectors' tree", ours["cut"], every, searched),
        _row(f"cut of {count} vectors' tree, signs free", ours["sign-free cut"], every, free),
        _row(f"whole clustering of {count} vectors", ours["whole"], median(trees) + every, whole),
    ]


def _row(what: str, ours: list[float], baseline: float, ratios: list[float]) -> Row:
    return Row(what, median(ours), baseline, median(ratios), min(ratios), max(ratios))
