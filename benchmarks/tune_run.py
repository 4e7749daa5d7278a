"""Wall time, stage by stage, and peak memory of all processes of `python -m distrecon.tune`.

Memory is the sum over the command and all its descendants, Ray's processes among them, of their proportional set size
(PSS: shared pages are counted once), sampled twice a second. Outside work is the wall time in which no zoo is made, no
autoencoder trained or scored and no network recovered: those times are the trials' own, read from the journals.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Row, speed, timing

WORK = ("time/seconds", "time/scoring_seconds")  # metrics that say how long their trial had worked when they came
UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}
NAMES = {"start": "imports, checks, Ray's start", "end": "the tables, Ray's end"}


def default_run(args: Namespace) -> list[Row]:
    """The command in an empty folder, or in `--folder`, stage by stage, and its wall time outside work."""
    options = [*(["--smoke"] if args.quick else []), *args.options]
    with tempfile.TemporaryDirectory() as empty:
        figures = run(options, args.folder or Path(empty))
    if figures["rc"]:
        raise RuntimeError(f"distrecon.tune ended with {figures['rc']}")
    return rows(figures)


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of what `run` found."""
    at_once, outside, peak = figures["trials_at_once"], figures["outside_share"], figures["peak_gib"]
    notes = {"sweeps": f"training, scoring or recovering {at_once:.1f} trials at once"}
    numbers = {"sweeps": {"trials_at_once": at_once}}
    return [
        *(
            timing(f"stage: {NAMES.get(stage, stage)}", seconds, note=notes.get(stage, ""), **numbers.get(stage, {}))
            for stage, seconds in figures["stages"].items()
        ),
        timing("the whole default run", figures["seconds"], note=f"{peak:.1f} GiB at most", peak_gib=peak),
        timing(
            "of it, outside zoo, training, recovery and scoring", figures["outside_seconds"],
            note=f"{100 * outside:.0f} % of the wall time", share=outside,
        ),
    ]  # fmt: skip


def run(options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs the command in `folder` and prints what it prints. Seconds by stage, and outside work; peak GiB; its rc."""
    start = time.monotonic()
    command, pipe = [sys.executable, "-m", "distrecon.tune", *options], subprocess.PIPE
    process = subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, cwd=folder)
    assert process.stderr
    assert process.stdout
    peak = {"bytes": 0}
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    marks = []
    for line in process.stderr:
        marks.append((time.monotonic() - start, line.rstrip()))
        print(f"{marks[-1][0]:7.1f} s  {line}", end="", flush=True)
    printed = process.stdout.read()
    process.wait()
    seconds = time.monotonic() - start
    watcher.join()
    print(printed)
    figures = {"rc": process.returncode, "seconds": seconds, "peak_gib": peak["bytes"] / 2**30}
    return figures | (stages(marks, seconds, folder) if process.returncode == 0 else {})


def stages(marks: Sequence[tuple[float, str]], seconds: float, folder: Path) -> dict[str, Any]:
    """Seconds of each stage, from the lines that end them, and of what is outside work."""
    stages, last, run = {"start": 0.0}, 0.0, folder
    for end, line in marks:
        found = re.fullmatch(r"(\w+) +(.*) \(([^()]*)\)", line)
        if found and "left" not in found[3]:
            parts = found[3].split()
            took = sum(float(n) * UNITS[unit] for n, unit in zip(parts[::2], parts[1::2], strict=True))
            stages["start"] += end - took - last
            stages[found[1]] = stages.get(found[1], 0.0) + took
            last = end
            if found[1] == "report":
                run = folder / Path(found[2]).parent
    stages["end"] = seconds - last
    spans = _work(run)
    working = stages.get("zoo", 0.0) + union(spans)
    return {
        "stages": stages,
        "outside_seconds": seconds - working,
        "outside_share": 1 - working / seconds,
        "trials_at_once": sum(end - begin for begin, end in spans) / stages["sweeps"],
    }


def _work(run: Path) -> list[tuple[float, float]]:
    """When trials worked, from and to, in seconds since the epoch; of every trial its training and its scoring."""
    spans = {}
    for journal in run.glob("sweeps/*/journal.jsonl"):
        for event in map(json.loads, journal.read_text().splitlines()):
            for name in set(WORK) & set(event.get("metrics", ())):  # the last tells of all epochs before
                spans[event["trial"], name] = (event["time"] - event["metrics"][name], event["time"])
    return list(spans.values())


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _watch(process: subprocess.Popen, peak: dict[str, int]) -> None:
    while process.poll() is None:
        peak["bytes"] = max(peak["bytes"], sum(map(_pss, _family(process.pid))))
        time.sleep(0.5)


def _family(root: int) -> set[int]:
    """The process and everything that descends from it."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    family, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return family


def _pss(pid: int) -> int:
    """Bytes; 0 for a process that has gone or belongs to somebody else."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return 0


OPTIONS: Options = {
    "--folder": {"type": Path, "help": "run there, and leave the run there (default: a temporary folder)"},
    "options": {"nargs": "*", "help": "options of distrecon.tune, after --"},
}
PARTS = {"default_run": speed(default_run, options=OPTIONS)}
