"""Recover teachers whose weights are known, with one setting for all, and score each recovery.

    python -m benchmarks recovery --teachers synthetic --activation g        # the 150 problems with activation g
    python -m benchmarks recovery --teachers synthetic --seeds 5 --ray       # all activations over a Ray cluster
    python -m benchmarks recovery --teachers shallow wide deep --set students.count=10
    python -m benchmarks recovery --teachers shallow --hidden 15-15 --activation tanh g      # any other shape
    python -m benchmarks recovery --teachers large       # from safetensors files, by the command: time and peak memory
    python -m benchmarks recovery --teachers smooth narrow    # wide smooth layers; more neurons than inputs: likewise

The synthetic ones are those of Expand-and-Cluster, 5 input sizes x 3 widths (as a Ray Tune sweep:
`tune_spaces/synthetic_problems.yaml`); the others classify scikit-learn's digits, `large` enlarged to 28 x 28.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.harness import Cell, Column, Options, Part, Row, Table, extremes, share, written
from distrecon import config as configuration
from distrecon.expand_cluster import RecoveryConfig, network, recover_network, score, train_teacher
from distrecon.expand_cluster.teachers import synthetic_problem
from distrecon.expand_cluster.weights import Weights
from distrecon.nets.activations import ACTIVATIONS

Sizes = tuple[int, ...]
TRAINING, SIZE = 1000, 28  # images that teachers are trained on; side of the enlarged ones


# -- teachers ----------------------------------------------------------------------------------------------------------


def synthetic(sizes: Sizes, activation: str, seed: int) -> tuple[Weights, Tensor | None]:
    """A problem of the synthetic family; it has no images."""
    return synthetic_problem(sizes[0], sizes[1], activation, seed), None


def trained(sizes: Sizes, activation: str, seed: int) -> tuple[Weights, Tensor | None]:
    """A classifier of the digits, and all images [Q, I], enlarged where it has more inputs."""
    digits = load_digits()
    images_QI = torch.from_numpy(digits.data / 16.0)
    if sizes[0] != images_QI.shape[1]:
        images = torch.from_numpy(digits.images / 16.0)[:, None]
        images_QI = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False).flatten(1)
    labels_Q = torch.from_numpy(digits.target)[:TRAINING]
    return train_teacher(images_QI[:TRAINING], labels_Q, sizes[1:-1], activation, seed), images_QI


@dataclass(frozen=True)
class Teachers:
    """A set of teachers: shapes with their activations, how many seeds, and how they are made and recovered."""

    shapes: dict[Sizes, Sequence[str]]
    make: Callable[[Sizes, str, int], tuple[Weights, Tensor | None]] = trained
    exact: float = 1e-9  # largest cosine distance of an exact recovery
    seeds: int = 5
    more_seeds: tuple[str, ...] = ()  # activations that have twice as many
    command: bool = False  # recovered from a file by `python -m distrecon.recover`

    def cases(self, args: Namespace) -> Iterator[tuple[Sizes, str, int]]:
        """Shapes, activations and seeds, as the options choose; a shape that is not in the set has every activation."""
        shapes = self.shapes
        if args.inputs:
            shapes = {sizes: names for sizes, names in shapes.items() if sizes[0] in args.inputs}
        if args.hidden:
            ends = dict.fromkeys((sizes[0], sizes[-1]) for sizes in shapes)
            asked = [(first, *hidden, last) for first, last in ends for hidden in args.hidden]
            shapes = {sizes: shapes.get(sizes, tuple(ACTIVATIONS)) for sizes in asked}
        for sizes, names in shapes.items():
            for name in names if not args.activation else [n for n in args.activation if n in names or args.hidden]:
                for seed in range(args.seeds or (2 * self.seeds if name in self.more_seeds else self.seeds)):
                    yield sizes, name, seed


TEACHERS = {
    "synthetic": Teachers(
        {(d, r, 1): tuple(ACTIVATIONS) for d in (2, 4, 8, 16, 32) for r in (2, 4, 8)},
        synthetic, exact=1e-6, more_seeds=("g",),
    ),
    "shallow": Teachers({(64, 20, 10): tuple(ACTIVATIONS)}),
    "wide": Teachers({(64, 30, 10): ("tanh",)}),
    "deep": Teachers({(64, 15, 15, 10): ("tanh", "leaky_relu", "relu", "g"), (64, 10, 10, 10, 10): ("tanh",)}),
    "large": Teachers({(784, 30, 10): ("tanh", "g")}, seeds=1, command=True),
    "smooth": Teachers(
        {
            (64, 50, 10): ("tanh", "sigmoid", "g"),
            (64, 100, 10): ("tanh", "sigmoid", "g"),
            (784, 64, 10): ("tanh", "g"),
            (64, 32, 32, 10): ("tanh",),
        },
        seeds=2, command=True,
    ),
    "narrow": Teachers(
        {(10, 30, 1): ("tanh", "sigmoid", "g"), (10, 100, 1): ("tanh", "sigmoid")}, synthetic, seeds=2, command=True
    ),
}  # fmt: skip


# -- recovering --------------------------------------------------------------------------------------------------------


def cells(args: Namespace) -> Iterator[Cell]:
    """One teacher a cell; with --quick the first of each set."""
    settings = configuration.parse_assignments(args.set)
    for name in args.teachers:
        for sizes, activation, seed in TEACHERS[name].cases(args):
            key = {"teachers": name, "sizes": "-".join(map(str, sizes)), "activation": activation, "seed": seed}
            key |= {"settings": settings} if settings else {}
            yield Cell(key, partial(solve, name, sizes, activation, seed, settings))
            if args.quick:
                break


def solve(name: str, sizes: Sizes, activation: str, seed: int, settings: dict[str, Any]) -> list[Row]:
    """Make one teacher, recover it and score the recovery."""
    teachers = TEACHERS[name]
    weights, images_QI = teachers.make(sizes, activation, seed)
    started = time.monotonic()
    recovered = by_command if teachers.command else in_process
    row = recovered(weights, images_QI, activation, seed, settings)
    hidden = list(sizes[1:-1])
    exact = row["recover/layer_sizes"] == hidden and row["recover/max_cosine_distance"] < teachers.exact
    return [{"exact": exact, "seconds": time.monotonic() - started} | row]


def in_process(weights: Weights, images_QI: Tensor | None, activation: str, seed: int, settings: dict[str, Any]) -> Row:
    """By the function: its verdict, metrics and stages, and the processor seconds of this process."""
    teacher, config = network(weights, activation), configuration.replace(RecoveryConfig(), settings)
    cpu = time.process_time()
    recovery = recover_network(
        teacher, weights[0][0].shape[1], activation, len(weights) - 1, seed, images_QI, config=config
    )
    metrics = score(recovery, weights, images_QI)
    row = {"cpu_seconds": time.process_time() - cpu, "stages": recovery.seconds}
    if images_QI is not None:
        labels_Q = torch.from_numpy(load_digits().target)[TRAINING:]
        row["teacher_accuracy"] = float((teacher(images_QI[TRAINING:]).argmax(1) == labels_Q).double().mean())
    return row | {"verified": recovery.verified, "reason": recovery.reason} | recovery.metrics | metrics


def by_command(weights: Weights, images_QI: Tensor | None, activation: str, seed: int, settings: dict[str, Any]) -> Row:
    """From a safetensors file, in a process of its own: memory is that process's largest resident set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {
            f"layer{i}.{kind}": tensor.contiguous()
            for i, pair in enumerate(weights)
            for kind, tensor in zip(("weight", "bias"), pair, strict=True)
        }
        save_file(tensors, folder / "teacher.safetensors")
        command = [sys.executable, "-m", "distrecon.recover", "--teacher", str(folder / "teacher.safetensors")]
        command += ["--activation", activation, "--seed", str(seed), "--json"]
        command += ["--hidden-layers", str(len(weights) - 1)]
        if images_QI is not None:
            np.save(folder / "images.npy", images_QI[TRAINING:].numpy())
            command += ["--data", str(folder / "images.npy")]
        for key, wanted in settings.items():
            command += ["--set", f"{key}={json.dumps(wanted)}"]
        with (folder / "summary.json").open("wb") as out:
            child = subprocess.Popen([*command, "--out", str(folder / "run")], stdout=out)
            _, _, usage = os.wait4(child.pid, 0)
        summary = json.loads((folder / "summary.json").read_text())
    used = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}
    return used | {"verified": summary["verified"], "reason": summary["reason"]} | summary["metrics"]


