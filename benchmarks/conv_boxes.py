"""Convolutional black boxes recovered from their answers: filters, channels, readout.

    python -m benchmarks convolutions                        # all of them
    python -m benchmarks convolutions --sets one two         # one hidden convolution, two

Teachers classify scikit-learn's digits as 1 x 8 x 8 images, but for those of random weights, which have two input
channels. *Exact*: every layer has its true size, and every filter and outgoing weight lies within 1e-9 (cosine) of the
true one. The recovery sees answers alone.
"""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.harness import Cell, Column, Options, Part, Row, Table, extremes, share, written
from distrecon.expand_cluster import recover_network, score
from distrecon.expand_cluster.convolution.hypothesis import Shape, read_layers
from distrecon.expand_cluster.convolution.network import Chain, ConvNet
from distrecon.nets.activations import activation as find_activation

EXACT = 1e-9
TRAINING, EPOCHS, BATCH, LEARNING_RATE = 1400, 12, 64, 3e-3
DIGITS: Shape = (1, 8, 8)


@dataclass(frozen=True)
class Box:
    """A black box: its layers, widths and activation, what it is taken to be (None: the truth), and how many seeds."""

    layers: str
    widths: tuple[int, ...]
    activation: str
    seeds: int = 1
    taken: str | None = None
    shape: Shape = DIGITS
    trained: bool = True


SETS = {
    "one": [
        Box("conv3 linear", (4,), "tanh", 5),
        Box("conv3 linear", (6,), "tanh", 5),
        *(Box("conv3 linear", (4,), name) for name in ("sigmoid", "softplus", "gelu", "silu", "relu", "leaky_relu")),
    ],
    "two": [
        Box("conv3 conv3 linear", (4, 6), "tanh", 5),
        Box("conv3p1 conv3 linear", (4, 6), "tanh"),
        Box("conv3 conv3 linear", (4, 6), "sigmoid"),
    ],
    "kinds": [
        Box("conv3p1 linear", (4,), "tanh"),
        Box("conv5s2 linear", (4,), "tanh"),
        Box("conv3p1 pool2 linear", (4,), "tanh"),
        Box("conv3p1 avgpool2 linear", (4,), "tanh"),
        Box("conv3 linear linear", (4, 8), "tanh"),
        Box("conv3 linear", (4,), "tanh", shape=(2, 6, 6), trained=False),
        Box("conv3 linear", (4,), "tanh", taken="unknown"),
        Box("conv3p1 linear", (4,), "tanh", taken="unknown"),
    ],
    "wrong": [
        Box("conv3p1 linear", (4,), "tanh", taken="conv3 linear"),
        Box("conv5 linear", (4,), "tanh", taken="conv3 linear"),
        Box("conv3 conv3 linear", (4, 6), "tanh", taken="conv3 linear"),
    ],
    "pooled": [Box("conv3p1 pool2 conv3 linear linear", (6, 8, 16), "relu", 10)],
}


def teacher(box: Box, seed: int) -> nn.Sequential:
    """The black box as a float64 module: PyTorch's initialisation, then Adam on the digits."""
    torch.manual_seed(seed)
    hypothesis = read_layers(box.layers, box.shape)
    net = ConvNet(hypothesis, box.widths, find_activation(box.activation))
    drawn = [nn.Linear(fan_in, width).double() for fan_in, width in zip(net.fan_ins, net.widths, strict=True)]
    last = nn.Linear(net.num_features, 10).double()
    theta_P = net.flatten([torch.cat([d.weight, d.bias[:, None]], 1).detach() for d in drawn])
    module = Chain(hypothesis, net.weights(theta_P, last.weight.detach(), last.bias.detach()), net.activation).module()
    if box.trained:
        _train(module, seed)
    return module.requires_grad_(False)


def _train(module: nn.Sequential, seed: int) -> None:
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    images, labels_Q = torch.from_numpy(digits.images / 16.0)[:TRAINING, None], torch.from_numpy(digits.target)
    optimiser = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINING, generator=generator).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(module(images[rows]), labels_Q[rows]).backward()
            optimiser.step()


def solve(box: Box, seed: int) -> list[Row]:
    """Make one black box, recover it, score the recovery."""
    module = teacher(box, seed)
    wall, cpu = time.monotonic(), time.process_time()
    result = recover_network(module, box.shape, box.activation, seed=seed, layers=box.taken or box.layers)
    row: Row = {"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - wall}
    layers = [layer for layer in module if isinstance(layer, nn.Conv2d | nn.Linear)]
    states = [layer.state_dict() for layer in layers]
    truth: list[tuple[Tensor, Tensor]] = [(state["weight"], state["bias"]) for state in states]
    found = result.hypothesis.text if result.hypothesis else ""
    exact, distance = False, float("nan")
    if found == box.layers and result.layer_sizes == list(box.widths):
        distance = score(result, truth)["recover/max_cosine_distance"]
        exact = distance < EXACT
    row |= {"exact": exact, "distance": distance, "found": f"{found}: {result.layer_sizes}"}
    return [row | {"verified": result.verified, "reason": result.reason, "stages": result.seconds} | result.metrics]


def cells(args: Namespace) -> Iterator[Cell]:
    """One black box and seed a cell; with --quick the first of all."""
    for name in args.sets:
        for box in SETS[name]:
            for seed in range(box.seeds):
                key: Row = {"layers": box.layers, "widths": "-".join(map(str, box.widths)), "seed": seed}
                key |= {"activation": box.activation, "taken": box.taken or "", "shape": "x".join(map(str, box.shape))}
                yield Cell(key, partial(solve, box, seed))
                if args.quick:
                    return


def _largest_distance(rows: Sequence[Row]) -> str:
    distances = [row["distance"] for row in rows if row["exact"]]
    return f"{max(distances):.0e}" if distances else ""


def _name(row: Row) -> str:
    shape = f", {row['shape']}" if row["shape"] != "1x8x8" else ""
    taken = f", taken to be {row['taken']}" if row["taken"] else ""
    return f"{row['layers']}, {row['widths']} {row['activation']}{shape}{taken}"


SUMMARY = Table(
    (
        share("exact", lambda row: row["exact"]),
        Column("verified", lambda rows: str(sum(row["verified"] for row in rows))),
        Column("verified wrongly", lambda rows: str(sum(row["verified"] and not row["exact"] for row in rows))),
        Column("largest distance of the exact", _largest_distance),
        extremes("CPU seconds: median, most", "cpu_seconds", "{:.1f}".format, median, max),
        extremes("queries: most", "recover/queries", "{:,}".format, max),
    ),
    by=_name,
    heading="black box",
    total=True,
)


def tables(rows: Sequence[Row], args: Namespace) -> str:
    """A line a kind of black box."""
    return written(SUMMARY, rows)


OPTIONS: Options = {"--sets": {"nargs": "+", "choices": SETS, "default": list(SETS), "help": "default: all"}}
PARTS = {"convolutions": Part(cells, tables, OPTIONS)}
