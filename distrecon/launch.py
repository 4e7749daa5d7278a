"""What `tune` and `train` have in common: options, the request made of them, the job, what is printed at its end."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from distrecon import console, job, runs, tables
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


def launch(args: argparse.Namespace, command: str, spaces: Sequence[str]) -> console.Answer:
    """Runs or resumes a job; answers with its tables and where to look next."""
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
        with runs.held(folder):
            outcome = job.run(request, folder, args.verbose)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with --resume {console.short(folder)}") from None
    except (WorkFailed, OSError) as error:
        hint = f"when that is mended, continue with --resume {console.short(folder)}"
        raise WorkFailed(f"{error}; {hint}") from error
    return answer(outcome, command, request.smoke)


def answer(outcome: job.Outcome, command: str, smoke: bool) -> console.Answer:
    """A finished job's exit code, the text to print, and its summary with the run's folder."""
    code = console.SOME_FAILED if outcome.failed or outcome.tracker.problem else console.DONE
    return console.Answer(
        code,
        "\n".join(lines(outcome, command, smoke)),
        {"folder": str(outcome.folder), **runs.read_summary(outcome.folder), "mlflow": outcome.tracker.uri},
    )


def lines(outcome: job.Outcome, command: str, smoke: bool) -> Iterator[str]:
    """The tables, what failed, and where to look next."""
    for sweep in outcome.sweeps:
        yield f"\n{sweep.name} (* best by {sweep.metric})\n{tables.render(sweep)}"
        for trial in sweep.trials.values():
            if trial.error:
                yield f"failed: {tables.label(trial.config)}: {trial.error}"
    if smoke:
        yield "\nA smoke run: every stage ran at its smallest, the numbers mean nothing."
    tracker, folder = outcome.tracker, console.short(outcome.folder)
    yield f"\nreport   {folder}/report.html\nnumbers  {folder}/summary.json"
    if tracker.problem:
        yield f"MLflow   NOT COMPLETE: {tracker.problem}\n         all metrics are in the run folder"
        if command in runs.RESUMABLE:
            yield f"         send the rest with python -m distrecon.{command} --resume {folder}"
    else:
        yield f"MLflow   {tracker.look}"
