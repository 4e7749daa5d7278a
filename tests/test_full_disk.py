"""A disk that fills up ends in one clear line or a failed trial that is told, and leaves earlier files whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
SPACE = """
name: recoveries
kind: expand_cluster
base: {teacher.hidden: [3], students.count: 2, budget.attempts: 1}
space: {seed: {grid: [0, 1]}}
"""


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so(small_disk, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (1024 * 1024 - 40 * 1024))
    done = subprocess.run(
        [sys.executable, "-m", "distrecon.tune", "--space", str(space), "--out", str(small_disk / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "MLFLOW_TRACKING_URI": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "No space left on device" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    journal = small_disk / "out" / "sweeps" / "recoveries" / "journal.jsonl"
    if journal.exists():
        for line in journal.read_text().splitlines():
            json.loads(line)  # whole lines only
    summary = small_disk / "out" / "summary.json"
    if summary.exists():
        json.loads(summary.read_text())
    filler.unlink()
    again = subprocess.run(
        [sys.executable, "-m", "distrecon.tune", "--resume", str(small_disk / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "MLFLOW_TRACKING_URI": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    statuses = [t["status"] for t in json.loads(summary.read_text())["sweeps"][0]["trials"]]
    assert statuses == ["completed", "completed"]
