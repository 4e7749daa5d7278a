"""What the first GPU proves, rehearsed on the CPU where neither Ray nor MLflow can be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_proof import PARTS
from tests.conftest import environment

WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("ray", "mlflow")))  # None: importing it fails
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def rehearsed(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = ["--quick", "--device", "cpu", "--out", str(out), *more]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *options], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_what_there_was_no_time_for_is_said(tmp_path: Path) -> None:
    done = rehearsed(tmp_path, "--minutes", "0")
    assert f"no time for: {', '.join(PARTS)}" in done.stderr
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_a_rehearsal_measures_everything_once(tmp_path: Path) -> None:
    rehearsed(tmp_path)
    files = {name: tmp_path / f"{name}.json" for name in PARTS}
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    errors = {row["precision"]: row for row in found["correctness"]["rows"]}
    assert errors["float32"]["gradient"] < 1e-5
    assert 1e-4 < errors["bf16"]["gradient"] < 0.1
    ends = {row["precision"]: row["loss/total"] for row in found["training"]["rows"]}
    assert ends["float32"] == pytest.approx(ends["float64"], rel=1e-3)
    rows = [found[name]["rows"][0] for name in PARTS if name.startswith("table")]
    assert [row["losses"] for row in rows] == ["C+S+B", "C+S", "C+B"]
    assert all(0 <= row["reconstruct/agreement"] <= 1 for row in rows)
    page = (tmp_path / "page.md").read_text()
    assert all(f"## {title}" in page for title, _ in PARTS.values())
    # a second call makes what is missing, and nothing else
    times = {name: os.path.getmtime(file) for name, file in files.items()}
    files["published"].unlink()
    rehearsed(tmp_path)
    assert [name for name, file in files.items() if os.path.getmtime(file) != times[name]] == ["published"]
