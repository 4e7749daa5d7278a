"""The part of the suite: kernels, synchronisations, copies and memory, each case in a process of its own."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.fake_gpu import guard
from benchmarks.harness import Cell, Column, Part, Row, Table

CASES = ("step float32", "step tf32", "step bf16", "zoo training", "evaluation", "scoring")
NONE = "not counted: needs a C++ compiler (g++, or CXX)"


def counted(case: str) -> list[Row]:
    """The rows of one case of `counts.py`, or one row that says why there are none."""
    if guard.compiler() is None:
        return [{"what": case, "note": NONE}]
    command = [sys.executable, "-m", "benchmarks.fake_gpu.counts", case]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return [{"what": f"{case}: {when}", **counts} for when, counts in json.loads(done.stdout)[case].items()]


def cells(args: Namespace) -> Iterator[Cell]:
    for case in CASES[:1] if args.quick else CASES:
        yield Cell({"case": case}, partial(counted, case))


def _number(name: str, digits: int = 0) -> Column:
    def cell(rows: Sequence[Row]) -> str:
        return f"{rows[0][name]:,.{digits}f}" if name in rows[0] else rows[0]["note"] if name == "kernels" else ""

    return Column(name.replace("_gib", ", GiB"), cell)


COLUMNS = (*map(_number, ("kernels", "synchronisations", "copies")), _number("peak_gib", 2), _number("written_gib", 1))
PARTS = {"fake_gpu": Part(cells, (Table(COLUMNS, lambda row: row["what"], "what"),), kept=False)}
