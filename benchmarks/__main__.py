"""Runs the benchmark suite and writes its table and JSON.

    python -m benchmarks [--quick] [--only NAME ...] [--device cuda] [--out FILE.json] [--page docs/performance.md]

Each part runs in a process of its own, one after the other, with one thread. With `--page` the tables between the two
markers of that page are replaced; parts that are not in the JSON file keep their tables. With
`--device cuda` ours and the baselines run on the GPU, in the parts where that means something; their tables are further
ones, after those of the CPU.
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
    "default_run": ("pipeline", "default_run", "The default run"),
    "growth": ("growth", "growth", "Growth of cost"),
    "gpu": ("gpu", "gpu", "GPU"),
}
ON_GPU = ("behavioural", "whole_step", "tokens", "contrastive", "zoo_training", "evaluation")  # "gpu" itself besides
HEADING, ON_GPU_TITLE, SUFFIX = "### ", ", on a GPU", ", cuda"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"))
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    if args.part:
        args.out.write_text(json.dumps(run(args.part, args.quick, args.device)))
        return 0
    allowed = [name for name in PARTS if args.device == "cpu" or name in (*ON_GPU, "gpu")]
    names = args.only or allowed
    if not set(names) <= set(allowed):
        parser.error(f"--device {args.device} measures {', '.join(allowed)}")
    if args.device == "cuda" and not gpu_here():
        parser.error("--device cuda: no such device here")
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        found = in_process(name, args.quick, args.device)
        if found is None:
            failed.append(name)
            continue
        results[key(name, args.device)] = found
        print(table(name, found), flush=True)
        args.out.write_text(json.dumps(results, indent=1))
    if args.page:
        replace_tables(args.page, results)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def gpu_here() -> bool:
    import torch

    return torch.cuda.is_available()


def key(name: str, device: str) -> str:
    """Of a part's results in the JSON file."""
    return name + SUFFIX if device == "cuda" and name in ON_GPU else name


def run(name: str, quick: bool, device: str) -> dict[str, Any]:
    """The rows of one part as plain data."""
    import importlib

    import torch

    from benchmarks.suite.harness import machine

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, function, _ = PARTS[name]
    measure, where = getattr(importlib.import_module(f"benchmarks.suite.{module}"), function), torch.device(device)
    rows = measure(quick, where) if name in ON_GPU else measure(quick)
    on = torch.device("cuda" if name == "gpu" and rows else device)
    return {"quick": quick, "device": on.type, "machine": machine(on), "rows": [row.to_dict() for row in rows]}


def in_process(name: str, quick: bool, device: str) -> dict[str, Any] | None:
    """The same, in a process of its own; None if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks", "--part", name, "--device", device, "--out", str(out)]
        done = subprocess.run([*command, "--quick"] if quick else command, check=False)
        return json.loads(out.read_text()) if done.returncode == 0 and out.exists() else None


def table(name: str, found: dict[str, Any]) -> str:
    """A Markdown table of one part."""
    on = ON_GPU_TITLE if found["device"] == "cuda" and name in ON_GPU else ""
    lines = [f"{HEADING}{PARTS[name][2]}{on}", ""]
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
    """Put the tables of these results between the markers of the page; what else stands there stays."""
    head, rest = page.read_text().split(BEGIN)
    old, tail = rest.split(END)
    tables = {text.splitlines()[0]: f"{HEADING}{text.strip()}\n" for text in old.split(HEADING)[1:]}
    new = [table(name.removesuffix(SUFFIX), found) for name, found in results.items()]
    tables |= {text.removeprefix(HEADING).splitlines()[0]: text for text in new}
    titles = [title for _, _, title in PARTS.values()]
    order = [*titles, *(title + ON_GPU_TITLE for title in titles)]
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(tables[t] for t in order if t in tables) + f"\n{END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
