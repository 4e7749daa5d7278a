"""Wall time, stage by stage, and peak memory of all processes of `python -m distrecon.tune`.

Memory is the sum over all processes of this user that started during the run of their proportional set size (PSS:
shared pages are counted once), sampled twice a second.

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
    before = _pids()
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "distrecon.tune", *args.options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = {"bytes": 0}
    watcher = threading.Thread(target=_watch, args=(process, before, peak), daemon=True)
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


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _watch(process: subprocess.Popen, before: set[int], peak: dict[str, int]) -> None:
    while process.poll() is None:
        peak["bytes"] = max(peak["bytes"], sum(map(_pss, _pids() - before - {os.getpid()})))
        time.sleep(0.5)


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
