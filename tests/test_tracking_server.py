"""A tracking server that is killed in the middle of a run and started again gets everything."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

CHECKOUT = Path(__file__).resolve().parent.parent
SPACE = """
name: recoveries
kind: expand_cluster
base: {teacher.hidden: [3], students.count: 2, budget.attempts: 1}
space: {seed: {grid: [0, 1, 2, 3, 4, 5]}}
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """`mlflow server` on loopback, killed without warning at the end."""
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "served")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *address, *store],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: healthy(port), 300, "the server")
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.2)


def events(out: Path) -> list[dict]:
    journal = out / "sweeps" / "recoveries" / "journal.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def finished(out: Path) -> int:
    return sum(event["event"] == "finished" for event in events(out))


@pytest.mark.slow
def test_a_server_killed_in_mid_run_and_started_again_has_a_full_record(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    out, port = tmp_path / "out", free_port()
    uri = f"http://127.0.0.1:{port}"
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    with server(tmp_path, port):
        run = subprocess.Popen(
            [sys.executable, "-m", "distrecon.tune", "--space", "space.yaml", "--out", "out"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(lambda: finished(out) >= 1 or run.poll() is not None, 240, "the first trial")
    assert run.poll() is None, "".join(run.communicate())
    before = finished(out)
    wait_for(lambda: finished(out) > before or run.poll() is not None, 120, "a trial without a server")
    with server(tmp_path, port):
        output = "".join(run.communicate(timeout=400))
        if run.returncode:  # the run may have ended before the server was back: it says so, and is asked to send again
            assert "--resume" in output
            resumed = subprocess.run(
                [sys.executable, "-m", "distrecon.tune", "--resume", "out"],
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri},
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert "Traceback" not in output
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("recoveries")
        runs = {r.data.tags.get("trial_id"): r for r in client.search_runs([experiment.experiment_id])}
        assert {r.info.status for r in runs.values()} == {"FINISHED"}
        assert len(runs) == 7, "six trials and their sweep, none twice"
        for event in events(out):
            if event["event"] == "metrics":
                stored = runs[event["trial"]].data.metrics
                numbers = {k: v for k, v in event["metrics"].items() if isinstance(v, int | float)}
                assert numbers
                assert {k: stored[k] for k in numbers} == pytest.approx(numbers)
