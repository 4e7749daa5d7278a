"""Runs the benchmark suite and writes its table and JSON.

    python -m benchmarks [--quick] [--only NAME ...] [--out FILE.json] [--page docs/performance.md]

Each part runs in a process of its own, one after the other, with one thread. With `--page` the tables between the two
markers of that page are replaced; parts that were not run keep their tables, from the JSON file if it is there.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PARTS = {
    "behavioural": ("networks", "behavioural", "Behavioural loss, forward and backward"),
    "threads": ("networks", "threads", "Two threads"),
    "whole_step": ("steps", "whole_step", "A whole training step of the autoencoder"),
    "tokens": ("steps", "tokens", "Permutations and tokens"),
    "contrastive": ("steps", "contrastive", "Contrastive loss, forward and backward"),
    "zoo_training": ("networks", "zoo_training", "Zoo training"),
    "evaluation": ("networks", "evaluation", "Evaluation"),
    "students": ("recovery", "students", "Students"),
    "linkage": ("recovery", "linkage", "Clustering"),
    "ray": ("pipeline", "ray_costs", "Ray"),
    "growth": ("growth", "growth", "Growth of cost"),
    "gpu": ("gpu", "gpu", "GPU"),
}
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"))
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.part:
        args.out.write_text(json.dumps(run(args.part, args.quick)))
        return 0
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        found = in_process(name, args.quick)
        if found is None:
            failed.append(name)
            continue
        results[name] = found
        print(table(name, found), flush=True)
        args.out.write_text(json.dumps(results, indent=1))
    if args.page:
        replace_tables(args.page, results)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, quick: bool) -> dict[str, Any]:
    """The rows of one part as plain data."""
    import importlib

    import torch

    from benchmarks.suite.harness import machine

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, function, _ = PARTS[name]
    rows = getattr(importlib.import_module(f"benchmarks.suite.{module}"), function)(quick)
    return {"quick": quick, "machine": machine(), "rows": [row.to_dict() for row in rows]}


def in_process(name: str, quick: bool) -> dict[str, Any] | None:
    """The same, in a process of its own; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks", "--part", name, "--out", str(out)]
        done = subprocess.run([*command, "--quick"] if quick else command, check=False)
        return json.loads(out.read_text()) if done.returncode == 0 and out.exists() else None


def table(name: str, found: dict[str, Any]) -> str:
    """A Markdown table of one part."""
    lines = [f"### {PARTS[name][2]}", ""]
    if not found["rows"]:
        return "\n".join([*lines, "Not measured: no such device here.", ""])
    lines += ["| what | ours | baseline | ratio (least to most) | |", "| --- | ---: | ---: | ---: | --- |"]
    for row in found["rows"]:
        ratio = ""
        if row["ratio"] is not None:
            ratio = f"**{number(row['ratio'])}**"
            if row["low"] is not None:
                ratio += f" ({number(row['low'])} to {number(row['high'])})"
        baseline = "" if row["baseline_seconds"] is None else duration(row["baseline_seconds"])
        lines.append(f"| {row['what']} | {duration(row['ours_seconds'])} | {baseline} | {ratio} | {row['note']} |")
    size = "small sizes; " if found["quick"] else ""
    lines += ["", f"({size}{found['machine']['processor']}, torch {found['machine']['torch']})", ""]
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "not reached"
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def replace_tables(page: Path, results: dict[str, Any]) -> None:
    """Put all tables between the markers of the page."""
    text = page.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    tables = "\n".join(table(name, results[name]) for name in PARTS if name in results)
    page.write_text(f"{head}{BEGIN}\n\n{tables}\n{END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
