"""Tables show the right metric, in the right unit, under its heading, and mark the best trial alone."""

import math
from pathlib import Path

import pytest

from distrecon.kinds import KINDS
from distrecon.record.journal import Journal, SweepRecord, TrialRecord, read_sweep
from distrecon.record.kind import percent, scientific, two_digits
from distrecon.report import tables


def sweep(kind: str, mode: str = "max") -> SweepRecord:
    """Three trials in whose metrics every number is another."""
    record = SweepRecord("demo", kind=kind, metric=KINDS[kind].objective, mode=mode)
    for number in range(3):
        trial = TrialRecord(f"t{number}", {"loss.beta": number / 4}, 0.0, status="completed")
        trial.epochs[0] = {m.name: (i + 1) / 1000 + number / 10 for i, m in enumerate(KINDS[kind].metrics)}
        record.trials[trial.trial] = trial
    return record


@pytest.mark.parametrize("kind", ["autoencoder"])
def test_a_column_shows_the_metric_of_its_heading(kind: str) -> None:
    record, columns = sweep(kind), KINDS[kind].columns
    header, _, *lines = tables.render(record, KINDS[kind]).splitlines()
    assert [word for word in header.split() if word != tables.heading(record)] == " ".join(
        m.heading for m in columns
    ).split()
    for trial, row in zip(record.trials.values(), tables.rows(record, KINDS[kind]), strict=True):
        assert row[1:] == [metric.write(trial.metrics[metric.name]) for metric in columns]
        assert len(set(row[1:])) > len(columns) // 2
    assert len(lines) == 3


def test_numbers_that_are_not_finite_stand_in_their_column(tmp_path: Path) -> None:
    """As the journal keeps them; they cost neither the table nor the run."""
    journal = Journal(tmp_path / "demo" / "journal.jsonl")
    journal.write("sweep", name="demo", kind="autoencoder", metric="reconstruct/agreement", mode="max", trials=1)
    journal.write("started", trial="t", config={})
    found = {
        metric.name: value
        for metric, value in zip(KINDS["autoencoder"].columns, (math.nan, math.inf, 0.5), strict=False)
    }
    journal.write("metrics", trial="t", epoch=0, metrics=found)
    journal.write("finished", trial="t", status="completed", error=None)
    assert tables.rows(read_sweep(journal.path), KINDS["autoencoder"])[0][1:5] == ["nan", "inf", "50.0", "-"]


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 0)])
def test_the_best_trial_alone_has_a_star(mode: str, best: int) -> None:
    rows = tables.rows(sweep("autoencoder", mode), KINDS["autoencoder"])
    assert [row[0].endswith(" *") for row in rows] == [number == best for number in range(3)]


def test_how_a_trial_ended_stands_in_its_row() -> None:
    record = sweep("autoencoder")
    record.trials["t0"].status, record.trials["t1"].status = "failed", "stopped_early"
    assert [row[1] for row in tables.rows(record, KINDS["autoencoder"])][:2] == ["failed", "stopped early"]


def test_numbers_are_written_in_their_units() -> None:
    assert (percent(0.1234), percent(1.0), percent(0)) == ("12.3", "100.0", "0.0")
    assert two_digits(0.126) == "0.13"
    assert float(scientific(1.25e-7)) == pytest.approx(1.25e-7, rel=0.3)


AS_SHARES = ("reconstruct/agreement", "reconstruct/accuracy_mean", "generate/accuracy_mean", "reconstruct/own_nearest")


@pytest.mark.parametrize("name", AS_SHARES)
def test_shares_are_shown_in_percent(name: str) -> None:
    (metric,) = [metric for metric in KINDS["autoencoder"].metrics if metric.name == name]
    assert metric.write(0.5) == "50.0"
    assert "%" in metric.meaning
