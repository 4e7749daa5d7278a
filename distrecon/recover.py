"""python -m distrecon.recover: a black box's layer sizes and weights from its answers (Expand-and-Cluster)."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrecon import config as configuration
from distrecon import console, placing, recording
from distrecon.autoencoder.place import Place
from distrecon.errors import UserError, said
from distrecon.expand_cluster import Recovery, RecoveryConfig, network, recover_network, score, synthetic_teacher
from distrecon.expand_cluster.convolution.hypothesis import UNKNOWN, read_request
from distrecon.expand_cluster.convolution.network import Chain
from distrecon.expand_cluster.examination import OUTPUTS
from distrecon.expand_cluster.sources import Source, load_black_box
from distrecon.kinds.expand_cluster import KIND, picture_arrays
from distrecon.placing import Placer
from distrecon.record.artifacts import ARRAYS
from distrecon.record.folder import RunFolder

NETWORK = "recovered.safetensors"
ASKED = ("activation", "hidden_layers", "input_size", "data", "domain", "outputs", "max_rows", "retries")  # parameters

EXAMPLES = """examples:
  python -m distrecon.recover --smoke                                            a small built-in teacher
  python -m distrecon.recover --teacher net.safetensors --activation tanh
  python -m distrecon.recover --teacher my_module:my_network --input-size 16 --activation unknown
  python -m distrecon.recover --teacher conv.safetensors --input-size 1 8 8 --layers "conv3 linear" --activation tanh
  python -m distrecon.recover --teacher net.safetensors --autoencoder runs/20260101-120000-train

exit codes: 0 recovered and verified, 1 finished but not verified, 2 the request is wrong, 130 interrupted
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.recover",
        description="Recover a black box's layer sizes and weights from its answers alone (Expand-and-Cluster).",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--teacher", metavar="FILE|MODULE:CALLABLE", help="a file of dense layers (safetensors), or code"
    )
    parser.add_argument(
        "--activation", default="tanh", help="of the hidden layers; 'unknown' tries all (default: tanh)"
    )
    parser.add_argument("--hidden-layers", type=int, default=1, metavar="L", help="how many it has (default: 1)")
    parser.add_argument(
        "--layers",
        metavar="TEXT",
        help="of a convolutional network, such as 'conv3p1 pool2 conv3 linear'; 'unknown' tries the usual ones",
    )
    parser.add_argument(
        "--input-size", type=int, nargs="+", metavar="I", help="I, or C H W; needed for MODULE:CALLABLE and --layers"
    )
    parser.add_argument("--data", type=Path, metavar="FILE.npy", help="inputs of interest [Q, I]; verified there too")
    parser.add_argument(
        "--domain", type=float, nargs=2, metavar=("LOW", "HIGH"), help="no query leaves it (default: no limits)"
    )
    parser.add_argument(
        "--outputs", choices=OUTPUTS, default=OUTPUTS[0], help="what the answers are (default: %(default)s)"
    )
    parser.add_argument("--max-rows", type=int, metavar="Q", help="of one call (default: no limit)")
    parser.add_argument("--retries", type=int, default=0, help="of a call that raises, with growing waits (default: 0)")
    parser.add_argument("--answers", type=Path, metavar="FOLDER", help="keeps every answer; none is asked for twice")
    parser.add_argument("--students", type=int, metavar="N", help="a fixed number (default: as many as are needed)")
    parser.add_argument("--queries", type=int, metavar="Q", help="query budget (default: no limit)")
    parser.add_argument(
        "--autoencoder", metavar="RUN", help="place the recovered network among the models that it was trained on"
    )
    parser.add_argument("--zoo", help="their zoo (default: the run's)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted setting")
    parser.add_argument("--resume", metavar="RUN", help="continue an interrupted recovery, with the same options")
    console.common_options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    """Recovers, scores and records: models/recovered.safetensors, summary.json, report.html, stages/, MLflow."""
    torch.set_num_threads(1)  # many small matrices: more threads spin and lose
    args.seed = args.seed or 0
    config, source = _config(args), _source(args)
    size = source.input_size or _size(args)
    if size is None:
        raise UserError("--input-size is needed for a MODULE:CALLABLE teacher")
    data_QI = _data(args.data) if args.data else None
    if args.zoo and not args.autoencoder:
        raise UserError("--zoo is the zoo of --autoencoder RUN: name one")
    placer = Placer.of(args) if args.autoencoder else None
    folder, teacher = _folder(args), args.teacher or "smoke"
    found: list[Recovery] = []
    placed: list[str] = []  # lines

    def work(folder: RunFolder) -> recording.Result:
        stage = console.Progress("recover")
        recovery = recover_network(
            source.black_box,
            size,
            args.activation,
            args.hidden_layers,
            args.seed,
            data_QI,
            args.domain and tuple(args.domain),
            args.outputs,
            args.max_rows,
            args.retries,
            args.answers,
            layers=args.layers,
            config=config,
            progress=lambda part, value: stage.show(f"{part} {value:.3g}"),
            stages=folder.stages,
        )
        stage.done("verified" if recovery.verified else "not verified")
        known = source.weights if source.weights and len(source.weights) == len(recovery.weights) else None
        if known is not None:
            recovery = dataclasses.replace(recovery, metrics=recovery.metrics | score(recovery, known, data_QI))
        found.append(recovery)
        arrays, summary = picture_arrays(recovery, known), {}
        if placer is not None:
            place, reason = _place(placer, recovery)
            if place is not None:
                recovery.metrics |= placing.metrics(place)
                arrays |= placer.arrays(place)
            placed.extend([f"not placed   {reason}"] if place is None else placer.lines(place))
            summary["place"] = {"reason": reason} if place is None else placer.summary(place)
        summary |= _write(folder, config, args.seed, recovery, arrays)
        return recording.Result(recovery.metrics, {"teacher": teacher, **summary})

    try:
        outcome = recording.record(
            folder,
            "recover",
            KIND,
            "recover/output_rmse",
            "min",
            {"teacher": teacher},
            recording.Provenance(args.seed, args.smoke, configuration.parse_assignments(args.set)),
            work,
            resumable=True,
            settings={
                **{key: _plain(value) for key, value in vars(args).items() if key in ASKED and value is not None},
                **configuration.flatten(config),
            },
        )
    except KeyboardInterrupt:
        hint = f"continue with the same options and --resume {console.short(folder.path)}"
        raise KeyboardInterrupt(hint) from None
    (recovery,) = found
    text = "\n".join([recovery.report(), *placed]) + f"\n\nnetwork  {console.short(folder.models / NETWORK)}"
    code = console.DONE if recovery.verified else console.SOME_FAILED
    return recording.answer(outcome, args, "recover", text, code)


