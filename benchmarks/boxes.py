"""Black boxes as people have them: what is answered, whether it is right, and what it costs.

    python -m benchmarks boxes                              # all of benchmarks/box_cases.py
    python -m benchmarks boxes --only "relu 8-20-1" wine    # those whose names contain one of these
    python -m benchmarks boxes --quick                      # those that take seconds

Each is recovered in a process of its own, within a time. An answer is judged against the truth, output by output,
near and far and round every bend, at queries of which the recovery knows nothing. *Verified wrongly* is what was
verified and is not so: answers inside the certificate's range that are off by more than it allows to be missed, or
neurons too many or too few.
"""

import json
import math
import resource
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.black_boxes import Problem
from benchmarks.box_cases import CASES, Case
from benchmarks.harness import Cell, Column, Part, Row, Table, extremes
from distrecon.errors import UserError
from distrecon.expand_cluster import Recovery, recover_network

FAR = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
QUERIES = 400  # at each of these scales, and round each hyperplane
LEAST_PROBABILITY = 1e-8  # smaller ones are not compared by their logarithms


def judge(problem: Problem, result: Recovery) -> dict[str, Any]:
    """Whether a result is right: of the right sizes, and with the truth's answers everywhere, output by output.

    `off` [O] is the largest difference, relative to the output's standard deviation or, where it is larger, the answer.
    `off_inside` counts only queries in the range that the result's certificate names (all without one).
    """
    if problem.truth is None:
        return {"right": False, "off": None, "off_inside": None}
    x_QI = _judging(problem, len(result.weights[0][0][0]))
    truth_QO, found_QO = _comparable(problem.truth(x_QI)), _comparable(result(x_QI))
    if truth_QO.shape != found_QO.shape:
        return {"right": False, "off": None, "off_inside": None}
    spread_O = truth_QO[QUERIES : 2 * QUERIES].std(0).clamp(min=1e-300)
    off_QO = (found_QO - truth_QO).abs() / torch.maximum(spread_O, truth_QO.abs())
    off_QO = off_QO.nan_to_num(math.inf)
    inside_Q = _inside(result, x_QI)
    sized = problem.sizes is None or result.layer_sizes == problem.sizes
    right = bool(sized and (off_QO <= problem.tolerance).all())
    off_inside = float(off_QO[inside_Q].max()) if inside_Q.any() else 0.0
    return {"right": right, "off": float(off_QO.max()), "off_inside": off_inside}


