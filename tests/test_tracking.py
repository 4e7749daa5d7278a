"""Journals arrive in MLflow completely, once, and also when the store was down for a while."""

import shutil
import signal

import pytest
from mlflow.tracking import MlflowClient

from distrecon.record import store
from distrecon.record.folder import RunFolder
from distrecon.record.store import record_once
from distrecon.record.tracking import Tracker

DEAD = "http://127.0.0.1:9"
MAKES_ITS_OWN = ("a_new_store", "while_the_database_is_made", "folders_of_any_name")  # tests of how stores are made


@pytest.fixture(scope="module")
def made_store(tmp_path_factory):
    """MLflow takes seconds to make a database."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    store._create(database)
    return database


@pytest.fixture(autouse=True)
def copied_stores(made_store, monkeypatch, request):
    if not any(words in request.node.name for words in MAKES_ITS_OWN):
        monkeypatch.setattr(store, "_create", lambda path: path.exists() or shutil.copy(made_store, path))


@pytest.fixture
def journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    journal = RunFolder(tmp_path / "run").journal("demo")
    journal.write("sweep", name="demo", kind="autoencoder", metric="a/x", mode="max", trials=1)
    journal.write("started", trial="t", config={"loss.beta": 0.1, "zoo": ["digits"]})
    journal.write("metrics", trial="t", epoch=1, metrics={"a/x": 1.0, "a/sizes": [20], "a/bad": float("nan")})
    return journal


def finish(journal):
    journal.write("metrics", trial="t", epoch=2, metrics={"a/x": 2.0})
    journal.write("finished", trial="t", status="completed", error=None)
    journal.write("done")


def runs(tmp_path):
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    children = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    return client, found, children


def test_a_journal_arrives_as_parent_child_parameters_and_metrics_by_epoch(journal, tmp_path):
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {"seed": "3"})
    assert tracker.sync()
    finish(journal)
    assert tracker.sync()
    client, found, (child,) = runs(tmp_path)
    assert len(found) == 2
    assert {r.info.status for r in found} == {"FINISHED"}
    assert child.data.params == {"loss.beta": "0.1", "zoo": '["digits"]'}
    assert child.data.tags["seed"] == "3"
    history = client.get_metric_history(child.info.run_id, "a/x")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]
    assert "a/sizes" not in child.data.metrics


def test_what_all_trials_have_in_common_is_a_parameter_of_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    journal = RunFolder(tmp_path / "run").journal("demo")
    settings = {f"a.setting{i}": i for i in range(250)}  # more than one request holds
    journal.write("sweep", name="demo", kind="x", metric="a/x", mode="max", trials=1, settings=settings)
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    journal.write("started", trial="t", config={"a.setting3": "swept"})
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync(), "another process goes on"
    _, _, (child,) = runs(tmp_path)
    assert child.data.params == {name: str(value) for name, value in (settings | {"a.setting3": "swept"}).items()}


def test_a_sweep_has_its_best_trials_metrics_and_the_experiment_a_note(journal, tmp_path):
    finish(journal)
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    assert tracker.sync()
    tracker.conclude("demo", "t", {"a/x": 2.0, "a/sizes": [20]}, "a table", "try more", "what the columns mean")
    client, found, (child,) = runs(tmp_path)
    (parent,) = [r for r in found if r.info.run_id != child.info.run_id]
    assert parent.data.metrics == {"a/x": 2.0}
    assert parent.data.tags["best_run"] == child.info.run_id
    assert parent.data.tags["mlflow.note.content"] == "```\na table\n```\n\ntry more"
    experiment = client.get_experiment_by_name("demo")
    assert experiment.tags["mlflow.note.content"] == "what the columns mean"


def test_a_new_store_has_our_experiments_alone(journal, tmp_path):
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [e.name for e in client.search_experiments()] == ["demo"]


def test_a_run_that_a_slow_server_made_twice_is_there_once(journal, tmp_path, monkeypatch):
    create_run = MlflowClient.create_run

    def create_twice(*arguments):
        create_run(*arguments)
        return create_run(*arguments)

    monkeypatch.setattr(MlflowClient, "create_run", create_twice)
    finish(journal)
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {"seed": "3"}).sync()
    _, found, (child,) = runs(tmp_path)
    assert len(found) == 2
    assert {r.info.status for r in found} == {"FINISHED"}
    assert child.data.params["loss.beta"] == "0.1"


def test_nothing_is_sent_twice_by_another_tracker_of_the_same_folder(journal, tmp_path):
    finish(journal)
    for _ in range(2):
        assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    client, found, (child,) = runs(tmp_path)
    assert len(found) == 2
    assert len(client.get_metric_history(child.info.run_id, "a/x")) == 2


def test_a_store_that_is_down_is_told_and_gets_everything_later(journal, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    assert not tracker.sync()
    assert DEAD in tracker.problem
    assert "\n" not in tracker.problem
    assert not tracker.sync(), "asked again at once"
    finish(journal)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    later = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    assert later.sync()
    assert later.problem is None
    client, _, (child,) = runs(tmp_path)
    assert len(client.get_metric_history(child.info.run_id, "a/x")) == 2


def test_an_interrupt_while_the_database_is_made_leaves_none(journal, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_experiments", stop)
        with pytest.raises(KeyboardInterrupt):
            Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    assert list(tmp_path.glob("*mlflow.db*")) == list(tmp_path.glob(".mlflow.db*")) == []
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    assert len(runs(tmp_path)[1]) == 2


def test_an_interrupt_leaves_no_run_running_and_a_resume_goes_on(journal, tmp_path):
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    tracker.sync()
    tracker.interrupt()
    assert {r.info.status for r in runs(tmp_path)[1]} == {"KILLED"}
    journal.write("sweep", name="demo", kind="autoencoder", metric="a/x", mode="max", trials=1)
    journal.write("started", trial="t", config={})
    finish(journal)
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    _, found, _ = runs(tmp_path)
    assert len(found) == 2
    assert {r.info.status for r in found} == {"FINISHED"}


def test_an_interrupt_while_a_run_is_made_waits_until_it_is_noted(journal, tmp_path, monkeypatch):
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    create = tracker.client.create_run

    def interrupted(*arguments, **options):
        made = create(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(tracker.client, "create_run", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            tracker.sync()
    finally:
        signal.signal(signal.SIGINT, before)
    tracker.interrupt()
    _, found, _ = runs(tmp_path)
    assert {r.info.run_id for r in found} == set(tracker.run_ids("demo").values())
    assert {r.info.status for r in found} == {"KILLED"}


# -- whatever the store does, the record goes on ----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_database_is_a_problem_in_one_line(journal, tmp_path, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    finish(journal)
    arrived = tracker.sync(force=True)
    assert arrived == (tracker.problem is None)
    if content:
        assert not arrived
        assert "\n" not in tracker.problem
    tracker.interrupt()
    assert tracker.artifacts("demo", "t", [tmp_path / "mlflow.db"]) == arrived


@pytest.mark.parametrize(
    "uri", ["oracle+nothing://host/db", "postgresql://host:1/db", "no://such", "sqlite:////proc/nowhere/x"]
)
def test_a_store_that_cannot_be_opened_is_a_problem_in_one_line(journal, tmp_path, monkeypatch, uri):
    """A database without its driver, or without an answer, an address of no kind."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    assert not tracker.sync(force=True)
    assert tracker.problem.startswith(f"MLflow at {uri}")
    assert "\n" not in tracker.problem


