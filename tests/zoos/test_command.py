"""python -m distrecon.zoo: exit codes, one-line errors, and a kill -9 at any time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from distrecon.zoo import main, parser
from distrecon.zoos import open_zoo
from distrecon.zoos.settings import GRIDS, named_zoos, plan, read_config
from tests.zoos.test_import import Malicious, check_identical, write_trial


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "import", "info", "check", "seal", "compact", "export"))
    for command in ("train", "import", "info", "check", "seal", "compact", "export"):
        with pytest.raises(SystemExit):
            parser().parse_args([command, "--help"])
        assert "--smoke" in capsys.readouterr().out


def test_train_info_check_export_in_smoke(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = str(tmp_path / "zoo")
    assert main(["train", "--smoke", "--out", zoo, "--set", "grid.seeds=2"]) == 0
    assert "8 models, 16 states" in capsys.readouterr().err
    assert main(["info", zoo]) == 0
    assert "8 with 16 states" in capsys.readouterr().out
    for command, key, value in (("info", "states", 16), ("check", "problems", [])):
        assert main([command, zoo, "--json"]) == 0
        told = capsys.readouterr()
        document = json.loads(told.out)
        assert (document["command"], document["exit_code"], document[key]) == ("distrecon.zoo", 0, value)
        assert "states" in told.err
    assert main(["check", zoo]) == 0
    assert (
        "16 states read, 2 files compared with their seals, 16 accuracies recomputed, no problems"
        in capsys.readouterr().out
    )
    assert main(["compact", zoo]) == 0
    assert "1 files of states, now 1" in capsys.readouterr().out
    assert main(["check", zoo]) == 0
    assert main(["export", zoo, "--model", "smoke-00003", "--out", str(tmp_path / "m.safetensors")]) == 0
    assert (tmp_path / "m.safetensors").exists()
    (tmp_path / "zoo/states/part-00000.parquet").write_bytes(b"PAR1")
    capsys.readouterr()
    assert main(["check", zoo]) == 1
    assert "part-00000.parquet is damaged" in capsys.readouterr().out


def test_a_zoo_that_was_made_is_a_run_with_its_settings_and_accuracies(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--smoke", "--out", "zoo", "--set", "grid.seeds=2"]
    assert main(arguments) == main(arguments) == 0  # the second finds it
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("zoos")
    assert experiment is not None
    assert "a run each" in experiment.tags["mlflow.note.content"]
    (run,) = client.search_runs([experiment.experiment_id])
    zoo = open_zoo("zoo")
    assert (run.info.run_name, run.info.status, run.data.tags["digest"]) == (zoo.name, "FINISHED", zoo.digest)
    assert (run.data.params["grid.seeds"], run.data.metrics["zoo/models"]) == ("2", 8)
    models = zoo.models()
    last_B = models.test_accuracy_B[models.epoch_B == models.epoch_B.max()]
    assert run.data.metrics["zoo/accuracy_mean"] == pytest.approx(float(last_B.mean()))
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/accuracies.png"]

    capsys.readouterr()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["train", "--smoke", "--out", "other", "--set", "grid.seeds=1"]) == 1
    assert "MLflow   NOT RECORDED: MLflow at http://127.0.0.1:9" in capsys.readouterr().out
    assert open_zoo("other").num_models == 4


def test_import_tells_what_it_skipped(ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trial(tmp_path / "tree", 0)
    assert main(["import", str(tmp_path / "tree"), "--out", str(tmp_path / "zoo"), "--epochs", "20,40"]) == 0
    assert open_zoo(tmp_path / "zoo").models().epoch_B.tolist() == [20, 40]
    torch.save(Malicious(tmp_path / "executed"), write_trial(tmp_path / "tree", 1) / "checkpoint_000030/checkpoints")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "tree"), "--out", str(tmp_path / "zoo"), "--epochs", "30"]) == 1
    assert "skipped      1  refused" in capsys.readouterr().out
    assert main(["import", "--smoke", "--out", str(tmp_path / "smoke")]) == 0


REQUESTS = {
    "no source": (["import", "--out", "zoo"], "import wants a SOURCE"),
    "nothing there": (["import", "nowhere", "--out", "zoo"], "nowhere: there is nothing to import"),
    "epochs": (["import", "nowhere", "--out", "zoo", "--epochs", "20;30"], "--epochs wants numbers"),
    "no zoo": (["info", "nowhere"], "nowhere is not a zoo"),
    "configuration": (["train", "--config", "digit", "--out", "zoo"], "did you mean 'digits'"),
    "key": (["train", "--smoke", "--set", "grid.sedes=3", "--out", "zoo"], "did you mean 'grid.seeds'"),
    "value": (["train", "--smoke", "--set", "grid.seeds=many", "--out", "zoo"], "grid.seeds must be int"),
    "broken file": (["train", "--config", "broken.yaml", "--out", "zoo"], "broken.yaml: not YAML"),
    "no keys": (["train", "--config", "list.yaml", "--out", "zoo"], "list.yaml: must be dotted keys"),
    "images": (["train", "--config", "cifar10_paper", "--out", "zoo"], "cifar10 needs the directory"),
    "address": (["train", "--smoke", "--address", "127.0.0.1:1", "--out", "zoo"], "nothing answers there"),
    "place": (["train", "--smoke", "--out", "file/zoo"], "cannot write"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_wrong_requests_are_one_line_and_leave_nothing(
    name: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1,")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "file").write_text("")
    arguments, message = REQUESTS[name]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("distrecon.zoo: error: ")
    assert message in error
    assert not (tmp_path / "zoo").exists()


def test_the_shipped_grids_have_their_models_and_states() -> None:
    grids = {path.stem: read_config(path.stem) for path in GRIDS.glob("*.yaml")}
    assert {"digits", "smoke", *grids} <= set(named_zoos())
    sizes = {name: (len(plan(config)), len(config.training.checkpoints)) for name, config in grids.items()}
    papers = dict.fromkeys(("cifar10_paper", "svhn_paper", "eurosat_paper"), (1200, 4))
    assert sizes == {**papers, "cifar10_small": (480, 4), "digits_mlp": (600, 3)}
    for name, config in grids.items():
        assert config == read_config(str(GRIDS / f"{name}.yaml"))


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_when(arguments: list[str], condition) -> None:
    """Runs the command in a process group of its own and kills all of it at once, as a power cut would."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distrecon.zoo", *arguments], start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()


