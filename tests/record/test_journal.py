"""The journal: whole lines only, the last word wins, a torn line costs nothing else."""

import json

import numpy as np
import pytest

from distrecon.record.journal import Journal, SweepRecord, read_sweep


def start(tmp_path):
    journal = Journal(tmp_path / "demo" / "journal.jsonl")
    journal.write("sweep", name="demo", kind="autoencoder", metric="a/x", mode="max", trials=2)
    for trial in "pq":
        journal.write("started", trial=trial, config={"loss.beta": 0.1})
    return journal


def test_events_become_a_record(tmp_path):
    journal = start(tmp_path)
    journal.write("metrics", trial="p", epoch=1, metrics={"a/x": 1.0, "a/y": np.float32(0.5)})
    journal.write("metrics", trial="p", epoch=2, metrics={"a/x": 3.0})
    journal.write("metrics", trial="q", epoch=1, metrics={"a/x": 2.0})
    journal.write("finished", trial="p", status="completed", error=None)
    journal.write("finished", trial="q", status="failed", error="boom")
    journal.write("done")
    record = read_sweep(journal.path)
    assert record.name == "demo"
    assert record.best().trial == "p"
    assert record.trials["p"].metrics == {"a/x": 3.0, "a/y": 0.5}
    assert record.trials["q"].error == "boom"
    times = [event["time"] for event in journal.read()[0]]
    assert record.seconds == pytest.approx(times[-1] - times[0])


def test_time_between_an_interruption_and_the_next_start_does_not_count():
    record = SweepRecord("demo")
    begin = {"event": "sweep", "kind": "autoencoder", "metric": "a/x", "mode": "max", "trials": 1}
    for event, at in ((begin, 100), ({"event": "started", "trial": "p", "config": {}}, 104), (begin, 1000)):
        record.apply({**event, "time": at})
    record.apply({"event": "done", "time": 1003})
    assert record.seconds == 7


def test_best_follows_the_mode_and_skips_what_has_no_number(tmp_path):
    journal = start(tmp_path)
    journal.write("metrics", trial="p", epoch=1, metrics={"a/x": float("nan")})
    journal.write("metrics", trial="q", epoch=1, metrics={"a/x": 2.0})
    record = read_sweep(journal.path)
    assert record.best().trial == "q"
    assert record.trials["p"].metrics["a/x"] == "nan"  # kept, not dropped


def test_a_trial_that_failed_is_not_the_best(tmp_path):
    """It may have the least loss so far, and leaves no model."""
    journal = start(tmp_path)
    journal.write("metrics", trial="p", epoch=1, metrics={"a/x": 1.0})
    journal.write("metrics", trial="q", epoch=1, metrics={"a/x": 2.0})
    journal.write("finished", trial="p", status="completed", error=None)
    journal.write("finished", trial="q", status="failed", error="boom")
    assert read_sweep(journal.path).best().trial == "p"


def test_a_torn_line_is_neither_read_nor_harmful(tmp_path):
    journal = start(tmp_path)
    with open(journal.path, "a") as file:
        file.write('{"event": "metrics", "trial": "p", "epo')
    assert [e["event"] for e in journal.read()[0]] == ["sweep", "started", "started"]
    journal.write("finished", trial="p", status="completed", error=None)
    assert [e["event"] for e in journal.read()[0]] == ["sweep", "started", "started", "finished"]


def test_reading_goes_on_where_it_stopped(tmp_path):
    journal = start(tmp_path)
    _, offset = journal.read()
    assert journal.read(offset) == ([], offset)
    journal.write("done")
    events, end = journal.read(offset)
    assert [e["event"] for e in events] == ["done"]
    assert end == journal.path.stat().st_size


def test_a_resumed_trial_runs_again(tmp_path):
    journal = start(tmp_path)
    journal.write("finished", trial="p", status="failed", error="lost")
    journal.write("started", trial="p", config={"loss.beta": 0.1})
    assert read_sweep(journal.path).trials["p"].status == "running"
    assert json.loads(journal.path.read_text().splitlines()[0])["event"] == "sweep"


def test_a_restart_forgets_the_trials_before(tmp_path):
    journal = start(tmp_path)
    journal.write("restart")
    journal.write("started", trial="r", config={"loss.beta": 0.2})
    assert list(read_sweep(journal.path).trials) == ["r"]


def test_best_is_the_least_where_less_is_better(tmp_path):
    journal = Journal(tmp_path / "demo" / "journal.jsonl")
    journal.write("sweep", name="demo", kind="expand_cluster", metric="a/x", mode="min", trials=2)
    for trial, value in (("p", 2.0), ("q", 1.0)):
        journal.write("started", trial=trial, config={})
        journal.write("metrics", trial=trial, epoch=0, metrics={"a/x": value})
    assert read_sweep(journal.path).best().trial == "q"


def test_a_line_that_is_still_being_written_is_read_later_and_whole(tmp_path):
    journal = start(tmp_path)
    _, offset = journal.read()
    line = json.dumps({"event": "done", "time": 1.0}) + "\n"
    with open(journal.path, "a") as file:
        file.write(line[:10])
        file.flush()
        assert journal.read(offset) == ([], offset)
        file.write(line[10:])
    assert [e["event"] for e in journal.read(offset)[0]] == ["done"]
