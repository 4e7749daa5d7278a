"""Which part of Expand-and-Cluster does the work: the number of students, and whether their neurons are clustered.

    python -m benchmarks ablation            # some minutes on one core

Without clusters all neurons of the best student are refitted and pruned, which is what the collapse falls back on where
clusters are not enough. One round of students, by the same probes and starts in all columns.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from unittest.mock import patch

from torch import Tensor

from benchmarks.black_boxes import weights
from benchmarks.harness import Cell, Column, Part, Row, Table, extremes
from benchmarks.recovery import Sizes, in_process
from distrecon.expand_cluster.neurons import LayerClustering, Pool

SHALLOW = (((4, 4, 1), "g"), ((2, 8, 1), "g"), ((8, 8, 2), "tanh"), ((4, 8, 1), "softplus"))
DEEP = (((6, 4, 4, 2), "tanh"), ((8, 6, 5, 2), "tanh"))
STUDENTS, SEEDS = (1, 2, 5, 10), 3
EXACT = 1e-6  # largest cosine distance
CLUSTERS = "distrecon.expand_cluster.{}.representatives"  # which the collapse and the peeling of layers start from


def best_student(_clustering: LayerClustering, pool: Pool) -> Tensor:
    """All neurons of the best student, in place of one for each cluster."""
    return pool.of_best()


def solve(sizes: Sizes, activation: str, students: int, clusters: bool) -> list[Row]:
    """The teachers of one shape, each recovered with so many students."""
    rows = []
    for seed in range(SEEDS):
        teacher = weights(list(sizes), 100 + seed)
        settings = {"students.count": students, "budget.attempts": 1}
        if clusters:
            row = in_process(teacher, None, activation, seed, settings)
        else:
            with patch(CLUSTERS.format("collapse"), best_student), patch(CLUSTERS.format("peel"), best_student):
                row = in_process(teacher, None, activation, seed, settings)
        right = row["recover/layer_sizes"] == list(sizes[1:-1])
        exact = right and row["recover/max_cosine_distance"] < EXACT
        rows.append({"exact": exact, "wrongly": row["verified"] and not exact} | row)
    return rows


def cells(args: Namespace) -> Iterator[Cell]:
    """A shape, a number of students, with clusters and without."""
    for sizes, activation in SHALLOW[:1] if args.quick else (*SHALLOW, *DEEP):
        for students in STUDENTS[:1] if args.quick else STUDENTS:
            for clusters in (True, False):
                key: Row = {"sizes": "-".join(map(str, sizes)), "activation": activation, "seeds": SEEDS}
                key |= {"students": students, "clusters": clusters}
                yield Cell(key, partial(solve, sizes, activation, students, clusters))


def exact(students: int, clusters: bool) -> Column:
    """How many of the teachers are recovered exactly."""

    def cell(rows: Sequence[Row]) -> str:
        these = [row for row in rows if (row["students"], row["clusters"]) == (students, clusters)]
        return f"{sum(row['exact'] for row in these)} of {len(these)}" if these else ""

    return Column(f"{students}, {'clusters' if clusters else 'the best'}", cell)


TABLE = Table(
    (
        *(exact(students, clusters) for clusters in (True, False) for students in STUDENTS),
        Column("verified wrongly", lambda rows: str(sum(row["wrongly"] for row in rows))),
        extremes("CPU seconds: median, most", "cpu_seconds", "{:.1f}".format, median, max),
    ),
    by=lambda row: f"{row['sizes']} {row['activation']}",
    heading="exact, by students",
)
PARTS = {"ablation": Part(cells, (TABLE,))}
