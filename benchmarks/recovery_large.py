"""Recover 784-30-10 classifiers from safetensors files by the command, with its time and peak memory.

    python benchmarks/recovery_large.py [--activations tanh g] [--seeds 1]

The images are scikit-learn's digits, enlarged to 28 x 28. Each recovery is a process of its own, `python -m
distrecon.recover`; memory is that process's largest resident set. Prints a table and writes JSON lines to --out as it
goes; teachers that are there already are skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from distrecon.expand_cluster import train_teacher

SIZE, HIDDEN = 28, 30
EXACT = 1e-9


def solve(activation: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train a teacher, write it to disk, recover it from the file."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16.0)[:, None]
    images_QI = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False).flatten(1)
    weights = train_teacher(images_QI[:1000], torch.from_numpy(digits.target)[:1000], (HIDDEN,), activation, seed)
    tensors = {}
    for i, (w, b) in enumerate(weights):
        tensors[f"layer{i}.weight"], tensors[f"layer{i}.bias"] = w.contiguous(), b.contiguous()
    save_file(tensors, folder / "teacher.safetensors")
    np.save(folder / "images.npy", images_QI[1000:].numpy())
    command = [sys.executable, "-m", "distrecon.recover", "--teacher", str(folder / "teacher.safetensors")]
    command += ["--activation", activation, "--data", str(folder / "images.npy"), "--seed", str(seed), "--json"]
    started = time.monotonic()
    with (folder / "summary.json").open("wb") as out:
        child = subprocess.Popen([*command, "--out", str(folder / "run")], stdout=out)
        _, _, usage = os.wait4(child.pid, 0)
    metrics = json.loads((folder / "summary.json").read_text())
    found = metrics["metrics"]
    return {
        "activation": activation,
        "seed": seed,
        "found": found["recover/layer_sizes"],
        "exact": found["recover/layer_sizes"] == [HIDDEN] and found["recover/max_cosine_distance"] < EXACT,
        "verified": metrics["verified"],
        "reason": metrics["reason"],
        "max_cosine_distance": found["recover/max_cosine_distance"],
        "agreement": found["recover/agreement"],
        "queries": found["recover/queries"],
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss / 2**20,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", nargs="+", default=["tanh", "g"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/recovery_large.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    known = {(row["activation"], row["seed"]): row for row in rows}
    print("| teacher | found | verdict | largest distance | agreement | CPU seconds | peak GiB | queries |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for activation in arguments.activations:
        for seed in range(arguments.seeds):
            row = known.get((activation, seed))
            if row is None:
                with tempfile.TemporaryDirectory() as folder:
                    row = solve(activation, seed, Path(folder))
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            verdict = ("exact, " if row["exact"] else "") + ("verified" if row["verified"] else "unverified")
            print(
                f"| 784-30-10 {activation} {seed} | {row['found'][0]} | {verdict} | {row['max_cosine_distance']:.0e} "
                f"| {row['agreement']:.4f} | {row['cpu_seconds']:.1f} | {row['peak_gib']:.2f} | {row['queries']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
