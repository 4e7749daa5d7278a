"""What is said of a sweep, on records whose best values, spreads and curves are known by hand."""

import pytest

from distrecon.kinds import KINDS
from distrecon.record.journal import SweepRecord
from distrecon.report.trends import Scored, advice, trends

KIND = KINDS["autoencoder"]


def sweep(trials, mode="max", losses=()):
    """A sweep of (configuration, metric) pairs; the first trial's losses by epoch are `losses`."""
    record = SweepRecord("s", "autoencoder", "a/x", mode, len(trials))
    for i, (config, value) in enumerate(trials):
        record.apply({"event": "started", "trial": f"{i}", "config": config, "time": 0.0})
        for epoch, loss in enumerate(losses if i == 0 else (), start=1):
            found = {"loss/total": loss}
            record.apply({"event": "metrics", "trial": f"{i}", "epoch": epoch, "metrics": found, "time": 0.0})
        if value is not None:
            last = max(len(losses), 1)
            record.apply({"event": "metrics", "trial": f"{i}", "epoch": last, "metrics": {"a/x": value}, "time": 0.0})
        status = "completed" if value is not None else "failed"
        record.apply({"event": "finished", "trial": f"{i}", "status": status, "error": None, "time": 0.0})
    return record


def by_width(*values, mode="max"):
    return sweep([({"model.width": 2**i}, value) for i, value in enumerate(values)], mode)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (by_width(0.1, 0.2, 0.3), ["model.width is best at the largest value tried, 4: try larger ones."]),
        (by_width(0.3, 0.2, 0.1), ["model.width is best at the smallest value tried, 1: try smaller ones."]),
        (by_width(0.3, 0.2, 0.1, mode="min"), ["model.width is best at the largest value tried, 4: try larger ones."]),
        (by_width(0.1, 0.3, 0.2), []),
        (by_width(0.5, 0.50001, 0.5), ["model.width makes hardly a difference between 1 and 4."]),
        (by_width(2.0, 4e-28, 3e-29, mode="min"), ["model.width makes hardly a difference between 2 and 4."]),
        (by_width(0.5), []),
        (by_width(None, None), []),
        (by_width(0.1, 0.3, None), ["model.width is best at the largest value tried, 2: try larger ones."]),
        (sweep([({"loss.terms": "C"}, 1.0), ({"loss.terms": "S"}, 2.0)]), []),
        (
            sweep([({"teacher.hidden": [2]}, 1.0), ({"teacher.hidden": [4]}, 2.0)]),
            ["teacher.hidden is best at the largest value tried, 4: try larger ones."],
        ),
        (sweep([({"teacher.hidden": [2, 2]}, 1.0), ({"teacher.hidden": [4, 2]}, 2.0)]), []),
    ],
)
def test_edges_of_the_grid(record, told):
    assert advice(record, KIND) == told


def test_the_best_is_chosen_by_the_mean_over_seeds_and_a_lead_within_their_spread_is_said():
    values = {(1, 0): 0.9, (1, 1): 0.3, (2, 0): 0.7, (2, 1): 0.6, (3, 0): 0.1, (3, 1): 0.1}
    record = sweep([({"w": w, "seed": s}, value) for (w, s), value in values.items()])
    assert [t.config["w"] for t in Scored.of(record).best()] == [2, 2]  # .65; the best trial alone is of 1, .6
    assert advice(record, KIND) == [
        "The best leads by 0.05, less than its spread over seeds, 0.1: more seeds would decide."
    ]
    drawing = trends(record)
    assert drawing is not None
    assert "Means over 2 seeds" in drawing.description
    assert "0.65 at w 2" in drawing.description
    assert "w: 1 0.6, 2 0.65, 3 0.1" in drawing.description


def test_lines_are_the_other_settings_and_have_the_spread_of_seeds():
    cases = [("a", 1, 0, 0.1), ("a", 1, 1, 0.3), ("a", 2, 0, 0.5), ("b", 1, 0, 0.4), ("b", 2, 0, 0.2)]
    record = sweep([({"kind": k, "w": w, "seed": s}, value) for k, w, s, value in cases])
    lines = Scored.of(record).lines("w")
    assert lines["a"] == [(1.0, pytest.approx(0.2), 0.1, 0.3), (2.0, 0.5, 0.5, 0.5)]
    assert lines["b"] == [(1.0, 0.4, 0.4, 0.4), (2.0, 0.2, 0.2, 0.2)]


def test_a_sweep_of_words_alone_draws_nothing():
    assert trends(sweep([({"loss.terms": "C"}, 1.0), ({"loss.terms": "S"}, 2.0)])) is None


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([8, 4, 2, 1.6, 1.5, 1.4, 1.2, 1.0], True),  # 1.4 to 1.0
        ([8, 4, 2, 1, 1, 1, 1, 0.99], False),
        ([1, 0.1, 0.01], False),  # too few to tell
        ([-1, -2, -4, -8], True),
    ],
)
def test_a_loss_that_still_falls_at_the_end(losses, told):
    found = advice(sweep([({"loss.terms": "C"}, 1.0)], losses=losses), KIND)
    assert any("train longer" in sentence for sentence in found) == told
