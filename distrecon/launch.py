"""What `tune` and `train` have in common: options, the request made of them, the job."""

import argparse
from typing import Any

from distrecon import console, job
from distrecon.config import parse_assignments
from distrecon.errors import UserError, WorkFailed
from distrecon.recording import answer


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a job."""
    parser.add_argument("--address", help="join a Ray cluster: auto, or HOST:PORT (default: a local session)")
    parser.add_argument("--resume", metavar="RUN", help="continue an interrupted run, or record it in MLflow again")
    parser.add_argument(
        "--storage", metavar="URI", help="where zoos and trials lie; on a cluster s3://... or a shared disk"
    )
    parser.add_argument("--images", metavar="DIR", help="where the images of the zoos lie that have them not inside")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted setting laid over the configuration"
    )
    parser.add_argument("--num-workers", type=int, help="data-parallel workers of each autoencoder (default: 1)")
    parser.add_argument("--use-gpu", action="store_true", help="autoencoders train on GPUs")
    console.module_option(parser)
    console.common_options(parser)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The options that stand for dotted settings, and `--set`, which wins."""
    values: dict[str, Any] = {} if args.seed is None else {"seed": args.seed}
    if args.num_workers is not None:
        values["resources.num_workers"] = args.num_workers
    if args.use_gpu:
        values["resources.use_gpu"] = True
    return values | parse_assignments(args.set)


def launch(args: argparse.Namespace, command: str, **what: Any) -> console.Answer:
    """Runs or resumes a job, a new one of `what` (the request's spaces or zoo); answers with its tables.

    A request that turns out to be wrong before the first trial leaves no folder.
    """
    if args.resume:
        folder, request = job.reopen(args.resume, command, args.address, tuple(args.module))
    else:
        request = job.Request(
            **what,
            overrides=overrides(args),
            seed=args.seed or 0,
            smoke=args.smoke,
            address=args.address,
            storage=args.storage,
            images=args.images,
            modules=tuple(args.module),
        )
        folder = job.prepare(request, args.out, command, args.verbose)
    try:
        with folder.locked():
            outcome = job.run(request, folder, args.verbose)
    except UserError:
        if not args.resume and not folder.begun:
            folder.remove()
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue with --resume {console.short(folder.path)}") from None
    except (WorkFailed, OSError) as error:
        hint = f"when that is mended, continue with --resume {console.short(folder.path)}"
        raise WorkFailed(f"{error}; {hint}") from error
    return answer(outcome, args, command)
