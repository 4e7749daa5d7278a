"""Recover classifiers of scikit-learn's digits, shallow and deep, with one setting for all.

    python benchmarks/recovery_digits.py                                         # all suites, five teacher seeds each
    python benchmarks/recovery_digits.py --suites shallow
    python benchmarks/recovery_digits.py --hidden 15 15 --activations tanh g     # any other shape

Prints one line a teacher and a table, and writes every number as JSON lines to --out as it goes; teachers that are
there already are skipped, so that an interrupted run continues.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

from distrecon import config as configuration
from distrecon.expand_cluster import RecoveryConfig, network, recover_network, score, train_teacher
from distrecon.nets.activations import ACTIVATIONS

EXACT = 1e-9  # largest cosine distance of an exact recovery
SUITES: dict[str, list[tuple[tuple[int, ...], str]]] = {
    "shallow": [((20,), name) for name in ACTIVATIONS],
    "wide": [((30,), "tanh")],
    "deep": [*(((15, 15), name) for name in ("tanh", "leaky_relu", "relu", "g")), ((10, 10, 10), "tanh")],
}


def solve(hidden: tuple[int, ...], activation: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one teacher, recover it and score the recovery."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.data / 16.0), torch.from_numpy(digits.target)
    weights = train_teacher(images[:1000], labels[:1000], hidden, activation, seed)
    teacher = network(weights, activation)
    started, cpu = time.monotonic(), time.process_time()
    config = configuration.replace(RecoveryConfig(), settings)
    recovery = recover_network(teacher, images.shape[1], activation, len(hidden), seed, images, config=config)
    metrics = score(recovery, weights, images)
    return {
        "hidden": list(hidden),
        "activation": activation,
        "seed": seed,
        "teacher_accuracy": float((teacher(images[1000:]).argmax(1) == labels[1000:]).double().mean()),
        "exact": recovery.layer_sizes == list(hidden) and metrics["recover/max_cosine_distance"] < EXACT,
        "verified": recovery.verified,
        "reason": recovery.reason,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "load": os.getloadavg()[0],
        "stages": recovery.seconds,
        **recovery.metrics,
        **metrics,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a shape and activation, as Markdown, and the totals."""
    lines = [
        "| teacher | exact | verified | verified wrongly | largest distance of the exact | least agreement "
        "| CPU seconds: median, most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = list(dict.fromkeys((tuple(row["hidden"]), row["activation"]) for row in rows))
    for hidden, activation in kinds:
        of_kind = [row for row in rows if (tuple(row["hidden"]), row["activation"]) == (hidden, activation)]
        name = "-".join(str(size) for size in (64, *hidden, 10))
        lines.append(f"| {name} {activation} | {summary(of_kind)} |")
    return "\n".join([*lines, f"| all | {summary(rows)} |"])


def summary(rows: list[dict[str, Any]]) -> str:
    """The cells of one line of the table."""
    exact = [row for row in rows if row["exact"]]
    times = torch.tensor([row["cpu_seconds"] for row in rows])
    distance = max((row["recover/max_cosine_distance"] for row in exact), default=float("nan"))
    cells = [
        f"{len(exact)} of {len(rows)}",
        f"{sum(row['verified'] for row in rows)}",
        f"{sum(row['verified'] and not row['exact'] for row in rows)}",
        f"{distance:.0e}",
        f"{min(row['recover/agreement'] for row in rows):.4f}",
        f"{times.median():.1f}, {times.max():.1f}",
    ]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--hidden", type=int, nargs="+", help="one shape instead of the suites")
    parser.add_argument("--activations", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recovery setting")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery_digits.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = configuration.parse_assignments(arguments.set)
    kinds = [kind for suite in arguments.suites for kind in SUITES[suite]]
    if arguments.hidden:
        kinds = [(tuple(arguments.hidden), name) for name in arguments.activations or ACTIVATIONS]
    kinds = [kind for kind in kinds if not arguments.activations or kind[1] in arguments.activations]
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    known = {(tuple(row["hidden"]), row["activation"], row["seed"]): row for row in rows}
    rows = []
    for hidden, activation in kinds:
        for seed in range(arguments.seeds):
            row = known.get((hidden, activation, seed))
            if row is None:
                row = solve(hidden, activation, seed, settings)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(
                f"{hidden} {activation:<11} seed {seed}: {'exact' if row['exact'] else 'WRONG'} "
                f"{'verified' if row['verified'] else 'unverified'} found {row['recover/layer_sizes']} "
                f"distance {row['recover/max_cosine_distance']:.1e} agreement {row['recover/agreement']:.4f} "
                f"CPU {row['cpu_seconds']:.1f} s",
                flush=True,
            )
    print(table(rows))


if __name__ == "__main__":
    main()
