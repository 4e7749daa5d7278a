"""Storage that fills up or turns read-only ends in a clear line, leaves earlier files whole, and a resume completes."""

import json
import os
import shutil
import subprocess
import sys
import time
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


def immutable(folder, yes):
    """Makes everything in the folder unchangeable, for root too, or changeable again."""
    return subprocess.run(["chattr", "-R", "+i" if yes else "-i", str(folder)], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_run_whose_storage_turns_read_only_says_so(tmp_path):
    (tmp_path / "probe").mkdir()
    if shutil.which("chattr") is None or not immutable(tmp_path / "probe", True):
        pytest.skip("needs root and a file system with immutable files")
    immutable(tmp_path / "probe", False)
    space, out = tmp_path / "space.yaml", tmp_path / "out"
    space.write_text(SPACE.replace("[0, 1]", "[0, 1, 2, 3, 4, 5]"))
    journal = out / "sweeps" / "recoveries" / "journal.jsonl"
    command = [sys.executable, "-m", "distrecon.tune"]
    settings = {
        "cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(CHECKOUT), "MLFLOW_TRACKING_URI": ""}, "text": True,
    }  # fmt: skip
    run = subprocess.Popen(
        [*command, "--space", str(space), "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings
    )
    while not (journal.exists() and '"finished"' in journal.read_text()):
        assert run.poll() is None, "".join(run.communicate())
        time.sleep(0.1)
    try:
        immutable(out, True)
        output = "".join(run.communicate(timeout=300))
    finally:
        immutable(out, False)
    assert run.returncode in (1, 2), output
    assert "Operation not permitted" in output
    assert "Traceback" not in output
    finished = {event["trial"] for event in events(journal) if event["event"] == "finished"}
    assert finished
    before = times(out, finished)
    again = subprocess.run([*command, "--resume", str(out)], capture_output=True, timeout=300, **settings)
    assert again.returncode == 0, again.stdout + again.stderr
    trials = json.loads((out / "summary.json").read_text())["sweeps"][0]["trials"]
    assert [t["status"] for t in trials] == ["completed"] * 6
    assert times(out, finished) == before, "a finished trial ran again"


def times(out, trials):
    """When each file of these trials was written."""
    files = [file for trial in trials for file in (out / "trials" / "recoveries" / trial).rglob("*") if file.is_file()]
    assert files
    return {file: file.stat().st_mtime_ns for file in files}


def events(journal):
    return [json.loads(line) for line in journal.read_text().splitlines()]
