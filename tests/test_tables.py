"""Tables show the right metric, in the right unit, under its heading, and mark the best trial alone."""

import pytest

from distrecon.kinds import KINDS
from distrecon.record.journal import SweepRecord, TrialRecord
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
