"""Expand-and-Cluster's two heavy parts: fitting the students, against Adam, and clustering their neurons.

Adam with plateau decay is the published way. Both solvers start from the same ten random students, four times as
wide as the teacher, and see the same probes; a loss is the median student's, relative.
"""

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.harness import SPEED, Cell, Options, Part, Row, Table, duration, speed, timing, turns, value, written
from distrecon.expand_cluster import network, synthetic_teacher
from distrecon.expand_cluster.config import ClusteringConfig
from distrecon.expand_cluster.least_squares import levenberg_marquardt
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import Pool, average_linkage, best_cut, cluster
from distrecon.expand_cluster.problem import NetworkFit, TrainingData
from distrecon.expand_cluster.warm_start import Adam
from distrecon.nets.activations import activation as find_activation

SUITE = ((4, 4), (8, 4), (16, 4), (4, 2), (8, 2), (16, 2), (4, 3), (8, 3), (16, 3), (2, 2))  # inputs, width
WIDER = ((4, 4), (8, 4), (16, 4), (4, 2), (8, 8), (2, 4), (16, 2), (32, 2), (2, 2), (4, 8))
SETS = {"suite": SUITE, "wider": WIDER}
TARGETS = (1e-4, 1e-8, 1e-16)
STUDENTS, RHO = 10, 4
PATIENCE, DECAY = 200, 0.5  # the plateau rule: this many steps without a new least loss shrink the rate

Trace = list[tuple[float, float]]  # (CPU seconds, median loss)


# -- solvers -----------------------------------------------------------------------------------------------------------


def adam(net: DenseNet, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor, seconds: float) -> Trace:
    """Full-batch Adam at 1e-3 with plateau decay, in float64."""
    matrices = [m.clone() for m in net.matrices(theta_NP)]
    rule, rate, trace, started = Adam(matrices), 1e-3, [], time.process_time()
    best, age = float("inf"), 0
    while time.process_time() - started < seconds:
        loss_N, gradients = net.loss_gradients(net.flatten(matrices), x_QI, y_QO)
        for m, update in zip(matrices, rule.updates(gradients), strict=True):
            m.sub_(rate * update)
        loss = float(loss_N.median())
        trace.append((time.process_time() - started, loss))
        best, age = (loss, 0) if loss < best * 0.999 else (best, age + 1)
        if age >= PATIENCE:
            rate, age = max(rate * DECAY, 1e-6), 0
    return trace


def solver(net: DenseNet, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor) -> Trace:
    """The same for Levenberg-Marquardt."""
    trace: Trace = []
    started = time.process_time()
    levenberg_marquardt(
        NetworkFit(net, x_QI, y_QO),
        theta_NP,
        200,
        progress=lambda _, loss_N: trace.append((time.process_time() - started, float(loss_N.median()))),
    )
    return trace


def first_below(trace: Trace, target: float) -> float:
    """Seconds until the loss first is at most `target`; infinite if it never is."""
    return next((seconds for seconds, loss in trace if loss <= target), math.inf)


def solve(inputs: int, width: int, seed: int, seconds: float) -> list[Row]:
    """Both solvers on one synthetic problem: seconds to each target and to Adam's final loss, and the final losses."""
    draw = torch.Generator().manual_seed(seed)
    x_QI = torch.randn(1000, inputs, generator=draw, dtype=torch.float64)
    data = TrainingData.of(x_QI, x_QI, network(synthetic_teacher(inputs, width, "g", seed), "g")(x_QI))
    net = DenseNet((inputs, RHO * width, 1), find_activation("g"))
    theta_NP = net.random(STUDENTS, draw)
    traces = {
        "adam": adam(net, theta_NP, data.z_QR, data.y_QO, seconds),
        "solver": solver(net, theta_NP, data.z_QR, data.y_QO),
    }
    final = traces["adam"][-1]
    return [
        {f"{name}_to_{target:g}": first_below(trace, target) for name, trace in traces.items() for target in TARGETS}
        | {f"{name}_final": trace[-1][1] for name, trace in traces.items()}
        | {"solver_to_adams_final": first_below(traces["solver"], final[1]), "adam_seconds": final[0]}
    ]