def test_any_error_of_the_store_is_a_problem(journal, tmp_path, monkeypatch):
    class Odd(Exception):
        pass

    def fail(*arguments, **options):
        raise Odd("first line\nsecond")

    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    monkeypatch.setattr(MlflowClient, "create_run", fail)
    assert not tracker.sync(force=True)
    assert tracker.problem.endswith("Odd: first line")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracker.sync(force=True)
    for name in ("log_artifact", "set_tag", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, fail)
    assert not tracker.artifacts("demo", "t", [tmp_path / "run"])
    tracker.conclude("demo", "t", {}, "table", "advice", "about")
    tracker.interrupt()
    assert tracker.problem.endswith("Odd: first line")


def test_any_error_of_the_store_leaves_work_without_a_run_folder_alone(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("first line\nsecond")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(MlflowClient, "create_run", fail)
    assert record_once("zoos", "mine", 0.0, {}, {}, {}, [], "about").endswith("RuntimeError: first line")


@pytest.mark.parametrize("begun", [False, True])
def test_a_deleted_experiment_comes_back(journal, tmp_path, begun):
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    if begun:
        assert tracker.sync()
        journal.write("started", trial="u", config={})
        experiment = client.get_experiment_by_name("demo").experiment_id
    else:
        experiment = client.create_experiment("demo")
    client.delete_experiment(experiment)
    finish(journal)
    assert tracker.sync(force=True), tracker.problem
    assert client.get_experiment_by_name("demo").lifecycle_stage == "active"
    _, found, _ = runs(tmp_path)
    assert len(found) == (3 if begun else 2)


def test_an_experiment_that_stays_deleted_is_replaced_by_another(journal, tmp_path, monkeypatch):
    from mlflow.exceptions import MlflowException

    def refuse(*arguments):
        raise MlflowException("not allowed")

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.delete_experiment(client.create_experiment("demo"))
    monkeypatch.setattr(MlflowClient, "restore_experiment", refuse)
    finish(journal)
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    assert client.get_experiment_by_name("demo (run)").lifecycle_stage == "active"


@pytest.mark.parametrize("name", ["a%20b", "a?b", "a#b c", "ä@b:c"])
def test_folders_of_any_name_hold_a_store(journal, tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    finish(journal)
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    assert tracker.sync(), tracker.problem
    (tmp_path / "file.txt").write_text("x")
    assert tracker.artifacts("demo", "t", [tmp_path / "file.txt"])
    assert (folder / "mlflow.db").exists()
    assert len(list(folder.glob("mlruns/*/artifacts/file.txt"))) == 1


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"uri": 3, "sweeps": 4}', "[" * 10**5])
def test_a_damaged_note_of_what_was_sent_sends_all_again(journal, tmp_path, text):
    finish(journal)
    folder = RunFolder(tmp_path / "run")
    folder.tracking.write_text(text)
    assert Tracker(folder, ["demo"], {}).sync()
    assert len(runs(tmp_path)[1]) == 2


def test_what_ended_how_stands_in_the_store(journal, tmp_path):
    for trial, status in (("u", "stopped_early"), ("v", "failed")):
        journal.write("started", trial=trial, config={"loss.beta": 0.5})
        journal.write("finished", trial=trial, status=status, error="broke" if status == "failed" else None)
    finish(journal)
    assert Tracker(RunFolder(tmp_path / "run"), ["demo"], {}).sync()
    _, _, children = runs(tmp_path)
    assert {c.data.tags["trial_id"]: c.info.status for c in children} == {
        "t": "FINISHED", "u": "KILLED", "v": "FAILED",
    }  # fmt: skip
    assert [c.data.tags.get("error") for c in children if c.data.tags["trial_id"] == "v"] == ["broke"]


def test_descriptions_are_no_longer_than_mlflow_takes(journal, tmp_path):
    """MLflow's servers refuse tags of more than 5,000 characters."""
    tracker = Tracker(RunFolder(tmp_path / "run"), ["demo"], {})
    tracker.sync()
    finish(journal)
    tracker.sync()
    tracker.conclude("demo", "t", {"a/x": 2.0}, "table " * 2000, "", "about " * 2000)
    client, found, _ = runs(tmp_path)
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parent.data.tags["mlflow.note.content"]) == 5000
    assert len(client.get_experiment_by_name("demo").tags["mlflow.note.content"]) == 5000
