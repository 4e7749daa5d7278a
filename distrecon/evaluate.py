"""python -m distrecon.evaluate: the three tasks (predict, reconstruct, generate) of an autoencoder on any zoo.

Or, of one model, its place in the autoencoder's zoo.
"""

import argparse
import sys
import time

import numpy as np

from distrecon import config, console, placing, recording
from distrecon.autoencoder.scoring import check_memory, score, zoo_index
from distrecon.cluster import session
from distrecon.config import parse_assignments
from distrecon.errors import UserError
from distrecon.kinds.autoencoder import KIND, load_autoencoder
from distrecon.placing import Placer
from distrecon.record.artifacts import ARRAYS
from distrecon.record.folder import RunFolder, check_absent
from distrecon.zoos import open_zoo

EXAMPLES = """examples:
  python -m distrecon.evaluate --autoencoder runs/20260101-120000-train --zoo my_zoo
  python -m distrecon.evaluate --autoencoder runs/20260101-120000-tune --zoo my_zoo --set tasks.refine=10
  python -m distrecon.evaluate --autoencoder runs/20260101-120000-train --model model.safetensors
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.evaluate",
        description="Predict, reconstruct and generate on a zoo's held-out models with a trained autoencoder, or place "
        "one model in its zoo: properties predicted, nearest training models, novelty.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--autoencoder", required=True, metavar="RUN", help="a run folder, or an autoencoder's own")
    parser.add_argument("--zoo", help="the zoo's folder (with --model by default the run's)")
    parser.add_argument(
        "--model", metavar="FILE", help="place this state dict (.safetensors, .pt) in the zoo, in place of the tasks"
    )
    parser.add_argument("--images", metavar="DIR", help="where the zoo's images lie, if not in the zoo")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="settings, such as tasks.samples=50"
    )
    console.module_option(parser)
    console.common_options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    check_absent(args.out)
    if args.model:
        return _place(args)
    if not args.zoo:
        raise UserError("--zoo ZOO is needed, whose held-out models are judged (or --model FILE)")
    autoencoder, zoo = load_autoencoder(args.autoencoder), open_zoo(args.zoo, images=args.images, module=args.module)
    zoo_index(autoencoder, zoo)
    check_memory(zoo, session.memory())
    small = {"tasks.samples": 4, "tasks.pairs": 4} if args.smoke else {}
    changes = {**small, **({"seed": args.seed} if args.seed is not None else {}), **parse_assignments(args.set)}
    settings = config.replace(autoencoder.config, changes, "--set")
    progress = console.Progress("tasks")

    def show(stage: str, done: int, total: int) -> None:
        left = console.time_left(done / total, time.monotonic() - progress.start)
        progress.show(f"{stage} on {zoo.num_states} states of {zoo.name} ({done + 1} of {total}), {left}")

    def work(folder: RunFolder) -> recording.Result:
        metrics = score(autoencoder, zoo, settings, folder.models, show)
        progress.done(f"{zoo.num_states} states of {zoo.name}")
        return recording.Result(metrics)

    request = {"autoencoder": str(args.autoencoder), "zoo": str(args.zoo), "settings": changes, "seed": settings.seed}
    overrides = {"autoencoder": str(args.autoencoder), **changes}
    outcome = recording.record(
        RunFolder.create(args.out, "evaluate", request),
        "evaluate",
        KIND,
        KIND.objective,
        KIND.mode,
        {"zoo": [str(args.zoo)]},
        recording.Provenance(settings.seed, args.smoke, overrides, {str(args.zoo): zoo}),
        work,
    )
    return recording.answer(outcome, args, "evaluate")


def _place(args: argparse.Namespace) -> console.Answer:
    if args.set:
        raise UserError("--set is for the tasks on a zoo; placing a --model has no settings")
    placer = Placer.of(args)
    found = placer.file(args.model)

    def work(folder: RunFolder) -> recording.Result:
        arrays = placer.arrays(found)
        np.savez_compressed(folder.models / ARRAYS, allow_pickle=False, **arrays)  # type: ignore[arg-type]
        return recording.Result(placing.metrics(found), {"model": args.model, "place": placer.summary(found)})

    request = {"autoencoder": args.autoencoder, "zoo": str(placer.zoo.store), "model": args.model}
    outcome = recording.record(
        RunFolder.create(args.out, "evaluate", request),
        "evaluate",
        KIND,
        "place/novelty",
        "min",
        {"model": args.model},
        recording.Provenance(placer.autoencoder.config.seed, args.smoke, request, {str(placer.zoo.store): placer.zoo}),
        work,
    )
    return recording.answer(outcome, args, "evaluate", "\n".join(placer.lines(found)))


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
