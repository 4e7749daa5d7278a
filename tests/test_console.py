"""What commands print while they work."""

import json

import pytest

from distrecon.console import Progress, kept


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


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by hand."""
    at = [1000.0]
    monkeypatch.setattr("distrecon.console.time.monotonic", lambda: at[0])
    return at


@pytest.mark.parametrize(("verbose", "every"), [(False, 60), (True, 15)])
def test_elsewhere_a_line_now_and_then_and_the_result_are_printed(monkeypatch, capsys, clock, verbose, every):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    monkeypatch.setattr(Progress, "verbose", verbose)
    progress = Progress("zoo")
    for second in range(150):
        clock[0] = 1000.0 + second
        progress.show(f"{second} of 150")
    progress.done("150 models")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"zoo       {s} of 150" for s in range(every, 150, every)), "zoo       150 models (2 min 29 s)"]


def test_short_work_prints_its_result_alone(stage):
    assert stage(terminal=False, verbose=False) == "zoo       9 models (0.0 s)\n"


def test_the_last_line_is_kept_every_few_seconds(tmp_path, clock, capsys):
    def text():
        return json.loads(file.read_text())["text"]

    file = tmp_path / "progress.json"
    with kept(file):
        progress = Progress("zoo")
        progress.show("1 of 9")
        progress.show("2 of 9")
        assert text() == "1 of 9"
        clock[0] += 6
        progress.show("3 of 9")
        assert text() == "3 of 9"
        progress.done("9 models")
    assert text() == "9 models"
    Progress("zoo").show("elsewhere")
    assert text() == "9 models"
