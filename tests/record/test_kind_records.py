"""What a kind says of itself cannot be changed, and what it does not say is the careful choice."""

import dataclasses
import inspect

from distrecon.record import kind as module


def test_no_record_of_a_kind_can_be_changed():
    """They are shared by everything that runs in a process."""
    found = (c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__)
    records = [c for c in found if dataclasses.is_dataclass(c)]
    assert {c.__name__ for c in records} >= {"Metric", "Drawing", "Table", "Needs", "Trial", "Served", "Kind"}
    assert [c.__name__ for c in records if not c.__dataclass_params__.frozen] == []


def test_what_a_kind_leaves_out():
    metric = module.Metric("a/x", "x", str, "the x")
    assert metric.objective
    assert not metric.every_epoch  # early stopping by it is refused
    plain = module.Kind("k", object, dict, (metric,), "a/x", "max", {})
    assert not plain.reports_itself  # Ray Tune hears of it when it ends
    assert (plain.offer, plain.serve, plain.figures, plain.epochs(None)) == (None, None, (), None)
