"""The synthetic problems of Expand-and-Cluster: 5 input sizes x 3 widths x seeds, recovered with one setting for all.

    python benchmarks/recovery_synthetic.py                                  # the 150 problems with activation g
    python benchmarks/recovery_synthetic.py --activation tanh --seeds 5
    python benchmarks/recovery_synthetic.py --ray                            # the same over a Ray cluster
    python -m distrecon.tune --space tune_spaces/synthetic_problems.yaml     # the same as a Ray Tune sweep

Prints one line a problem and a map of exact recoveries by inputs d and width r; writes every number as JSON lines to
--out as it goes, and skips the problems that are there already, so that an interrupted run continues.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distrecon import config as configuration
from distrecon.expand_cluster import RecoveryConfig, network, recover_network, score
from distrecon.expand_cluster.teachers import synthetic_problem

INPUTS, WIDTHS = (2, 4, 8, 16, 32), (2, 4, 8)
EXACT = 1e-6  # largest cosine distance of an exact recovery


def solve(activation: str, inputs: int, width: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Recover one problem and score it against its teacher."""
    torch.set_num_threads(1)
    weights = synthetic_problem(inputs, width, activation, seed)
    started, cpu = time.monotonic(), time.process_time()
    config = configuration.replace(RecoveryConfig(), settings)
    recovery = recover_network(network(weights, activation), inputs, activation, seed=seed, config=config)
    metrics = score(recovery, weights)
    exact = recovery.layer_sizes == [width] and metrics["recover/max_cosine_distance"] < EXACT
    return {
        "activation": activation,
        "inputs": inputs,
        "width": width,
        "seed": seed,
        "found": recovery.layer_sizes,
        "exact": exact,
        "verified": recovery.verified,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "queries": recovery.metrics["recover/queries"],
        "students": recovery.metrics["recover/students"],
        "max_cosine_distance": metrics["recover/max_cosine_distance"],
        "reason": recovery.reason,
    }


def results(problems: list[tuple[Any, ...]], use_ray: bool) -> Iterator[dict[str, Any]]:
    """One result a problem, in order when serial, as they finish with Ray."""
    if not use_ray:
        yield from (solve(*problem) for problem in problems)
        return
    import ray

    ray.init(ignore_reinit_error=True)
    waiting = [ray.remote(solve).remote(*problem) for problem in problems]
    while waiting:
        (done,), waiting = ray.wait(waiting)
        yield ray.get(done)


def table(rows: list[dict[str, Any]]) -> str:
    """Exact recoveries by inputs and width, and the totals."""
    lines = ["exact of all   " + "".join(f"r={width:<9}" for width in WIDTHS)]
    for inputs in INPUTS:
        cells = []
        for width in WIDTHS:
            cell = [row for row in rows if (row["inputs"], row["width"]) == (inputs, width)]
            cells.append(f"{sum(row['exact'] for row in cell)}/{len(cell):<9}")
        lines.append(f"d={inputs:<12} " + "".join(cells))
    times = torch.tensor([row["cpu_seconds"] for row in rows])
    wrong = sum(row["verified"] and not row["exact"] for row in rows)
    lines.append(
        f"exact {sum(row['exact'] for row in rows)} of {len(rows)}; verified {sum(row['verified'] for row in rows)}, "
        f"of those wrong {wrong}; CPU seconds: median {times.median():.1f}, most {times.max():.1f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", default="g")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--inputs", type=int, nargs="+", default=INPUTS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--out", type=Path, default=Path("runs/recovery_synthetic.jsonl"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recovery setting")
    parser.add_argument("--ray", action="store_true")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    rows = [row for row in rows if row["activation"] == arguments.activation]
    known = {(row["inputs"], row["width"], row["seed"]) for row in rows}
    settings = configuration.parse_assignments(arguments.set)
    problems = [
        (arguments.activation, inputs, width, seed, settings)
        for seed in range(arguments.seeds)
        for inputs in arguments.inputs
        for width in arguments.widths
        if (inputs, width, seed) not in known
    ]
    for row in results(problems, arguments.ray):
        rows.append(row)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        verdict = ("exact" if row["exact"] else "WRONG") + (" verified" if row["verified"] else " unverified")
        print(
            f"{row['activation']} d={row['inputs']:<3} r={row['width']:<2} seed {row['seed']}: {verdict:<17} "
            f"found {row['found']} distance {row['max_cosine_distance']:.1e} CPU {row['cpu_seconds']:.1f} s",
            flush=True,
        )
    print(table(rows))


if __name__ == "__main__":
    main()
