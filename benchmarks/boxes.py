"""Black boxes as people have them: what is answered, whether it is right, and what it costs.

    python -m benchmarks.boxes                       # all of benchmarks/black_boxes.py, each in a process of its own
    python -m benchmarks.boxes "relu 8-20-1" wine    # those whose names contain one of these
    python -m benchmarks.boxes --small

Rows are kept in --rows as JSON lines and not measured again; `--fresh` begins anew. An answer is judged against the
truth, output by output, near and far and round every bend, at queries of which the recovery knows nothing. *Verified
wrongly* is what was verified and is not so: answers inside the certificate's range that are off by more than it allows
to be missed, or neurons too many or too few. Exit code 1 if there is any.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.black_boxes import CASES, Case, Problem
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


def solve(case: Case) -> dict[str, Any]:
    """Recovers one black box and judges the answer, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = case.make()
    started, cpu = time.monotonic(), time.process_time()
    row: dict[str, Any] = {"name": case.name, "should": case.should, "verified": False, "right": False}
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


def as_should(should: str, row: dict[str, Any]) -> bool:
    """Whether the answer is what is due."""
    if should == "exact":
        return bool(row["verified"] and row["right"])
    if should == "unverified":
        return row["answer"] != "error" and not row.get("wrongly", False)
    return should in row["answer"] or should in row["said"]


def in_a_process(case: Case) -> dict[str, Any]:
    """One row, from a process that is ended after the case's time."""
    command = [sys.executable, "-m", "benchmarks.boxes", "--row", case.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=case.seconds, check=False)
    except subprocess.TimeoutExpired:
        said = f"nothing in {case.seconds} s"
        return {"name": case.name, "should": case.should, "answer": "none", "said": said, "as_should": False}
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["ended"])[-1]
        return {"name": case.name, "should": case.should, "answer": "broke off", "said": said, "as_should": False}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    numbers = ""
    if row.get("cpu_seconds") is not None:
        numbers = f"{row['cpu_seconds']:6.1f} s {row['queries'] or 0:8,} queries {row['gib']:4.2f} GiB"
    right = "VERIFIED WRONGLY" if row.get("wrongly") else ("right" if row.get("right") else "")
    mark = "ok" if row["as_should"] else "--"
    return f"{mark} {row['name']:<38} {row['answer']:<28} {right:<8} {numbers}  {row['said'][:80]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, and the totals."""
    lines = [
        "| black box | answer | right | as it should | CPU seconds | queries | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        numbers = ["", "", ""]
        if row.get("cpu_seconds") is not None:
            numbers = [f"{row['cpu_seconds']:.1f}", f"{row['queries'] or 0:,}", f"{row['gib']:.2f}"]
        cells = [row["name"], row["answer"], "yes" if row.get("right") else "", "yes" if row["as_should"] else "**no**"]
        lines.append("| " + " | ".join([*cells, *numbers]) + " |")
    wrongly = sum(bool(row.get("wrongly")) for row in rows)
    due = sum(row["as_should"] for row in rows)
    return "\n".join([*lines, "", f"{due} of {len(rows)} as they should be; **verified wrongly: {wrongly}**"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of the names of black boxes")
    parser.add_argument("--small", action="store_true", help="those that take seconds")
    parser.add_argument("--rows", type=Path, default=Path("runs/benchmarks/boxes.jsonl"))
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps(solve(next(case for case in CASES if case.name == args.row))))
        return 0
    chosen = [case for case in CASES if not args.names or any(name in case.name for name in args.names)]
    chosen = [case for case in chosen if case.small or not args.small]
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if args.rows.exists() and not args.fresh:
        known = {row["name"]: row for row in map(json.loads, args.rows.read_text().splitlines())}
    rows = []
    for case in chosen:
        row = known.get(case.name)
        if row is None:
            row = in_a_process(case)
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(line(row), flush=True)
    print("\n" + table(rows))
    return int(any(row.get("wrongly") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
