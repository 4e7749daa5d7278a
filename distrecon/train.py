"""python -m distrecon.train: one distributed autoencoder training, scored and recorded; a sweep of a single trial."""

import argparse
import sys

from distrecon import console, job, launch

EXAMPLES = """examples:
  python -m distrecon.train                                   on the digits zoo, trained first if it is not there
  python -m distrecon.train --zoo my_zoo                      the recommended coder, fitted
  python -m distrecon.train --zoo my_zoo --set optim.epochs=50 --set loss.terms=C+S+B          the transformer, trained
  python -m distrecon.train --zoo svhn cifar --num-workers 4 --use-gpu --address auto
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.train",
        description="Train one weight autoencoder on one or several zoos, score it, record it in MLflow. "
        "Where no setting says how to train, it is the recommended coder, which is fitted.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--zoo",
        nargs="+",
        default=["digits"],
        help="zoo folders, or shipped zoos: digits, digits_paper (default: digits)",
    )
    launch.options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    zoos = ["smoke"] if args.smoke and args.zoo == ["digits"] else args.zoo
    coder = {} if args.resume else job.recommended(zoos, launch.overrides(args), args.smoke)
    return launch.launch(args, "train", zoo=tuple(zoos), coder=coder)


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
