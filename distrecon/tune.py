"""python -m distrecon.tune: sweeps on Ray Tune, recorded in MLflow; with no arguments the two digits sweeps."""

import argparse
import sys
from typing import Any

from distrecon import console, job, tables
from distrecon.config import parse_assignments

EXAMPLES = """examples:
  python -m distrecon.tune                                    both digits sweeps, minutes on two cores
  python -m distrecon.tune --smoke                            check an installation
  python -m distrecon.tune --space my_sweep.yaml --set optim.epochs=50
  python -m distrecon.tune --address auto --space tune_spaces/paper_losses.yaml --use-gpu
  python -m distrecon.tune --resume runs/20260101-120000-tune

exit codes: 0 done, 1 some trials failed, 2 the request is wrong, 130 interrupted (continue with --resume)
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distrecon.tune",
        description="Run sweeps side by side on one Ray session and record them in MLflow.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--space", nargs="+", metavar="FILE", help="space files (default: the two digits sweeps)")
    parser.add_argument("--address", help="join a Ray cluster: auto, or HOST:PORT (default: a local session)")
    parser.add_argument("--resume", metavar="RUN", help="continue an interrupted run, or record it in MLflow again")
    parser.add_argument(
        "--storage", metavar="URI", help="where zoos and trials lie; on a cluster s3://... or a shared disk"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted setting laid over every space's base"
    )
    parser.add_argument("--num-workers", type=int, help="data-parallel workers of each autoencoder trial (default: 1)")
    parser.add_argument("--use-gpu", action="store_true", help="autoencoder trials train on GPUs")
    console.common_options(parser)
    return parser


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The options that stand for dotted settings, and `--set`, which wins."""
    values: dict[str, Any] = {} if args.seed is None else {"seed": args.seed}
    if args.num_workers is not None:
        values["resources.num_workers"] = args.num_workers
    if args.use_gpu:
        values["resources.use_gpu"] = True
    return values | parse_assignments(args.set)


def run(args: argparse.Namespace) -> int:
    """Reads the request, runs it, prints the tables and where to look next."""
    if args.resume:
        folder, request = job.reopen(args.resume, args.address)
    else:
        request = job.Request(
            spaces=tuple(args.space or job.shipped_spaces()),
            overrides=overrides(args),
            seed=args.seed or 0,
            smoke=args.smoke,
            address=args.address,
            storage=args.storage,
        )
        folder = job.prepare(request, args.out, args.verbose)
    try:
        outcome = job.run(request, folder, args.verbose)
    except KeyboardInterrupt:
        print(f"\ndistrecon.tune: interrupted; continue with --resume {folder}", file=sys.stderr)
        return console.INTERRUPTED
    _print(outcome, request)
    return console.SOME_FAILED if outcome.failed or outcome.tracker.problem else console.DONE


def _print(outcome: job.Outcome, request: job.Request) -> None:
    """The tables, what failed, and where to look next."""
    for sweep in outcome.sweeps:
        print(f"\n{sweep.name} (* best by {sweep.metric})\n{tables.render(sweep)}")
        for trial in sweep.trials.values():
            if trial.error:
                print(f"failed: {tables.label(trial.config)}: {trial.error}")
    if request.smoke:
        print("\nA smoke run: every stage ran at its smallest, the numbers mean nothing.")
    tracker = outcome.tracker
    print(f"\nreport   {outcome.folder / 'report.html'}\nnumbers  {outcome.folder / 'summary.json'}")
    if tracker.problem:
        print(
            f"MLflow   NOT COMPLETE: {tracker.problem}\n         all metrics are in the run folder; send the rest with"
        )
        print(f"         python -m distrecon.tune --resume {outcome.folder}")
    elif tracker.uri.startswith("sqlite"):
        print(f"MLflow   mlflow ui --backend-store-uri {tracker.uri}")
    else:
        print(f"MLflow   {tracker.uri}")


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
