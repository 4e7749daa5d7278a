"""Recover classifiers of scikit-learn's digits, shallow or deep, with one setting for all.

    python benchmarks/recovery_digits.py                                         # 64-20-10, all eight activations
    python benchmarks/recovery_digits.py --hidden 15 15 --activations tanh g     # deep
    python benchmarks/recovery_digits.py --hidden 30 --activations tanh --seeds 5

Prints one line a teacher and the totals, and writes every number as JSON lines to --out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

from distrecon import config as configuration
from distrecon.expand_cluster import RecoveryConfig, network, recover, score, train_teacher
from distrecon.nets.activations import ACTIVATIONS

EXACT = 1e-9


def solve(hidden: tuple[int, ...], activation: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one teacher, recover it and score the recovery."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.data / 16.0), torch.from_numpy(digits.target)
    weights = train_teacher(images[:1000], labels[:1000], hidden, activation, seed)
    teacher = network(weights, activation)
    started, cpu = time.monotonic(), time.process_time()
    config = configuration.replace(RecoveryConfig(), settings)
    recovery = recover(teacher, images.shape[1], activation, len(hidden), seed, config, images)
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
        "stages": recovery.seconds,
        **recovery.metrics,
        **metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[20])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recovery setting")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery_digits.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings, rows = configuration.parse_assignments(arguments.set), []
    for activation in arguments.activations:
        for seed in range(arguments.seeds):
            row = solve(tuple(arguments.hidden), activation, seed, settings)
            rows.append(row)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{activation:<11} seed {seed}: {'exact' if row['exact'] else 'WRONG'} "
                f"{'verified' if row['verified'] else 'unverified'} found {row['recover/layer_sizes']} "
                f"distance {row['recover/max_cosine_distance']:.1e} agreement {row['recover/agreement']:.4f} "
                f"CPU {row['cpu_seconds']:.1f} s",
                flush=True,
            )
    times = torch.tensor([row["cpu_seconds"] for row in rows])
    wrong = sum(row["verified"] and not row["exact"] for row in rows)
    print(
        f"exact {sum(row['exact'] for row in rows)} of {len(rows)}; verified {sum(row['verified'] for row in rows)}, "
        f"of those wrong {wrong}; CPU seconds: median {times.median():.1f}, most {times.max():.1f}"
    )


if __name__ == "__main__":
    main()