def finished_units(zoo: Path, count: int):
    return lambda: len(list(zoo.glob("unfinished/unit-*.json"))) >= count


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "distrecon.zoo", *arguments], check=True, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_training_survives_kill_9(tmp_path: Path) -> None:
    config = {"name": "killed", "grid.seeds": 40, "training.epochs": 4, "training.checkpoints": [2, 4], "group_size": 8}
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", "--config", str(tmp_path / "zoo.yaml"), "--out"]
    zoo = tmp_path / "zoo"
    kill_when([*arguments, str(zoo)], finished_units(zoo, 4))
    kept = {p: p.stat().st_mtime_ns for p in zoo.glob("unfinished/unit-*.json")}
    parts = {zoo / json.loads(p.read_text())["part"]["file"] for p in kept}
    written = {p: p.stat().st_mtime_ns for p in parts}
    assert 4 <= len(kept) < 20
    assert not (zoo / "zoo.json").exists()
    run([*arguments, str(zoo)])
    assert {p: p.stat().st_mtime_ns for p in parts} == written  # what was finished was not done again
    run([*arguments, str(tmp_path / "whole")])
    found, whole = open_zoo(zoo), open_zoo(tmp_path / "whole")
    assert torch.equal(found.weights(), whole.weights())
    assert found.num_models == 160
    assert not list(zoo.glob("**/.*.tmp")) or found.num_states == 320


@pytest.mark.slow
def test_importing_and_appending_survive_kill_9(tmp_path: Path) -> None:
    for number in range(160):
        write_trial(tmp_path / "tree", number)
    zoo = tmp_path / "zoo"
    arguments = ["import", str(tmp_path / "tree"), "--out", str(zoo)]
    kill_when([*arguments, "--epochs", "20,30"], finished_units(zoo, 1))
    assert not (zoo / "zoo.json").exists()
    run([*arguments, "--epochs", "20,30"])
    half = open_zoo(zoo)
    assert half.num_states == 320
    before = half.weights()
    kill_when([*arguments, "--epochs", "40,50"], finished_units(zoo, 1))
    assert torch.equal(open_zoo(zoo).weights(), before)  # the old zoo, whole
    run([*arguments, "--epochs", "40,50"])
    assert torch.equal(open_zoo(zoo).weights()[:320], before)
    check_identical(zoo, 160)