def _place(placer: Placer, recovery: Recovery) -> tuple[Place | None, str]:
    """The recovered network's place, or None with the reason: it has none, and the recovery stands without."""
    if not recovery.verified:
        return None, "the recovery is not verified"
    if recovery.odds is not None:
        return None, "answers that are probabilities leave open what all scores have in common"
    images = recovery.function.architecture() if isinstance(recovery.function, Chain) else None
    try:
        return placer.layers(recovery.weights, recovery.activation, images), ""
    except UserError as error:
        return None, str(error)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _write(
    folder: RunFolder, config: RecoveryConfig, seed: int, recovery: Recovery, arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Writes the network and the figures' arrays; returns the recovery's own keys of summary.json."""
    network = folder.models / NETWORK
    network.unlink(missing_ok=True)  # of an earlier start that broke off after it
    recovery.save(network)
    np.savez_compressed(folder.models / ARRAYS, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    return {
        "activation": recovery.activation,
        "verified": recovery.verified,
        "reason": recovery.reason,
        "findings": [str(finding) for finding in recovery.findings],
        "certificate": dataclasses.asdict(recovery.certificate) if recovery.certificate else None,
        "weights": f"models/{NETWORK}",
        "config": configuration.flatten(config),
        "seed": seed,
        "metrics": recovery.metrics,
        "seconds": recovery.seconds,
    }


def _config(args: argparse.Namespace) -> RecoveryConfig:
    values = configuration.parse_assignments(args.set)
    if args.students is not None:
        values["students.count"] = args.students
    if args.queries is not None:
        values["budget.queries"] = args.queries
    return configuration.replace(RecoveryConfig(), values, "--set")


def _source(args: argparse.Namespace) -> Source:
    if args.smoke:
        weights = synthetic_teacher(6, 4, "tanh", seed=args.seed)
        args.activation = "tanh"
        return Source(network(weights, "tanh"), 6, weights)
    if not args.teacher:
        raise UserError("--teacher FILE|MODULE:CALLABLE is needed (or --smoke)")
    if args.layers in (None, UNKNOWN) or Path(args.teacher).suffix != ".safetensors":
        return load_black_box(args.teacher, args.activation)
    _, (hypothesis,) = read_request(_size(args) or 0, args.layers)
    return load_black_box(args.teacher, args.activation, hypothesis)


def _size(args: argparse.Namespace) -> int | list[int] | None:
    """--input-size as one number, or as those of an image."""
    sizes = args.input_size
    return sizes[0] if sizes and len(sizes) == 1 else sizes


def _data(path: Path) -> torch.Tensor:
    if not path.exists():
        raise UserError(f"--data: {path} does not exist")
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).double()
    except (EOFError, OSError, TypeError, ValueError) as error:
        raise UserError(f"--data: {path} is not a .npy file of numbers ({said(error)})") from None


def _folder(args: argparse.Namespace) -> RunFolder:
    """A new run folder, or the interrupted recovery's."""
    if not args.resume:
        return RunFolder.create(args.out, "recover", {"teacher": args.teacher, "seed": args.seed})
    folder = RunFolder(Path(args.resume).absolute())
    if folder.summary.exists():
        raise UserError(f"--resume {args.resume}: this run is finished; see its summary.json, or choose another --out")
    if not folder.stages.is_dir():
        raise UserError(f"--resume {args.resume}: no interrupted recovery there")
    return folder


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
