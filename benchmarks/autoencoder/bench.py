"""What the tables share: a zoo's splits, and autoencoders that are trained once and kept."""

import hashlib
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Cell, Column, Part, Row, Table
from benchmarks.zoos import small_zoo
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
from distrecon.errors import UserError
from distrecon.nets import initialise
from distrecon.zoos import open_zoo

Values = dict[str, Any]
RESIDUAL: Values = {"model.kind": "fisher_residual", "loss.beta": 0.1, "optim.epochs": 4}
QUICK: Values = {"model.latent": 2, "optim.epochs": 1, "data.query_pool": 128, "tasks.samples": 10}


class Bench:
    """The three splits and images of a zoo folder, and the autoencoders trained on it."""

    def __init__(self, args: Namespace) -> None:
        self.quick, self.folder = args.quick, args.rows.parent
        self.settings: Values = configuration.parse_assignments(args.set)
        self.finetune_epochs: int = args.finetune
        where = args.zoo
        if args.quick and where is None:
            where = self.folder / "small_zoo"
            if not (where / "zoo.json").exists():
                small_zoo(where)
        if where is None:
            raise UserError("--zoo: which zoo? (only --quick makes its own)")
        zoo = open_zoo(where)
        self.name, self.arch, self.images = f"{zoo.name}-{zoo.digest[:8]}", zoo.architecture, zoo.images()
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

    def autoencoder(self, values: Values, seed: int) -> tuple[Autoencoder, float]:
        """Trained with these settings, or read from the folder; and the CPU seconds that training took."""
        settings = {**self.settings, **values, **(QUICK if self.quick else {}), "seed": seed}
        key = hashlib.sha256(json.dumps([self.name, settings], sort_keys=True).encode()).hexdigest()[:12]
        place = self.folder / "autoencoders" / key
        if not (place / "training.json").exists():
            trained, seconds = train(self, settings)
            place.mkdir(parents=True, exist_ok=True)
            save_autoencoder(place, trained)
            (place / "training.json").write_text(json.dumps({"settings": settings, "cpu_seconds": seconds}))
        return load_autoencoder(place).eval(), json.loads((place / "training.json").read_text())["cpu_seconds"]


def train(zoo: Bench, values: Values) -> tuple[Autoencoder, float]:
    """One training in this process; the autoencoder and its CPU seconds."""
    config = configuration.replace(AutoencoderConfig(), values)
    size, count = config.optim.batch_size, len(zoo.train)
    steps = count // size
    start = time.process_time()
    sample = ZooSample(zoo.arch, zoo.train.theta_BP, zoo.images)
    training = Training(config, [sample], steps * config.epochs)
    for epoch in range(config.epochs):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * config.seed + epoch))
        for step, rows in enumerate(order[: steps * size].split(size)):
            training.step(Batch(epoch, step, 0, zoo.train.row_B[rows], zoo.train.theta_BP[rows], size, 0))
    return training.autoencoder.eval(), time.process_time() - start


OPTIONS: dict[str, dict[str, Any]] = {
    "--zoo": {"metavar": "FOLDER", "type": Path, "help": "the zoo; --quick makes a small one of its own"},
    "--seeds": {"type": int, "default": 3, "help": "(default: %(default)s)"},
    "--set": {
        "nargs": "+",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "settings of every autoencoder, under those of a row: optim.epochs=8 model.latent=64",
    },
    "--finetune": {"type": int, "default": 5, "help": "epochs of generated models, in losses (default: %(default)s)"},
}
Work = Callable[[Bench, str, int], list[Row]]  # of a case and a seed; each row may name a finer case


def part(
    cases: Mapping[str, Work],
    tables: Mapping[str, Sequence[Column]],
    finish: Callable[[Sequence[Row], Namespace], None] | None = None,
) -> Part:
    """Every case with every seed; means and deviations over the seeds in 80 columns."""

    def cells(args: Namespace) -> Iterator[Cell]:
        bench = Bench(args)
        for seed in range(1 if args.quick else args.seeds):
            for case, work in cases.items():
                where = {"zoo": bench.name, "case": case, "seed": seed}
                set_here = {"set": " ".join(args.set)} if args.set else {}
                yield Cell(where | set_here, partial(work, bench, case, seed))

    plain = [
        Table(tuple(columns), lambda row: row["case"], title=title, plain=True) for title, columns in tables.items()
    ]
    return Part(cells, tuple(plain), OPTIONS, finish=finish)
