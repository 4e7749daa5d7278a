"""How far a sweep is, on records worked by hand."""

import pytest

from distrecon.record.journal import SweepRecord, TrialRecord
from distrecon.report.progress import TRAINING, standing


def record(*trials: TrialRecord, total: int, epochs: int | None = 10) -> SweepRecord:
    return SweepRecord("s", "autoencoder", "a/x", "max", total, epochs, trials={t.trial: t for t in trials})


def test_what_is_done_counts_ended_trials_and_the_epochs_of_running_ones():
    """One of four trials ended, one has trained 5 of its 10 epochs: (1 + .9 x .5) / 4."""
    ended = TrialRecord("0", {"lr": 1}, 0.0, 1.0, "completed", epochs={10: {"a/x": 0.25}})
    failed = TrialRecord("1", {"lr": 2}, 0.0, 1.0, "failed")
    running = TrialRecord("2", {"lr": 3}, 0.0, epochs={4: {}, 5: {"a/x": 0.125}})
    found = standing(record(ended, running, total=4))
    assert TRAINING == 0.9
    assert found.share == pytest.approx(1.45 / 4)
    assert (found.ended, found.failed, found.value) == (1, 0, 0.25)
    assert [text.split()[-1] for text in found.running] == ["5/10"]
    assert standing(record(ended, failed, total=2)).share == 1.0
    assert standing(record(ended, failed, total=2)).failed == 1
    assert standing(record(running, total=1, epochs=None)).share == 0.0
    assert standing(SweepRecord("s")).share == 0.0
