"""What a piece of work takes of its machine, on a clock that is given."""

import time

import pytest

from distrecon.record import usage as module


def test_the_share_of_a_cpu_is_by_the_wall(monkeypatch):
    """3 CPU seconds in 12 seconds of time are 25 %."""
    monkeypatch.setattr(time, "monotonic", lambda: 112.0)
    monkeypatch.setattr(module, "cpu_seconds", lambda: 8.0)
    found = module.usage(began=100.0, cpu=5.0)
    assert found["system/cpu_percent"] == pytest.approx(25.0)
    assert 0.01 < found["system/memory_peak_gib"] < 100