def _judging(problem: Problem, inputs: int) -> Tensor:
    """Queries near and far, and round every bend of the truth; inside the domain, if there is one."""
    generator = torch.Generator().manual_seed(12345)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, inputs, generator=generator, dtype=torch.float64)

    parts = [problem.centre + problem.scale * factor * normal(QUERIES) for factor in FAR]
    if problem.bends is not None:
        w_HI, b_H = problem.bends
        w_HI, b_H = w_HI.double(), b_H.double()
        standard_HI = w_HI * problem.scale
        for w_I, b, s_I in zip(w_HI, b_H, standard_HI, strict=True):
            u_QI = normal(max(20, QUERIES // len(w_HI)))
            x_QI = problem.centre + problem.scale * u_QI
            miss_Q = x_QI @ w_I + b
            across_QI = u_QI @ s_I / s_I.norm().clamp(min=1e-300)  # from -1 to 1 deviations across the bend
            shift_Q = (across_QI * s_I.norm() - miss_Q) / s_I.square().sum().clamp(min=1e-300)
            parts.append(x_QI + problem.scale * shift_Q[:, None] * s_I)
    x_QI = torch.cat(parts)
    if problem.domain is not None:
        low, high = problem.domain
        x_QI = high - ((x_QI - low) % (2 * (high - low)) - (high - low)).abs()
    return x_QI


def _comparable(y_QO: Any) -> Tensor:
    """Answers as float64; probabilities as logarithms, down to LEAST_PROBABILITY."""
    y_QO = torch.as_tensor(y_QO).double()
    y_QO = y_QO[:, None] if y_QO.ndim == 1 else y_QO
    if y_QO.shape[1] > 1 and bool(((y_QO >= 0) & (y_QO <= 1)).all() and ((y_QO.sum(1) - 1).abs() < 1e-3).all()):
        return y_QO.clamp(min=LEAST_PROBABILITY).log()
    return y_QO


def _inside(result: Recovery, x_QI: Tensor) -> Tensor:
    """Which queries lie in the range of the result's certificate."""
    certificate = getattr(result, "certificate", None)
    if certificate is None:
        return torch.ones(len(x_QI), dtype=torch.bool)
    lowest_I, highest_I = (torch.as_tensor(v, dtype=torch.float64) for v in (certificate.lowest, certificate.highest))
    return ((x_QI >= lowest_I) & (x_QI <= highest_I)).all(1)


def _seen(result: Recovery, problem: Problem) -> float:
    """The contribution, relative, below which the certificate says that something may be missing."""
    certificate = getattr(result, "certificate", None)
    if certificate is None:
        return 0.0
    return max(s / d for s, d in zip(certificate.smallest_seen, certificate.spread, strict=True) if d > 0)


def solve(case: Case) -> Row:
    """Recovers one black box and judges the answer, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = case.make()
    started, cpu = time.monotonic(), time.process_time()
    row: Row = {"verified": False, "right": False, "wrongly": False}
    try:
        result = recover_network(problem.black_box, problem.inputs, **problem.arguments)
    except UserError as error:
        row |= {"answer": "error", "said": str(error), "queries": None}
    else:
        judged = judge(problem, result)
        stopped = next((found.name for found in result.findings if found.stops), None)
        row |= {
            "answer": "verified" if result.verified else (f"named: {stopped}" if stopped else "unverified"),
            "verified": result.verified,
            "said": result.reason,
            "found": result.layer_sizes,
            "findings": [found.name for found in result.findings],
            "queries": result.metrics["recover/queries"],
            **judged,
        }
        missed = judged["off_inside"] is None or judged["off_inside"] > max(
            10 * _seen(result, problem), problem.tolerance
        )
        sized = problem.sizes is None or result.layer_sizes == problem.sizes or _seen(result, problem) > 0
        row["wrongly"] = bool(result.verified and (missed or not sized))
    row["cpu_seconds"], row["seconds"] = time.process_time() - cpu, time.monotonic() - started
    row["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row["note"] = problem.after()
    return row | {"as_should": as_should(case.should, row)}


def as_should(should: str, row: Row) -> bool:
    """Whether the answer is what is due."""
    if should == "exact":
        return bool(row["verified"] and row["right"])
    if should == "unverified":
        return row["answer"] != "error" and not row["wrongly"]
    return should in row["answer"] or should in row["said"]


def in_a_process(case: Case) -> list[Row]:
    """One row, from a process that is ended after the case's processor time (or, if it waits, ten times that)."""
    command = [sys.executable, "-m", "benchmarks.boxes", case.name]
    row: Row = {"verified": False, "right": False, "as_should": False, "wrongly": False}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * case.seconds, check=False)
    except subprocess.TimeoutExpired:
        return [row | {"answer": "none", "said": f"nothing in {10 * case.seconds} s"}]
    if done.returncode == -signal.SIGXCPU:
        return [row | {"answer": "none", "said": f"nothing in {case.seconds} CPU seconds"}]
    if done.returncode:
        return [row | {"answer": "broke off", "said": (done.stderr.strip().splitlines() or ["ended"])[-1]}]
    return [row | json.loads(done.stdout.splitlines()[-1])]


def cells(args: Namespace) -> Iterator[Cell]:
    """One black box a cell."""
    for case in CASES:
        if case.small or not args.quick:
            yield Cell({"box": case.name, "should": case.should}, partial(in_a_process, case))


def count(heading: str, key: str) -> Column:
    """How many rows of a line, where there are several; yes or nothing of one."""
    return Column(heading, lambda rows: str(sum(row[key] for row in rows)) if len(rows) > 1 else "yes" * rows[0][key])


TABLE = Table(
    (
        Column("answer", lambda rows: rows[0]["answer"] if len(rows) == 1 else "", True),
        count("right", "right"),
        count("as it should be", "as_should"),
        count("verified wrongly", "wrongly"),
        extremes("CPU seconds", "cpu_seconds", "{:.1f}".format, max),
        extremes("queries", "queries", "{:,}".format, max),
        extremes("peak GiB", "gib", "{:.2f}".format, max),
    ),
    by=lambda row: str(row["box"]),
    heading="black box",
    total=True,
)
PARTS = {"boxes": Part(cells, (TABLE,))}


if __name__ == "__main__":
    chosen = next(case for case in CASES if case.name == sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (chosen.seconds, chosen.seconds + 10))
    print(json.dumps(solve(chosen)))
