"""python -m distrecon: lists the commands; `distrecon COMMAND ...` runs one."""

import os
import runpy
import sys

from distrecon.errors import nearest

COMMANDS = {
    "tune": "sweeps on Ray Tune, recorded in MLflow; with no arguments the digits sweeps",
    "train": "one distributed autoencoder training, scored and recorded",
    "evaluate": "predict, reconstruct and generate with a trained autoencoder on any zoo",
    "generate": "new models from a trained autoencoder",
    "zoo": "train, import, describe, check, seal, compact and export model zoos",
    "status": "how far a run is, or what it came to",
    "recover": "recover a black box's layer sizes and weights from its answers",
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: distrecon COMMAND [options]   (or python -m distrecon.COMMAND)\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<10} {text}")
        print("\ndistrecon COMMAND --help tells a command's options")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"distrecon: error: unknown command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"distrecon.{name}", *arguments[1:]]
    sys.path.insert(0, os.getcwd())  # as with python -m: --teacher MODULE:CALLABLE may lie here
    runpy.run_module(f"distrecon.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
