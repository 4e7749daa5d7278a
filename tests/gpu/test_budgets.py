"""What a step, the training of a zoo and evaluation may ask of a GPU, counted on a machine without one."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.fake_gpu import guard
from tests.conftest import environment

pytestmark = pytest.mark.skipif(guard.compiler() is None, reason="needs a C++ compiler (g++, or CXX)")
KERNELS = 700  # of a step at the paper's size, whatever its precision


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, dict[str, float]]]:
    """Of every case of `benchmarks.fake_gpu.counts`, in a process that believes in a GPU."""
    command = [sys.executable, "-m", "benchmarks.fake_gpu.counts"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_guard_is_of_no_environment() -> None:
    """It is kept after the environment that it was made in is gone, and used by the next one with the same torch."""
    torch = Path(find_spec("torch").origin).parent
    assert f"{torch / 'lib'}\0".encode() not in guard.library().read_bytes()


@pytest.mark.parametrize(("precision", "peak_gib"), [("float32", 6), ("tf32", 6), ("bf16", 4)])
def test_a_step_of_the_papers_size(counts, precision: str, peak_gib: float) -> None:
    first, later = (counts[f"step {precision}"][which] for which in ("first", "later"))
    most = {"kernels": KERNELS, "synchronisations": 1, "copies": 2, "peak_gib": peak_gib}
    assert all(later[name] <= value for name, value in most.items()), later
    assert all(first[name] <= 1.5 * value for name, value in most.items()), first
    assert first["written_gib"] < 1.5 * later["written_gib"]


def test_a_step_with_mixed_models_waits_once(counts) -> None:
    later = counts["step mixed"]["later"]
    assert later["synchronisations"] == 1
    assert later["copies"] <= 4


def test_zoo_training_copies_nothing_from_batch_to_batch(counts) -> None:
    found = counts["zoo training"]["one pass, 16 batches"]
    assert found["kernels"] <= 16 * 75
    assert found["synchronisations"] <= 3
    assert found["copies"] <= 3


def test_evaluation_keeps_to_its_memory(counts) -> None:
    """Three times the widest layer's budget of 1 GiB."""
    found = counts["evaluation"]["64 models on 45,000 pictures"]
    assert found["peak_gib"] < 3
    assert found["synchronisations"] == found["copies"] == 0


def test_scoring_computes_on_the_gpu_what_lies_on_the_cpu(counts) -> None:
    """Every model that is evaluated goes there once, and its predictions come back."""
    found = counts["scoring"]["48 models on 4,096 pictures"]
    assert found["peak_gib"] < 3
    assert found["copies"] <= 80
    assert found["synchronisations"] <= 180
