"""Wall time, stage by stage, and peak memory of all processes of `python -m distrecon.tune`.

Memory is the sum over the command and all its descendants, Ray's processes among them, of their proportional set size
(PSS: shared pages are counted once), sampled twice a second.

    python benchmarks/default_run.py [--out FILE.json] [-- OPTIONS OF distrecon.tune]
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("options", nargs="*", help="options of distrecon.tune, after --")
    args = parser.parse_args()
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "distrecon.tune", *args.options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
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
    stages = {line.split()[0]: line.rsplit("(", 1)[-1].rstrip(")") for _, line in marks if line.endswith(")")}
    figures = {
        "seconds": round(seconds, 1),
        "peak_gib": round(peak["bytes"] / 2**30, 2),
        "stages": stages,
        "rc": process.returncode,
    }
    print(json.dumps(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))
    return process.returncode


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


if __name__ == "__main__":
    sys.exit(main())
