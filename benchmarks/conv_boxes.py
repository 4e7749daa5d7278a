"""Convolutional black boxes recovered from their answers: filters, channels, readout.

    python -m benchmarks convolutions                        # all of them
    python -m benchmarks convolutions --sets one two         # one hidden convolution, two
    python -m benchmarks convolutions --sets zoo --zoo DIR   # held-out models of a zoo of relu CNNs

Teachers classify scikit-learn's digits as 1 x 8 x 8 images, but for those of random weights, which have two input
channels. *Exact*: every layer has its true size, and every filter and outgoing weight lies within 1e-9 (cosine) of the
true one. The recovery sees answers alone.

Of a zoo the last state of each of the first ten models of the test split is a black box that answers in float64. The
recovery knows its kinds of layers. A unit is *found* if its incoming weights lie within 1e-9 of the true one's, given
the layers before it; a unit of the zoo may be dead: on at no input, so that nobody can find it.
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
from distrecon.errors import UserError
from distrecon.expand_cluster import recover_network, score
from distrecon.expand_cluster.convolution.hypothesis import Shape, read_layers
from distrecon.expand_cluster.convolution.network import Chain, ConvNet
from distrecon.expand_cluster.weights import Weights
from distrecon.nets import ChainArchitecture
from distrecon.nets.activations import activation as find_activation
from distrecon.zoos import open_zoo

EXACT = 1e-9
PART, NEAREST = (
    1e-6,
    0.5,
)  # of a unit's length: a weight that is right; how far off a unit may be to stand for a true one
MODELS = 10  # of a zoo
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


ZOO = "zoo"
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


def solve_zoo(zoo: str, row: int) -> list[Row]:
    """Recover one model of a zoo's test split, and see layer by layer how far that went."""
    store = open_zoo(zoo)
    arch = store.architecture
    if not isinstance(arch, ChainArchitecture) or len(arch.input_shape) != 3:
        raise UserError(f"{zoo}: its models are no chains of convolutions")
    theta_1P = store.models("test").theta_BP[row][None].double()
    truth = [(weight[0], bias[0]) for weight, bias in arch.weights_and_biases(theta_1P)]
    text, shape = layers_of(arch), tuple(arch.input_shape)
    chain = Chain(read_layers(text, shape), truth, find_activation(arch.activation))
    wall, cpu = time.monotonic(), time.process_time()
    result = recover_network(chain.module().requires_grad_(False), shape, arch.activation, layers=text)
    found: Row = {"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - wall}
    found |= parts_found(truth, result.weights)
    distance = float("nan")
    if result.layer_sizes == [len(bias) for _, bias in truth[:-1]]:
        distance = score(result, truth)["recover/max_cosine_distance"]
    found |= {"exact": distance < EXACT, "distance": distance, "found": f"{text}: {result.layer_sizes}"}
    found |= {"accuracy": float(store.models("test").test_accuracy_B[row])}
    return [found | {"verified": result.verified, "reason": result.reason, "stages": result.seconds} | result.metrics]


def layers_of(arch: ChainArchitecture) -> str:
    """A chain's layers as a recovery's `layers`."""
    words = []
    for layer in arch.layers:
        words.append(f"conv{layer.kernel}" + f"p{layer.padding}" * (layer.padding > 0) if layer.kernel else "linear")
        words += [f"pool{layer.pool}"] * (layer.pool > 1)
    return " ".join(words)


def parts_found(truth: Weights, found: Weights) -> Row:
    """Of every hidden layer of a relu network: how many units were found, and the share of all its weights that lie
    within 1e-6 of the true ones (of a unit's length), the layers before it brought into the true order and scale."""
    units, shares = list[int](), list[float]()
    matched = torch.arange(truth[0][0].shape[1])  # which channel found is each true one (-1: none)
    scales = torch.ones(len(matched), dtype=torch.float64)  # of the true one over that of the one found
    for (w_true, b_true), (w, b) in list(zip(truth, found, strict=True))[:-1]:
        each, there = w_true.flatten(1).shape[1] // len(matched), matched >= 0
        into = torch.zeros(len(b), len(matched), each, dtype=torch.float64)
        into[:, there] = w.reshape(len(b), -1, each)[:, matched[there]] / scales[there, None]
        rows, true_rows = (
            torch.cat([into.flatten(1), b[:, None]], 1),
            torch.cat([w_true.flatten(1), b_true[:, None]], 1),
        )
        unit_rows, unit_true = F.normalize(rows, dim=1), F.normalize(true_rows, dim=1)
        nearest = torch.cdist(unit_true, unit_rows, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        units.append(int((nearest.values.square() / 2 < EXACT).sum()))
        shares.append(float(((unit_true - unit_rows[nearest.indices]).abs() < PART).double().mean()))
        matched = torch.where(nearest.values < NEAREST, nearest.indices, -1)
        scales = true_rows.norm(dim=1) / rows[nearest.indices].norm(dim=1).clamp(min=1e-300)
    return {"units": units, "shares": shares}


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
    """One black box and seed a cell, or one model of the zoo; with --quick the first of all."""
    for name in [name for name in args.sets if name != ZOO]:
        for box in SETS[name]:
            for seed in range(box.seeds):
                key: Row = {"layers": box.layers, "widths": "-".join(map(str, box.widths)), "seed": seed}
                key |= {"activation": box.activation, "taken": box.taken or "", "shape": "x".join(map(str, box.shape))}
                yield Cell(key, partial(solve, box, seed))
                if args.quick:
                    return
    if ZOO in args.sets and args.zoo:
        models = open_zoo(args.zoo).models("test")
        last = {name: row for row, name in sorted(enumerate(models.model_id), key=lambda pair: models.epoch_B[pair[0]])}
        for name in list(dict.fromkeys(models.model_id))[: 1 if args.quick else MODELS]:
            key = {"layers": ZOO, "widths": "", "seed": name, "activation": "relu", "taken": "", "shape": ""}
            yield Cell(key, partial(solve_zoo, args.zoo, last[name]))


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


def _of_layers(key: str, form: str) -> Column:
    return Column(f"{key} by layer", lambda rows: " ".join(form.format(value) for value in rows[0][key]))


ZOO_TABLE = Table(
    (
        _of_layers("units", "{}"),
        _of_layers("shares", "{:.3f}"),
        Column("exact", lambda rows: "yes" if rows[0]["exact"] else "no"),
        Column("verified", lambda rows: "yes" if rows[0]["verified"] else "no"),
        extremes("CPU seconds", "cpu_seconds", "{:.0f}".format, max),
        extremes("queries", "recover/queries", "{:,}".format, max),
        Column("reason", lambda rows: rows[0]["reason"], words=True),
    ),
    by=lambda row: row["seed"],
    heading="model",
)


def tables(rows: Sequence[Row], args: Namespace) -> str:
    """A line a kind of black box, and a line a model of the zoo."""
    chosen = {name: [row for row in rows if (row["layers"] == ZOO) == (name == ZOO)] for name in ("", ZOO)}
    parts = [written(table, chosen[name]) for name, table in (("", SUMMARY), (ZOO, ZOO_TABLE)) if chosen[name]]
    return "\n\n".join(parts)


OPTIONS: Options = {
    "--sets": {"nargs": "+", "choices": [*SETS, ZOO], "default": list(SETS), "help": "default: all but zoo"},
    "--zoo": {"metavar": "ZOO", "help": "of relu chains of convolutions, for --sets zoo"},
}
PARTS = {"convolutions": Part(cells, tables, OPTIONS)}
