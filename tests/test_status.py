"""`distrecon status` tells how far a run is, read from its folder alone, while it runs and afterwards."""

import fcntl
import json
import subprocess
import sys

import pytest

from distrecon import status
from distrecon.console import DONE, SOME_FAILED, WRONG_REQUEST
from distrecon.files import write_json
from distrecon.record.folder import RunFolder
from tests.conftest import environment


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of two sweeps: one with four trials, of which one is done, one failed and one runs, and one not begun."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("runs/mine", "tune", {})
    (folder.spaces).mkdir()
    for name in ("losses", "students"):
        (folder.spaces / f"{name}.yaml").write_text("")
    journal = folder.journal("losses")
    journal.write("sweep", name="losses", kind="autoencoder", metric="a/x", mode="max", trials=4, epochs=8)
    for trial, terms in (("0", "C+S"), ("1", "C+B"), ("2", "S+B")):
        journal.write("started", trial=trial, config={"loss.terms": terms})
    journal.write("metrics", trial="0", epoch=8, metrics={"a/x": 0.25})
    journal.write("finished", trial="0", status="completed", error=None)
    journal.write("finished", trial="1", status="failed", error="it broke")
    journal.write("metrics", trial="2", epoch=4, metrics={"loss/total": 0.5})
    write_json(folder.progress, {"stage": "sweeps", "text": "losses 2/4", "time": 0.0})
    return folder


def told(capsys, *arguments):
    code = status.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_running_sweep(folder, capsys):
    with open(folder.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, data = told(capsys, "runs/mine")
        assert status.main(["runs/mine"]) == SOME_FAILED
    text = capsys.readouterr().out
    assert (code, data["state"], data["made_by"]) == (SOME_FAILED, "running", "distrecon.tune")
    losses, students = data["sweeps"]
    assert (losses["ended"], losses["failed"], losses["trials"], losses["running"]) == (2, 1, 4, ["S+B 4/8"])
    assert (losses["best"], losses["value"]) == ("C+S", 0.25)
    # 2 of 4 trials and half of the training of a third: 2.45 / 4 of the work
    assert losses["seconds_left"] == pytest.approx(losses["seconds"] * (4 / 2.45 - 1))
    assert students["trials"] == 0
    for words in (
        "run      runs/mine: tune, running",
        "stage    sweeps: losses 2/4",
        "losses: 2 of 4 trials ended; 1 failed; running S+B 4/8; about",
        "best so far C+S: a/x 0.25",
        "students: not begun",
    ):
        assert words in text


def test_the_last_trials_are_scored_in_unknown_time(folder, capsys):
    """Three of four trials: another may follow, and the work's share goes on. With all four there is no estimate."""
    journal = folder.journal("losses")
    journal.write("metrics", trial="2", epoch=8, metrics={"loss/total": 0.4})
    with open(folder.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, before = told(capsys, "runs/mine")
        journal.write("started", trial="3", config={"loss.terms": "B"})
        journal.write("metrics", trial="3", epoch=8, metrics={"loss/total": 0.4})
        _, after = told(capsys, "runs/mine")
    losses = before["sweeps"][0]
    assert losses["seconds_left"] == pytest.approx(losses["seconds"] * (4 / 2.9 - 1))
    assert after["sweeps"][0]["running"] == ["S+B scored", "B scored"]
    assert after["sweeps"][0]["seconds_left"] is None


def test_one_that_broke_off_says_how_to_go_on(folder, capsys):
    assert status.main(["runs/mine"]) == SOME_FAILED
    text = capsys.readouterr().out
    assert "runs/mine: tune, broken off" in text
    assert "--resume runs/mine" in text
    assert "left" not in text


def test_a_finished_run_which_is_the_newest(folder, capsys):
    journal = folder.journal("losses")
    journal.write("finished", trial="2", status="completed", error=None)
    journal.write("done")
    folder.summary.write_text("{}")
    code, data = told(capsys)
    assert (code, data["state"], data["sweeps"][0]["running"]) == (SOME_FAILED, "finished", [])
    assert status.main([]) == SOME_FAILED
    assert "report   runs/mine/report.html" in capsys.readouterr().out


def test_no_run_is_a_wrong_request(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status.main([]) == WRONG_REQUEST
    assert "no run in runs/ here" in capsys.readouterr().err
    assert status.main(["none"]) == WRONG_REQUEST
    assert "none: no run there" in capsys.readouterr().err


def test_it_loads_neither_ray_nor_mlflow_nor_matplotlib(folder):
    code = (
        "import sys; from distrecon import status; status.main(['runs/mine']);"
        "print([name for name in ('ray', 'mlflow', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_smoke_run_as_it_was_left(smoke, capsys):
    code, data = told(capsys, str(smoke[1]))
    assert (code, data["state"]) == (DONE, "finished")
    assert {s["name"]: (s["ended"], s["trials"]) for s in data["sweeps"]} == {
        "loss_weights": (2, 2),
        "recommended_coder": (2, 2),
        "student_counts": (2, 2),
    }
    assert data["stage"]["stage"] == "report"
