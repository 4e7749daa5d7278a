"""The command: exit codes, one-line errors, the run folder, resuming, teachers from files and from code."""

import json

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from distrecon import recording
from distrecon.errors import UserError
from distrecon.expand_cluster import synthetic_teacher
from distrecon.recover import main


@pytest.fixture
def teacher_file(tmp_path):
    weights = synthetic_teacher(6, 3, "tanh", seed=1)
    tensors = {
        f"layer{i}.{n}": t for i, pair in enumerate(weights) for n, t in zip(("weight", "bias"), pair, strict=True)
    }
    save_file(tensors, tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def test_a_teacher_from_a_file_is_recovered_and_written(teacher_file, tmp_path, capsys):
    out = tmp_path / "run"
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(20, 6)))
    arguments = ["--teacher", str(teacher_file), "--students", "4", "--out", str(out), "--json", "--register", "mine"]
    assert main([*arguments, "--data", str(tmp_path / "data.npy")]) == 0
    summary = json.loads(capsys.readouterr().out)
    written = json.loads((out / "summary.json").read_text())
    uri, (registered,) = summary.pop("mlflow"), summary.pop("registered")
    assert summary == {"command": "distrecon.recover", "exit_code": 0, "folder": str(out), **written}
    (trial,) = written["sweeps"][0]["trials"]
    assert {key: trial["metrics"][key] for key in written["metrics"]} == written["metrics"]
    assert written["weights"] == "models/recovered.safetensors"
    assert "Clustering of" in (out / "report.html").read_text()
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("recover").experiment_id], "tags.trial_id != ''")
    (run,) = [run for run in runs if run.data.tags["run_folder"] == str(out)]
    assert run.data.metrics["recover/verified"] == 1
    teacher = {name: tensor.numpy() for name, tensor in load_file(teacher_file).items()}
    for address in (f"runs:/{run.info.run_id}/expand_cluster", registered):
        model = mlflow.pyfunc.load_model(address)
        x = np.random.default_rng(1).normal(size=(7, 6))
        hidden = np.tanh(x @ teacher["layer0.weight"].T + teacher["layer0.bias"])
        by_hand = hidden @ teacher["layer1.weight"].T + teacher["layer1.bias"]
        np.testing.assert_allclose(model.predict(x), by_hand, rtol=1e-9)
    assert registered.startswith("models:/mine/")
    assert summary["metrics"]["recover/layer_sizes"] == [3]
    assert summary["metrics"]["recover/max_cosine_distance"] < 1e-12
    assert load_file(out / "models" / "recovered.safetensors")["layer0.weight"].shape == (3, 6)
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments[:4], "--resume", str(out)]) == 2
    assert "this run is finished" in capsys.readouterr().err


def test_an_interrupted_run_is_resumed(teacher_file, tmp_path):
    out = tmp_path / "run"
    arguments = ["--teacher", str(teacher_file), "--students", "4", "--json"]
    assert main([*arguments, "--out", str(out)]) == 0
    (out / "summary.json").unlink()
    (out / "models" / "recovered.safetensors").unlink()
    student = next((out / "stages").glob("*.safetensors"))
    written = student.stat().st_mtime_ns
    assert main([*arguments, "--resume", str(out)]) == 0
    assert student.stat().st_mtime_ns == written


@pytest.mark.parametrize("error", [UserError("the report cannot be made"), KeyboardInterrupt()])
def test_what_was_recovered_stays_when_its_report_fails(teacher_file, tmp_path, monkeypatch, error):
    def finish(*_):
        raise error

    monkeypatch.setattr(recording, "finish", finish)
    assert main(["--teacher", str(teacher_file), "--students", "4", "--out", str(tmp_path / "run")]) != 0
    assert load_file(tmp_path / "run" / "models" / "recovered.safetensors")["layer0.weight"].shape == (3, 6)


def test_a_callable_teacher_that_is_no_network_exits_with_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_boxes.py").write_text(
        "import torch\n\ndef wave(x):\n    return (3 * x).sin().prod(1, keepdim=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--teacher", "my_boxes:wave", "--input-size", "2", "--students", "3", "--set", "budget.attempts=1"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert "UNVERIFIED" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not summary["verified"]
    assert summary["sweeps"][0]["trials"][0]["metrics"]["recover/verified"] == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_an_interrupt_keeps_what_was_done_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stop(*arguments, stages, **options):
        stages.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distrecon.recover.recover_network", stop)
        assert main(["--smoke", "--out", str(tmp_path / "run")]) == 130
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert main(["--smoke", "--resume", str(tmp_path / "run"), "--json"]) == 0
    (sweep,) = json.loads(capsys.readouterr().out)["sweeps"]
    assert [trial["status"] for trial in sweep["trials"]] == ["completed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--teacher"),
        (["--teacher", "nowhere.safetensors"], "does not exist"),
        (["--teacher", "no_such_module:f"], "cannot be imported"),
        (["--teacher", ":f"], "cannot be imported"),
        (["--teacher", "math:nothing"], "no callable 'nothing'"),
        (["--teacher", "math:sin"], "--input-size"),
        (["--teacher", "nonsense"], "MODULE:CALLABLE"),
        (["--smoke", "--set", "students.cuont=3"], "did you mean 'students.count'"),
        (["--smoke", "--queries", "100"], "query budget of 100 is too small"),
        (["--smoke", "--data", "none.npy"], "does not exist"),
        (["--smoke", "--resume", "nowhere"], "no interrupted recovery"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_with_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distrecon.recover: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("runs/*"))


def test_files_that_are_no_dense_network_are_refused(tmp_path, capsys):
    save_file({"a.weight": torch.zeros(3, 2, 1), "a.bias": torch.zeros(3)}, tmp_path / "conv.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    for name, message in (("conv", "not a dense layer"), ("text", "not a safetensors file")):
        assert main(["--teacher", str(tmp_path / f"{name}.safetensors")]) == 2
        assert message in capsys.readouterr().err


def test_a_convolutional_teacher_from_a_file_is_recovered_and_loads_in_torch(tmp_path, capsys):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(18, 3))
    save_file(net.double().state_dict(), tmp_path / "conv.safetensors")
    arguments = ["--teacher", str(tmp_path / "conv.safetensors"), "--layers", "conv3 linear", "--activation", "tanh"]
    assert main([*arguments, "--input-size", "25", "--out", str(tmp_path / "none")]) == 2
    assert "needs input_size=[channels, height, width]" in capsys.readouterr().err
    out = tmp_path / "run"
    assert main([*arguments, "--input-size", "1", "5", "5", "--out", str(out), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["recover/layer_sizes"] == [2]
    assert metrics["recover/max_cosine_distance"] < 1e-20
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    before = net(x)
    net.load_state_dict(load_file(out / "models" / "recovered.safetensors"))
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-11)
