"""From a black box to its place in a zoo: held-out networks recovered from their answers alone, and placed.

    python -m benchmarks placement                                        # a zoo and an autoencoder are made first
    python -m benchmarks placement --zoo my_zoo --autoencoder runs/mine   # of dense networks

A cell is one model of the zoo's test split, whose states are taken in turn. It answers as the network that the zoo
holds, in float32 as networks are run, or in float64 (`--precision`); the recovery gets the answers and the activation.
Then the recovered network and, for comparison, the true weights are placed. R2 is that of the predicted test accuracies
against the true ones.
"""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Cell, Column, Options, Part, Row, Table, extremes, share
from distrecon.autoencoder.predict import r2
from distrecon.errors import UserError
from distrecon.expand_cluster import network, recover_network
from distrecon.nets import ChainArchitecture
from distrecon.placing import Placer
from distrecon.zoos import open_zoo

HOME = Path("runs", "benchmarks", "placement")
ZOO, RUN = HOME / "zoo", HOME / "run"
SETTINGS = ("data.symmetries=all", "model.latent=8")


def cells(args: Namespace) -> Iterator[Cell]:
    """One model a cell; with --quick one only."""
    if not args.zoo and not args.autoencoder:
        _make()
    zoo, run = str(args.zoo or ZOO), str(args.autoencoder or RUN)
    models = open_zoo(zoo).models(args.split)
    names = list(dict.fromkeys(models.model_id))
    for number, name in enumerate(names[: 1 if args.quick else args.count]):
        rows = [i for i, other in enumerate(models.model_id) if other == name]
        row = rows[number % len(rows)]
        key = {"split": args.split, "precision": args.precision, "model": name, "epoch": int(models.epoch_B[row])}
        yield Cell(key, partial(solve, zoo, run, args.split, row, args.precision))


def _make() -> None:
    """The shipped zoo, and an autoencoder trained on it; what is there already stays."""
    commands = {
        ZOO / "zoo.json": ["zoo", "train", "--config", "digits_mlp", "--out", str(ZOO)],
        RUN / "summary.json": [
            "train",
            "--zoo",
            str(ZOO),
            "--out",
            str(RUN),
            *(w for s in SETTINGS for w in ("--set", s)),
        ],
    }
    for made, command in commands.items():
        if not made.exists():
            subprocess.run([sys.executable, "-m", f"distrecon.{command[0]}", *command[1:]], check=True)


@cache
def _placer(zoo: str, run: str) -> Placer:
    return Placer.of(Namespace(zoo=zoo, autoencoder=run))


def solve(zoo: str, run: str, split: str, row: int, precision: str) -> list[Row]:
    """Recovers one model from its answers, and places what was recovered and the true weights."""
    torch.set_num_threads(1)
    placer = _placer(zoo, run)
    arch, models = placer.zoo.architecture, placer.zoo.models(split)
    if not isinstance(arch, ChainArchitecture) or any(layer.kernel for layer in arch.layers):
        raise UserError(f"{zoo}: its models are no dense networks")
    theta_1P = models.theta_BP[row][None].to(getattr(torch, precision))
    truth = [(weight[0], bias[0]) for weight, bias in arch.weights_and_biases(theta_1P)]
    cpu = time.process_time()
    recovery = recover_network(
        network(truth, arch.activation), arch.layers[0].in_features, arch.activation, len(truth) - 1
    )
    spent = time.process_time() - cpu
    found: Row = {
        "verified": recovery.verified,
        "cpu_seconds": spent,
        "queries": recovery.metrics["recover/queries"],
        "true_accuracy": float(models.test_accuracy_B[row]),
        "by_true_weights": placer.layers(truth, arch.activation).predicted["test_accuracy"],
        "predicted": None,
    }
    if recovery.verified and recovery.layer_sizes == [len(bias) for _, bias in truth[:-1]]:
        place = placer.layers(recovery.weights, recovery.activation)
        found |= {"predicted": place.predicted["test_accuracy"], "novelty": place.novelty}
    return [found]


# -- the table ---------------------------------------------------------------------------------------------------------


def _r2(key: str) -> Column:
    def cell(rows: Sequence[Row]) -> str:
        placed = [row for row in rows if row["predicted"] is not None]
        if len(placed) < 3:
            return ""
        predicted, actual = (np.array([row[k] for row in placed]) for k in (key, "true_accuracy"))
        return f"{r2(predicted, actual):.3f}"

    return Column("R2 of the recovered" if key == "predicted" else "R2 of the true weights", cell)


def _difference(rows: Sequence[Row]) -> str:
    both = [abs(row["predicted"] - row["by_true_weights"]) for row in rows if row["predicted"] is not None]
    return f"{max(both):.0e}" if both else ""


def _error(rows: Sequence[Row]) -> str:
    errors = [row["predicted"] - row["true_accuracy"] for row in rows if row["predicted"] is not None]
    return f"{np.sqrt(np.mean(np.square(errors))):.3f}" if errors else ""


TABLE = Table(
    (
        share("verified", lambda row: row["verified"]),
        share("placed", lambda row: row["predicted"] is not None),
        _r2("predicted"),
        _r2("by_true_weights"),
        Column("largest difference of the two predictions", _difference),
        Column("error of the predicted accuracy (RMS)", _error),
        extremes("true accuracies", "true_accuracy", "{:.2f}".format, min, max),
        extremes("CPU seconds of a recovery: most", "cpu_seconds", "{:.1f}".format, max),
        extremes("queries: most", "queries", "{:,}".format, max),
    ),
    by=lambda row: f"{row['split']} models, {row['precision']}",
    heading="black boxes",
)

OPTIONS: Options = {
    "--zoo": {"metavar": "ZOO", "help": "of dense networks (default: the shipped digits_mlp, trained)"},
    "--autoencoder": {"metavar": "RUN", "help": "trained on that zoo (default: trained)"},
    "--count": {"type": int, "default": 20, "help": "black boxes (default: %(default)s)"},
    "--precision": {
        "choices": ("float32", "float64"),
        "default": "float32",
        "help": "of answers (default: %(default)s)",
    },
    "--split": {"choices": ("val", "test"), "default": "test", "help": "of the models (default: %(default)s)"},
}
PARTS = {"placement": Part(cells, (TABLE,), OPTIONS)}
