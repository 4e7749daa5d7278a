"""python -m distrecon.tune: sweeps on Ray Tune, recorded in MLflow; with no arguments the digits sweeps."""

import argparse
import sys

from distrecon import console, job, launch

EXAMPLES = """examples:
  python -m distrecon.tune                                    the digits sweeps, minutes on two cores
  python -m distrecon.tune --smoke                            check an installation
  python -m distrecon.tune --space my_sweep.yaml --set optim.epochs=50
  python -m distrecon.tune --address auto --space paper_losses --use-gpu
  python -m distrecon.tune --resume runs/20260101-120000-tune

exit codes: 0 done, 1 some trials failed, 2 the request is wrong, 130 interrupted (continue with --resume)
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.tune",
        description="Run sweeps side by side on one Ray session and record them in MLflow.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--space",
        nargs="+",
        metavar="FILE",
        help="space files, or names of shipped ones (default: the digits sweeps)",
    )
    launch.options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    spaces = () if args.resume else args.space or job.DEFAULT_SPACES
    return launch.launch(args, "tune", spaces=tuple(map(job.space_file, spaces)))


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
