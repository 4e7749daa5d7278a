"""Recover a black box's layer sizes and weights from its answers (Expand-and-Cluster).

    python -m distrecon.recover --teacher teacher.safetensors --activation tanh
    python -m distrecon.recover --teacher my_module:my_network --input-size 16 --activation unknown
    python -m distrecon.recover --smoke

Exit 0: recovered and verified; 1: finished, but not verified; 2: the request is wrong.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrecon import config as configuration
from distrecon.console import Progress
from distrecon.errors import UserError
from distrecon.expand_cluster import Recovery, RecoveryConfig, network, recover, score, synthetic_teacher
from distrecon.expand_cluster.sources import Source, load_teacher


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.ArgumentParser(
        prog="python -m distrecon.recover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form.add_argument("--teacher", metavar="FILE|MODULE:CALLABLE", help="a .safetensors file of dense layers, or code")
    form.add_argument("--activation", default="tanh", help="of the hidden layers; 'unknown' tries all (default tanh)")
    form.add_argument("--hidden-layers", type=int, default=1, metavar="L")
    form.add_argument("--input-size", type=int, metavar="I", help="needed for MODULE:CALLABLE")
    form.add_argument("--data", type=Path, metavar="FILE.npy", help="inputs of interest [Q, I]; verified there too")
    form.add_argument("--students", type=int, metavar="N", help="a fixed number; default: as many as are needed")
    form.add_argument("--queries", type=int, metavar="Q", help="query budget; default: no limit")
    form.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of RecoveryConfig")
    form.add_argument("--seed", type=int, default=0)
    form.add_argument("--out", type=Path, metavar="RUN", help="run folder (default runs/<time>-recover)")
    form.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted recovery with its options")
    form.add_argument("--smoke", action="store_true", help="recover a small built-in teacher, in seconds")
    form.add_argument("--json", action="store_true", help="print summary.json instead of the report")
    return form


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)  # many small matrices: more threads spin and lose
    try:
        summary, recovery = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary, indent=1) if options.json else recovery.report())
    if not options.json:
        print(f"written to   {summary['out']}")
    return 0 if recovery.verified else 1


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Recovery]:
    """Recover, score and write the run folder: summary.json, models/recovered.safetensors, stages/."""
    config = _config(options)
    source = _source(options)
    size = source.input_size or options.input_size
    if size is None:
        raise UserError("--input-size is needed for a MODULE:CALLABLE teacher")
    data_QI = _data(options.data) if options.data else None
    folder, stage = _folder(options), Progress("recover")
    recovery = recover(
        source.teacher,
        size,
        options.activation,
        options.hidden_layers,
        options.seed,
        config,
        data_QI,
        progress=None if options.json else lambda part, value: stage.show(f"{part} {value:.3g}"),
        stages=folder / "stages",
    )
    if not options.json:
        stage.done("verified" if recovery.verified else "not verified")
    if source.weights is not None and len(source.weights) == len(recovery.weights):
        metrics = recovery.metrics | score(recovery, source.weights, data_QI)
        recovery = dataclasses.replace(recovery, metrics=metrics)
    (folder / "models").mkdir(exist_ok=True)
    recovery.save(folder / "models" / "recovered.safetensors")
    summary = {
        "out": str(folder),
        "teacher": options.teacher or "smoke",
        "activation": recovery.activation,
        "verified": recovery.verified,
        "reason": recovery.reason,
        "config": configuration.flatten(config),
        "seed": options.seed,
        "metrics": recovery.metrics,
        "seconds": recovery.seconds,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary, recovery


def _config(options: argparse.Namespace) -> RecoveryConfig:
    values = configuration.parse_assignments(options.set)
    if options.students is not None:
        values["students.count"] = options.students
    if options.queries is not None:
        values["budget.queries"] = options.queries
    return configuration.replace(RecoveryConfig(), values, "--set")


def _source(options: argparse.Namespace) -> Source:
    if options.smoke:
        weights = synthetic_teacher(6, 4, "tanh", seed=options.seed)
        options.activation = "tanh"
        return Source(network(weights, "tanh"), 6, weights)
    if not options.teacher:
        raise UserError("--teacher FILE|MODULE:CALLABLE is needed (or --smoke)")
    return load_teacher(options.teacher, options.activation)


def _data(path: Path) -> torch.Tensor:
    if not path.exists():
        raise UserError(f"--data: {path} does not exist")
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).double()
    except (ValueError, TypeError) as error:
        raise UserError(f"--data: {path} is not a .npy file of numbers: {error}") from None


def _folder(options: argparse.Namespace) -> Path:
    if options.resume:
        if not (options.resume / "stages").is_dir():
            raise UserError(f"--resume: {options.resume} holds no interrupted recovery")
        if (options.resume / "summary.json").exists():
            raise UserError(f"--resume: {options.resume} is finished already")
        return Path(options.resume)
    folder = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-recover"
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another --out, or --resume it")
    folder.mkdir(parents=True)
    return Path(folder)


if __name__ == "__main__":
    sys.exit(main())
