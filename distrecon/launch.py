"""What `tune` and `train` have in common: options, the request made of them, the job, what is printed at its end."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from distrecon import console, job, tables
from distrecon.config import parse_assignments
from distrecon.errors import WorkFailed


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a job."""
    parser.add_argument("--address", help="join a Ray cluster: auto, or HOST:PORT (default: a local session)")
    parser.add_argument("--resume", metavar="RUN", help="continue an interrupted run, or record it in MLflow again")
    parser.add_argument(
        "--storage", metavar="URI", help="where zoos and trials lie; on a cluster s3://... or a shared disk"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted setting laid over the configuration"
    )
    parser.add_argument("--num-workers", type=int, help="data-parallel workers of each autoencoder (default: 1)")
    parser.add_argument("--use-gpu", action="store_true", help="autoencoders train on GPUs")
    console.common_options(parser)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The options that stand for dotted settings, and `--set`, which wins."""
    values: dict[str, Any] = {} if args.seed is None else {"seed": args.seed}
    if args.num_workers is not None:
        values["resources.num_workers"] = args.num_workers
    if args.use_gpu:
        values["resources.use_gpu"] = True
    return values | parse_assignments(args.set)


def launch(args: argparse.Namespace, command: str, spaces: Sequence[str]) -> int:
    """Runs or resumes a job, prints its tables and where to look next; returns the exit code."""
    if args.resume:
        folder, request = job.reopen(args.resume, command, args.address)
    else:
        request = job.Request(
            spaces=tuple(spaces),
            overrides=overrides(args),
            seed=args.seed or 0,
            smoke=args.smoke,
            address=args.address,
            storage=args.storage,
        )
        folder = job.prepare(request, args.out, command, args.verbose)
    try:
        outcome = job.run(request, folder, args.verbose)
    except KeyboardInterrupt:
        print(f"\ndistrecon.{command}: interrupted; continue with --resume {folder}", file=sys.stderr)
        return console.INTERRUPTED
    except (WorkFailed, OSError) as error:
        raise WorkFailed(f"{error}; when that is mended, continue with --resume {folder}") from error
    show(outcome, command, request.smoke)
    return console.SOME_FAILED if outcome.failed or outcome.tracker.problem else console.DONE


def show(outcome: job.Outcome, command: str, smoke: bool) -> None:
    """The tables, what failed, and where to look next."""
    for sweep in outcome.sweeps:
        print(f"\n{sweep.name} (* best by {sweep.metric})\n{tables.render(sweep)}")
        for trial in sweep.trials.values():
            if trial.error:
                print(f"failed: {tables.label(trial.config)}: {trial.error}")
    if smoke:
        print("\nA smoke run: every stage ran at its smallest, the numbers mean nothing.")
    tracker = outcome.tracker
    print(f"\nreport   {outcome.folder / 'report.html'}\nnumbers  {outcome.folder / 'summary.json'}")
    if tracker.problem:
        print(
            f"MLflow   NOT COMPLETE: {tracker.problem}\n         all metrics are in the run folder; send the rest with"
        )
        print(f"         python -m distrecon.{command} --resume {outcome.folder}")
    elif tracker.uri.startswith("sqlite"):
        print(f"MLflow   mlflow ui --backend-store-uri {tracker.uri}")
    else:
        print(f"MLflow   {tracker.uri}")
