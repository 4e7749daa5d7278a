"""What the tables share: a zoo's splits, trained autoencoders, finished cells on disk, tables of means and spreads.

A cell is one case with one seed. Its rows are appended to `<folder>/<part>.jsonl` when it is done, and trained
autoencoders are kept beside it, so that an interrupted table goes on where it stopped. Delete the folder after changing
the code. One thread, no Ray; times are CPU times of this process.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distrecon import config as configuration
from distrecon.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Batch,
    Training,
    ZooSample,
    load_autoencoder,
    save_autoencoder,
)
from distrecon.nets import initialise
from distrecon.zoos import open_zoo

Row = dict[str, Any]
Values = dict[str, Any]
WIDTH = 80

RESIDUAL: Values = {"model.kind": "fisher_residual", "loss.beta": 0.1, "optim.epochs": 4}


class Zoo:
    """The three splits and images of a zoo folder."""

    def __init__(self, path: str) -> None:
        zoo = open_zoo(path)
        self.name, self.arch, self.images = zoo.name, zoo.architecture, zoo.images()
        self.train, self.validation, self.test = (zoo.models(split) for split in ("train", "val", "test"))

    @property
    def initial_scale(self) -> float:
        """Scale at which fresh weights have the deviation of the zoo's (small initialisations, or the paper's)."""
        first = initialise(self.arch, ["kaiming_uniform"] * 8, range(8))
        return min(1.0, float(self.train.theta_BP.std() / first.std()))

    def fresh(self, count: int, first_seed: int) -> Tensor:
        """Random initialisations [count, P] of that scale."""
        kinds, scales = ["kaiming_uniform"] * count, [self.initial_scale] * count
        return initialise(self.arch, kinds, range(first_seed, first_seed + count), scales)


class Bench:
    """One table in the making: `cell` runs what is not on disk yet, `rows` are all rows of this run."""

    def __init__(self, zoo: Zoo, seeds: int, folder: Path, part: str, only: Sequence[str] = ()) -> None:
        self.zoo, self.seeds, self.folder, self.only = zoo, seeds, folder, only
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{part}.jsonl"
        kept = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {(cell["case"], cell["seed"]): cell["rows"] for cell in map(json.loads, kept)}
        self.rows: list[Row] = []

    def cell(self, case: str, seed: int, work: Callable[[], list[Row]]) -> None:
        """The rows of `work()`, each with its seed; each row may name a finer case."""
        if self.only and not any(text in case for text in self.only):
            return
        if (case, seed) not in self.done:
            found = [{"case": case, "seed": seed} | row for row in work()]
            with self.path.open("a") as file:
                file.write(json.dumps({"case": case, "seed": seed, "rows": found}) + "\n")
            self.done[case, seed] = found
            for row in found:
                print(_line(row), flush=True)
        self.rows += self.done[case, seed]

    def autoencoder(self, values: Values, seed: int) -> tuple[Autoencoder, float]:
        """Trained with these settings, or read from the folder; and the CPU seconds that training took."""
        settings = {**values, "seed": seed}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        place = self.folder / "autoencoders" / key
        if not (place / "training.json").exists():
            trained, seconds = train(self.zoo, settings)
            place.mkdir(parents=True, exist_ok=True)
            save_autoencoder(place, trained)
            (place / "training.json").write_text(json.dumps({"settings": settings, "cpu_seconds": seconds}))
        return load_autoencoder(place).eval(), json.loads((place / "training.json").read_text())["cpu_seconds"]


def train(zoo: Zoo, values: Values) -> tuple[Autoencoder, float]:
    """One training in this process; the autoencoder and its CPU seconds."""
    config = configuration.replace(AutoencoderConfig(), values)
    size, count = config.optim.batch_size, len(zoo.train)
    steps = count // size
    start = time.process_time()
    sample = ZooSample(zoo.arch, zoo.train.theta_BP, zoo.images)
    training = Training(config, [sample], steps * config.optim.epochs)
    for epoch in range(config.optim.epochs if config.model.kind != "fisher_pca" else 0):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * config.seed + epoch))
        for step, rows in enumerate(order[: steps * size].split(size)):
            training.step(Batch(epoch, step, 0, zoo.train.row_B[rows], zoo.train.theta_BP[rows], size, 0))
    return training.autoencoder.eval(), time.process_time() - start


# -- tables ------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """One metric of a table: its key in a row, its heading, a factor and how many decimals."""

    key: str
    heading: str
    factor: float = 1.0
    decimals: int = 2


Tables = dict[str, tuple[Column, ...]]  # title -> columns


def percent(key: str, heading: str) -> Column:
    return Column(key, heading, 100, 1)


def summary(rows: Sequence[Row]) -> list[Row]:
    """A line a case: each number's `mean` and, over several seeds, `deviation`; what is no number as it is."""
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["case"]].append(row)
    lines = []
    for case, group in grouped.items():
        numbers = [key for key, value in group[0].items() if isinstance(value, float)]
        mean = {key: float(np.mean([row[key] for row in group])) for key in numbers}
        spread = {key: float(np.std([row[key] for row in group], ddof=1)) for key in numbers if len(group) > 1}
        lines.append({"case": case, "seeds": len(group), "mean": mean, "deviation": spread})
    return lines


def table(lines: Sequence[Row], columns: Sequence[Column], title: str) -> str:
    """Text of at most 80 columns; lines without any of these metrics are left out."""
    body = [[line["case"], *(_cell(line, column) for column in columns)] for line in lines]
    body = [cells for cells in body if any(cells[1:])]
    head = ["", *(column.heading for column in columns)]
    widths = [max(len(cells[i]) for cells in [head, *body]) for i in range(len(head))]
    text = [title]
    for cells in [head, *body]:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        text.append(" ".join([cells[0].ljust(widths[0]), *numbers]).rstrip())
    if max(map(len, text)) > WIDTH:
        raise ValueError(f"{title}: {max(map(len, text))} columns")
    return "\n".join(text)


def _cell(line: Row, column: Column) -> str:
    if column.key not in line["mean"]:
        return ""
    mean = f"{line['mean'][column.key] * column.factor:.{column.decimals}f}"
    if column.key not in line["deviation"]:
        return mean
    return f"{mean}±{line['deviation'][column.key] * column.factor:.{column.decimals}f}"


def _line(row: Row) -> str:
    return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
