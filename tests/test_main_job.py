"""The main job end to end, as a user runs it: `python -m distrecon.tune --smoke` in an empty folder."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

import distrecon
from distrecon import evaluate, generate, images, job, tune
from distrecon.autoencoder.config import RECOMMENDED
from distrecon.console import DONE, INTERRUPTED, SOME_FAILED, WRONG_REQUEST
from distrecon.nets import ChainArchitecture, ModuleArchitecture
from tests.conftest import environment, run_command

ONE_RECOVERY = """
name: recoveries
kind: expand_cluster
base: {teacher.hidden: [3], students.count: 2}
space: {SPACE}
"""


def command(*arguments):
    return [sys.executable, "-m", "distrecon.tune", *map(str, arguments)]


def run(folder, *arguments):
    return run_command(folder, "tune", *arguments)


def recoveries(folder, space):
    path = folder / "space.yaml"
    path.write_text(ONE_RECOVERY.replace("{SPACE}", space))
    return path


def test_prints_all_tables_and_where_to_look_next(smoke):
    _, _, done = smoke
    for words in (
        "loss_weights",
        "C+S+B",
        "recommended_coder",
        "model.latent",
        "student_counts",
        "students.count",
        "numbers mean nothing",
    ):
        assert words in done.stdout
    assert "report   out/report.html" in done.stdout
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "/" not in line) <= 80
    for chatter in ("Warning", "WARNING", "raylet", "Traceback"):
        assert chatter not in done.stdout + done.stderr


def test_progress_names_the_stages(smoke):
    stages = [line.split()[0] for line in smoke[2].stderr.splitlines()]
    assert [s for i, s in enumerate(stages) if i == 0 or stages[i - 1] != s] == ["zoo", "sweeps", "report"]


def test_summary_has_every_trial_with_its_metrics(smoke):
    summary = json.loads((smoke[1] / "summary.json").read_text())
    assert summary["smoke"] is True
    sweeps = {sweep["name"]: sweep for sweep in summary["sweeps"]}
    assert set(sweeps) == {"loss_weights", "recommended_coder", "student_counts"}
    for sweep in sweeps.values():
        assert len(sweep["trials"]) == 2
        assert {t["status"] for t in sweep["trials"]} == {"completed"}
        assert sweep["best"] in {t["trial_id"] for t in sweep["trials"]}
        assert all(sweep["metric"] in t["metrics"] for t in sweep["trials"])
    losses = {t["config"]["loss.terms"]: t["metrics"] for t in sweeps["loss_weights"]["trials"]}
    assert "loss/behavioral" in losses["C+S+B"]
    assert "loss/behavioral" not in losses["C+S"]
    fitted = [t["metrics"] for t in sweeps["recommended_coder"]["trials"]]
    assert all("reconstruct/agreement" in m and "loss/total" not in m and m["time/seconds"] > 0 for m in fitted)
    for task in ("predict/test_accuracy_r2", "reconstruct/agreement", "generate/accuracy_mean", "generate/novelty"):
        assert task in losses["C+S"]
    assert all(t["metrics"]["recover/layer_sizes"] == [3] for t in sweeps["student_counts"]["trials"])


def test_the_sweeps_ran_at_the_same_time(smoke):
    summary = json.loads((smoke[1] / "summary.json").read_text())
    spans = [(min(t["started"] for t in s["trials"]), max(t["ended"] for t in s["trials"])) for s in summary["sweeps"]]
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_mlflow_has_parents_children_epochs_and_artifacts(smoke):
    folder, out, _ = smoke
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    for name in ("loss_weights", "recommended_coder", "student_counts"):
        runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        assert {r.info.status for r in runs} == {"FINISHED"}
        parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
        children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
        assert (len(parents), len(children)) == (1, 2)
        files = {a.path for a in client.list_artifacts(parents[0].info.run_id)}
        assert {"report.html", "summary.json", "figures"} <= files
        for child in children:
            (model,) = child.outputs.model_outputs
            assert client.get_logged_model(model.model_id).status == "READY"
            assert list(child.data.params)
    child = next(
        r for r in client.search_runs([client.get_experiment_by_name("loss_weights").experiment_id]) if r.data.params
    )
    assert [m.step for m in client.get_metric_history(child.info.run_id, "loss/total")] == [1, 2]
    summary = json.loads((out / "summary.json").read_text())
    told = {t["config"]["loss.terms"]: t["metrics"] for t in summary["sweeps"][0]["trials"]}
    assert child.data.metrics["reconstruct/agreement"] == told[child.data.params["loss.terms"]]["reconstruct/agreement"]


def test_report_has_every_figure_and_a_link_to_every_run(smoke):
    page = (smoke[1] / "report.html").read_text()
    assert page.count("<figure>") == len(list((smoke[1] / "figures").glob("*.png"))) == 22
    assert page.count("/runs/") == 6
    assert "smoke run" in page


def test_the_best_autoencoder_is_loaded_from_the_store_by_one_line(smoke, monkeypatch):
    folder, out, _ = smoke
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    line, _ = re.findall(r"distrecon.load_autoencoder\((&quot;|\")(runs:/\w+)", (out / "report.html").read_text())
    here = distrecon.load_autoencoder(out).state_dict()
    client = MlflowClient("sqlite:///mlflow.db")
    parents = client.search_runs([client.get_experiment_by_name("loss_weights").experiment_id], "tags.best_run != ''")
    assert [p.info.run_name for p in parents] == ["out"]
    assert "C+S+B" in parents[0].data.tags["mlflow.note.content"]
    served = mlflow.pyfunc.load_model(line[1] + "/autoencoder")
    theta_BP = next(iter((folder / "zoos").iterdir()))
    theta_BP = distrecon.open_zoo(theta_BP).weights(split="test")[:3]
    latents = served.predict(theta_BP.numpy(), params={"task": "encode"})
    with torch.no_grad():
        own = distrecon.load_autoencoder(out)
        expected_BP = own.decode(own.encode(theta_BP))
    for answer in (served.predict(theta_BP.numpy()), served.predict(latents, params={"task": "decode"})):
        assert np.allclose(answer, expected_BP, atol=1e-6)
    for address in (line[1], f"runs:/{parents[0].info.run_id}"):  # the trial's run, and its sweep's
        stored = distrecon.load_autoencoder(address).state_dict()
        assert all(torch.equal(stored[name], tensor) for name, tensor in here.items())
    recovered = client.get_experiment_by_name("student_counts").experiment_id
    for address, words in (
        (client.search_runs([recovered])[0].info.run_id, "holds no autoencoder"),
        ("nothing", "nothing"),
    ):
        with pytest.raises(distrecon.UserError, match=words):
            distrecon.load_autoencoder(f"runs:/{address}")


def test_mlflow_tells_what_a_run_came_from(smoke):
    client = MlflowClient(f"sqlite:///{smoke[0] / 'mlflow.db'}")
    for run_ in client.search_runs([client.get_experiment_by_name("loss_weights").experiment_id]):
        tags = run_.data.tags
        assert {"mlflow.source.git.commit", "seed", "zoos", "smoke", "run_folder", "version.torch"} <= set(tags)
        assert "zoos/smoke-" in tags["zoos"]
        assert run_.info.run_name in ("out", "terms=C+S", "terms=C+S+B")


def test_the_trained_autoencoder_evaluates_and_generates(smoke, capsys, monkeypatch):
    monkeypatch.chdir(smoke[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{smoke[0] / 'evaluate.db'}")
    (zoo,) = (smoke[0] / "zoos").iterdir()
    assert evaluate.main(["--smoke", "--autoencoder", "out", "--zoo", str(zoo), "--out", "evaluated", "--json"]) == DONE
    document = json.loads(capsys.readouterr().out)
    (sweep,) = json.loads(Path("evaluated/summary.json").read_text())["sweeps"]
    assert document["sweeps"] == [sweep]
    (trial,) = sweep["trials"]
    assert 0 <= trial["metrics"]["reconstruct/agreement"] <= 1
    assert generate.main(["--autoencoder", "out", "--count", "3", "--out", "generated", "--json"]) == DONE
    made = json.loads(Path("generated/summary.json").read_text())
    printed = {"command": "distrecon.generate", "exit_code": DONE, "folder": str(smoke[0] / "generated")}
    document = json.loads(capsys.readouterr().out)
    client = MlflowClient(document.pop("mlflow"))
    assert document == {**printed, **made}
    assert len(made["models"]) == 3
    assert (
        made["sweeps"][0]["trials"][0]["metrics"]["generate/accuracy_mean"] == made["metrics"]["generate/accuracy_mean"]
    )
    assert Path("generated/report.html").read_text().count("<figure>") == 1
    (run_,) = client.search_runs([client.get_experiment_by_name("generate").experiment_id], "tags.trial_id != ''")
    served = mlflow.pyfunc.load_model(f"runs:/{run_.info.run_id}/autoencoder")
    assert len(distrecon.load_autoencoder("evaluated").architectures) == 1
    arch = distrecon.Architecture.from_dict(made["architecture"])
    test = images.load("digits").test
    for model in made["models"]:
        theta_P = arch.flatten(load_file(Path("generated") / model["file"]))
        predictions_Q = arch.forward(theta_P[None], test.images)[0].argmax(1)
        assert float((predictions_Q == test.labels_Q).float().mean()) == pytest.approx(model["test_accuracy"], abs=1e-3)
        answers_QC = served.predict(test.images.numpy(), params={"number": int(Path(model["file"]).stem)})
        assert (torch.from_numpy(answers_QC).argmax(1) == predictions_Q).all()
    capsys.readouterr()
    for arguments, words in [
        (["--autoencoder", "nowhere", "--count", "3"], "nowhere: no such folder"),
        (["--autoencoder", "out", "--count", "0"], "--count must be at least 1"),
        (["--autoencoder", "out", "--out", "generated"], "--out generated: exists already"),
    ]:
        assert generate.main(arguments) == WRONG_REQUEST
        assert words in capsys.readouterr().err


def test_a_run_is_never_overwritten(smoke, capsys, monkeypatch):
    monkeypatch.chdir(smoke[0])
    before = (smoke[1] / "summary.json").read_bytes()
    assert tune.main(["--smoke", "--out", "out"]) == WRONG_REQUEST
    assert "--out out: exists already" in capsys.readouterr().err
    assert (smoke[1] / "summary.json").read_bytes() == before


def test_resuming_a_finished_run_repeats_nothing(smoke):
    folder, out, _ = smoke
    before = json.loads((out / "summary.json").read_text())
    done = run(folder, "--resume", "out", "--json")
    assert done.returncode == DONE, done.stdout + done.stderr
    after = json.loads((out / "summary.json").read_text())
    assert after["sweeps"] == before["sweeps"]
    document = json.loads(done.stdout)  # nothing else is there
    assert (document["command"], document["exit_code"], document["folder"]) == ("distrecon.tune", DONE, str(out))
    assert document["sweeps"] == after["sweeps"]
    assert "report   out/report.html" in done.stderr
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("student_counts").experiment_id])
    assert len(runs) == 3


def test_a_failed_trial_is_told_and_the_others_finish(tmp_path):
    space = recoveries(tmp_path, "{probes.count: {grid: [0, 5]}}")
    done = run(tmp_path, "--space", space, "--out", "out")
    assert done.returncode == SOME_FAILED, done.stdout + done.stderr
    (sweep,) = json.loads((tmp_path / "out" / "summary.json").read_text())["sweeps"]
    statuses = {t["config"]["probes.count"]: t for t in sweep["trials"]}
    assert statuses[0]["status"] == "completed"
    assert statuses[5]["status"] == "failed"
    assert "probes.count" in statuses[5]["error"]
    assert "failed: 5:" in done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("recoveries").experiment_id])
    assert sorted(r.info.status for r in runs) == ["FAILED", "FINISHED", "FINISHED"]


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_with_resume(tmp_path, how):
    space = recoveries(tmp_path, "{seed: {grid: [0, 1, 2, 3, 4]}}")
    process = subprocess.Popen(
        command("--space", space, "--out", "out"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores Ctrl-C
    )
    finished = tmp_path / "out" / "trials" / "recoveries"
    deadline = time.monotonic() + 200
    while not list(finished.glob("*/finished.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == INTERRUPTED, errors
        assert "continue with --resume" in errors
        assert "Traceback" not in errors
        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        runs = client.search_runs([client.get_experiment_by_name("recoveries").experiment_id])
        assert "RUNNING" not in {r.info.status for r in runs}
    before = {path.parent.name: path.stat().st_mtime_ns for path in finished.glob("*/finished.json")}
    assert 0 < len(before) < 5
    done = run(tmp_path, "--resume", "out")
    assert done.returncode == DONE, done.stdout + done.stderr
    (sweep,) = json.loads((tmp_path / "out" / "summary.json").read_text())["sweeps"]
    assert sorted(t["config"]["seed"] for t in sweep["trials"]) == list(range(5))
    assert {t["status"] for t in sweep["trials"]} == {"completed"}
    for trial, written in before.items():
        assert (finished / trial / "finished.json").stat().st_mtime_ns == written
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("recoveries").experiment_id])
    assert len(runs) == 6
    assert {r.info.status for r in runs} == {"FINISHED"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--space", "none.yaml"], ["none.yaml", "no such space file"]),
        (["--set", "loss.betta=0.1"], ["loss.betta", "did you mean 'loss.beta'"]),
        (["--set", "loss.beta=high"], ["loss.beta", "float", "'high'"]),
        (["--set", "loss.beta"], ["KEY=VALUE"]),
        (["--address", "127.0.0.1:1"], ["127.0.0.1:1", "nothing answers"]),
        (["--address", "nowhere"], ["nowhere", "auto or HOST:PORT"]),
        (["--resume", "nowhere"], ["nowhere", "no run there"]),
        (["--num-workers", "17"], ["data.shards (16)", "at least resources.num_workers (17)"]),
        (["--out", "/proc/out"], ["/proc/out", "cannot be written"]),
        (
            ["--storage", "/proc/here", "--out", "run"],
            ["cannot write /proc/here"],
        ),  # found after the run folder was made
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, ray_session, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert tune.main(["--smoke", *arguments]) == WRONG_REQUEST
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for word in words:
        assert word in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        ({}, True),
        ({"model.latent": 62, "data.align": False, "tasks.refine": 2, "resources.num_workers": 2, "seed": 1}, True),
        ({"model.kind": "transformer"}, False),
        ({"model.width": 128}, False),
        ({"loss.beta": 0.1}, False),
        ({"optim.epochs": 8}, False),
        ({"data.views": "permutation"}, False),
    ],
)
def test_one_autoencoder_is_the_recommended_coder_unless_a_setting_says_how_to_train(overrides, taken):
    coder = job.recommended(["digits"], overrides, smoke=False)
    (sweep,) = job.read_sweeps(job.Request(zoo=("digits",), coder=coder, overrides=overrides))
    assert sweep.base.model.kind == ("activation_pca" if taken else "transformer")
    assert sweep.kind.epochs(sweep.base) == (0 if taken else 8)
    assert ("model.kind" in sweep.space) == taken  # the table shows what nobody asked for
    assert job.recommended(["digits"], overrides, smoke=True) == {}


def test_networks_that_are_no_chains_get_the_transformer(monkeypatch):
    opened = {
        name: SimpleNamespace(architecture=Mock(kind))
        for name, kind in (("chain", ChainArchitecture), ("module", ModuleArchitecture))
    }
    monkeypatch.setattr(job, "_opened", lambda zoo: {name: opened[name] for name in zoo})
    assert job.recommended(["chain"], {}, smoke=False) == RECOMMENDED
    assert job.recommended(["chain", "module"], {}, smoke=False) == {}


def test_a_resumed_run_keeps_the_coder_that_it_began_with(smoke, tmp_path, ray_session):
    (zoo,) = (smoke[0] / "zoos").iterdir()
    for coder in (RECOMMENDED, {}):
        out = tmp_path / f"run{len(coder)}"
        job.prepare(job.Request(zoo=(str(zoo),), coder=coder), str(out), "train")
        saved = json.loads((out / "request.json").read_text())
        if not coder:  # as versions wrote it that knew no recommended coder
            del saved["coder"]
            (out / "request.json").write_text(json.dumps(saved))
        assert job.reopen(str(out), "train", None)[1].coder == coder