def problems(args: Namespace) -> Iterator[Cell]:
    """One cell a problem."""
    chosen, seconds = (SUITE[:2], 3.0) if args.quick else (SETS[args.problems], args.adam_seconds)
    for seed, (inputs, width) in enumerate(chosen):
        key = {"inputs": inputs, "width": width, "seed": seed, "limit": seconds}
        yield Cell(key, partial(solve, inputs, width, seed, seconds))


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Time of the median student to a relative loss, against Adam: medians over the problems.

    Where Adam did not get there its time is the limit: the ratio is then a lower bound.
    """
    found = []
    for target in TARGETS:
        ours, theirs = f"solver_to_{target:g}", f"adam_to_{target:g}"
        reached, by_adam = [row for row in rows if row[ours] < math.inf], sum(row[theirs] < math.inf for row in rows)
        note = f"reached on {len(reached)} of {len(rows)} problems, by Adam on {by_adam}"
        note += "; a lower bound where Adam failed" if by_adam < len(rows) and reached else ""
        pairs = [(min(row[theirs], row["adam_seconds"]), row[ours]) for row in reached]
        found.append(_ratio(f"students to a loss of {target:g}", pairs, note))
    limit, loss = rows[0]["limit"], median(row["adam_final"] for row in rows)
    note = f"Adam stopped at {limit:g} s, at a median loss of {loss:.0e}"
    pairs = [(row["adam_seconds"], row["solver_to_adams_final"]) for row in rows]
    return [*found, _ratio(f"students to Adam's own final loss, {len(rows)} problems", pairs, note)]


def _ratio(what: str, pairs: Sequence[tuple[float, float]], note: str) -> Row:
    """`pairs` are seconds of Adam and of the solver, one a problem."""
    if not pairs:
        return timing(what, math.nan, note=note)
    theirs, ours = zip(*pairs, strict=True)
    return timing(what, median(ours), median(theirs), [a / b for a, b in pairs], note)


def _seconds(seconds: float) -> str:
    return "never" if math.isinf(seconds) else duration(seconds)


BY_PROBLEM = Table(
    (
        value("Adam to 1e-4", "adam_to_0.0001", _seconds),
        value("this solver", "solver_to_0.0001", _seconds),
        value("Adam ends", "adam_final", "{:.0e}".format),
        value("this solver ends", "solver_final", "{:.0e}".format),
    ),
    by=lambda row: f"{row['inputs']}, {row['width']}",
    heading="d, r",
)


# -- clustering --------------------------------------------------------------------------------------------------------


def clouds(count: int) -> Pool:
    """Ten students' neurons near the same places, about `count` together."""
    per_student, draw = max(1, count // STUDENTS), torch.Generator().manual_seed(count)
    centres = torch.randn(per_student, 16, generator=draw, dtype=torch.float64)
    noise = torch.randn(STUDENTS, per_student, 16, generator=draw, dtype=torch.float64)
    students = np.repeat(np.arange(STUDENTS), per_student)
    return Pool((centres + 0.05 * noise).flatten(0, 1), students, torch.zeros(STUDENTS))


RULE = ClusteringConfig(gamma=0.5)


def linkage(args: Namespace, count: int) -> list[Row]:
    """Finding the cut, and the whole clustering, against cutting the tree again at every height."""
    limit = 2.0 if args.quick else 10.0  # seconds of a search by the baseline
    pool = clouds(count)
    merges = average_linkage(pool.vectors_VK, "none")
    ways = {
        "cut": lambda: best_cut(merges, pool, False, RULE),
        "sign-free cut": lambda: best_cut(merges, pool, True, RULE),
        "whole": lambda: cluster(pool, "none", RULE),
    }
    ours: dict[str, list[float]] = {name: [] for name in ways}
    trees, searches = [], []
    for _ in range(3):  # ours and the baseline by turns; a search of milliseconds is run often
        tree, search = baselines.whole_clustering(pool.vectors_VK, STUDENTS // 2, limit, time.process_time)
        trees.append(tree)
        searches.append(search)
        for name, seconds in turns(ways, 9).items():
            ours[name].append(median(seconds))
    wholes = [tree + search for tree, search in zip(trees, searches, strict=True)]
    return [
        timing(what, median(ours[name]), median(theirs), [t / o for t, o in zip(theirs, ours[name], strict=True)])
        for what, name, theirs in (
            (f"cut of {count} vectors' tree", "cut", searches),
            (f"cut of {count} vectors' tree, signs free", "sign-free cut", searches),
            (f"whole clustering of {count} vectors", "whole", wholes),
        )
    ]


SIZES = (500, 1000, 2000, 4000, 8000)
OPTIONS: Options = {
    "--problems": {"choices": SETS, "default": "suite", "help": "(default: %(default)s)"},
    "--adam-seconds": {"type": float, "default": 10.0, "help": "CPU seconds that Adam has (default: %(default)s)"},
}
PARTS = {
    "students": Part(
        problems,
        lambda rows, args: f"{written(SPEED, ratios(rows))}\n\n{written(BY_PROBLEM, rows)}",
        OPTIONS,
        kept=False,
    ),
    "linkage": speed(linkage, [(size,) for size in SIZES], [(size,) for size in SIZES[:2]]),
}