# -- tables ------------------------------------------------------------------------------------------------------------


def _wrong(row: Row) -> bool:
    return row["verified"] and not row["exact"]


def _largest_distance(rows: Sequence[Row]) -> str:
    distances = [row["recover/max_cosine_distance"] for row in rows if row["exact"]]
    return f"{max(distances):.0e}" if distances else ""


SUMMARY = Table(
    (
        share("exact", lambda row: row["exact"]),
        Column("verified", lambda rows: str(sum(row["verified"] for row in rows))),
        Column("verified wrongly", lambda rows: str(sum(map(_wrong, rows)))),
        Column("largest distance of the exact", _largest_distance),
        extremes("least agreement", "recover/agreement", "{:.4f}".format, min),
        extremes("CPU seconds: median, most", "cpu_seconds", "{:.1f}".format, median, max),
        extremes("queries: most", "recover/queries", "{:,}".format, max),
        extremes("peak GiB", "peak_gib", "{:.2f}".format, max),
    ),
    by=lambda row: f"{row['sizes'] if row['teachers'] != 'synthetic' else 'synthetic'} {row['activation']}",
    heading="teachers",
    total=True,
)


def tables(rows: Sequence[Row], args: Namespace) -> str:
    """A line a shape and activation, and for the synthetic ones the map of exact recoveries by inputs d and width r."""
    texts, problems = [written(SUMMARY, rows)], [row for row in rows if row["teachers"] == "synthetic"]
    for activation in dict.fromkeys(row["activation"] for row in problems):
        of_it = [row for row in problems if row["activation"] == activation]
        by_inputs = Table(
            tuple(_width(width) for width in sorted({_sizes(row)[1] for row in of_it})),
            by=lambda row: f"d={_sizes(row)[0]}",
            heading=f"exact, {activation}",
        )
        texts.append(written(by_inputs, of_it))
    return "\n\n".join(texts)


def _sizes(row: Row) -> list[int]:
    return [int(size) for size in row["sizes"].split("-")]


def _width(width: int) -> Column:
    def cell(rows: Sequence[Row]) -> str:
        cells = [row["exact"] for row in rows if _sizes(row)[1] == width]
        return f"{sum(cells)} of {len(cells)}" if cells else ""

    return Column(f"r={width}", cell)


def _hidden(text: str) -> Sizes:
    return tuple(map(int, text.split("-")))


OPTIONS: Options = {
    "--teachers": {"nargs": "+", "choices": TEACHERS, "default": list(TEACHERS), "help": "sets (default: all)"},
    "--activation": {"nargs": "+", "choices": list(ACTIVATIONS), "help": "only these"},
    "--seeds": {"type": int, "help": "teachers of each kind (default: as on docs/recovery.md)"},
    "--inputs": {"type": int, "nargs": "+", "help": "only shapes with so many inputs"},
    "--hidden": {"type": _hidden, "nargs": "+", "metavar": "H[-H...]", "help": "these hidden sizes, in the set or not"},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "a recovery setting"},
    "--ray": {"action": "store_true", "help": "teachers side by side on a Ray cluster"},
}
PARTS = {"recovery": Part(cells, tables, OPTIONS)}
