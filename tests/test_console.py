"""What commands print while they work."""

import pytest

from distrecon.console import Progress


@pytest.fixture
def stage(monkeypatch, capsys):
    """Prints two steps and a result; returns what stderr got."""

    def printed(terminal, verbose):
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
        monkeypatch.setattr(Progress, "verbose", verbose)
        progress = Progress("zoo")
        progress.show("1 of 9, about 8.0 s left")
        progress.show("2 of 9, about 7.0 s left")
        progress.done("9 models")
        return capsys.readouterr().err

    return printed


def test_a_terminals_line_is_rewritten_with_the_time_left(stage):
    err = stage(terminal=True, verbose=False)
    assert err.count("\n") == 1
    assert [part[3:].strip() for part in err.split("\r")[1:3]] == [
        "zoo       1 of 9, about 8.0 s left",
        "zoo       2 of 9, about 7.0 s left",
    ]
    assert err.split("\r")[3].startswith("\033[Kzoo       9 models (0.0 s)")


def test_elsewhere_only_results_are_printed(stage):
    assert stage(terminal=False, verbose=False) == "zoo       9 models (0.0 s)\n"


def test_elsewhere_verbose_prints_a_line_now_and_then(stage):
    lines = stage(terminal=False, verbose=True).splitlines()
    assert lines == ["zoo       1 of 9, about 8.0 s left", "zoo       9 models (0.0 s)"]
