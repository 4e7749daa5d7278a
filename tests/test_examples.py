"""The examples run as printed."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import CHECKOUT, run_command


def run(folder, name, *arguments):
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "examples" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_zoo_then_an_autoencoder_on_it(tmp_path):
    assert "40 models, 80 states of 1198 parameters" in run(tmp_path, "zoo_in_ten_lines.py")
    told = run(tmp_path, "train_and_generate.py")
    assert "epoch 5: loss/contrastive" in told
    assert "generate/accuracy_mean" in told


def test_scikit_learns_network_is_a_black_box_that_is_recovered(tmp_path):
    done = run_command(
        tmp_path,
        "recover",
        *("--teacher", "examples.black_box:scores", "--input-size", 64, "--activation", "tanh"),
        *("--out", tmp_path / "run", "--json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verified"]
    assert found["metrics"]["recover/layer_sizes"] == [20]


@pytest.mark.parametrize(
    ("name", "words"),
    [("recover_a_black_box.py", "verified"), ("your_own_architecture.py", "logits (5, 32, 10)")],
)
def test_the_others(tmp_path, name, words):
    assert words in run(tmp_path, name)


@pytest.mark.slow
def test_a_service_behind_http_is_recovered_through_its_faults(tmp_path):
    told = run(tmp_path, "black_box_over_http.py")
    assert "verified: " in told
    assert int(told.split("faults")[1].split()[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zoo_to_new_models.ipynb", "120 models, 240 states of 1198 parameters"),
        ("black_box.ipynb", "verdict      verified"),
    ],
)
def test_a_notebooks_cells_run_one_after_the_other(tmp_path, name, words):
    """In one process, as they stand: they are plain Python, with no commands of the notebook's own."""
    document = json.loads((CHECKOUT / "examples" / name).read_text())
    cells = ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join(cells))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout
