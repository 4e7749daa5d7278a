"""What the benchmarks compute besides times: a run's share outside work, exponents, and the page of tables."""

import json

import pytest
import torch

from benchmarks.__main__ import BEGIN, END, main, replace_tables, table
from benchmarks.default_run import _stages, _union
from benchmarks.suite.harness import exponent
from benchmarks.suite.steps import contrastive

ROW = {"what": "a", "ours_seconds": 0.5, "baseline_seconds": 1.0, "ratio": 2.0, "low": None, "high": None, "note": ""}


def found(what):
    machine = {"processor": "P", "torch": "T"}
    return {"quick": False, "device": "cpu", "machine": machine, "rows": [{**ROW, "what": what}]}


def test_overlapping_spans_count_once():
    assert _union([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert _union([]) == 0


def test_outside_work_is_what_no_trial_and_no_zoo_was_busy_with(tmp_path):
    journal = tmp_path / "run" / "sweeps" / "one" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    events = [
        {"event": "metrics", "time": 120.0, "trial": "a", "metrics": {"time/seconds": 10.0}},
        {"event": "metrics", "time": 130.0, "trial": "a", "metrics": {"time/seconds": 20.0}},  # 110 to 130
        {"event": "metrics", "time": 140.0, "trial": "a", "metrics": {"time/scoring_seconds": 5.0}},  # 135 on
        {"event": "metrics", "time": 132.0, "trial": "b", "metrics": {"time/seconds": 30.0}},  # 102 to 132
        {"event": "done", "time": 141.0},
    ]
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    marks = [
        (3.0, "zoo       digits: 0 of 9 models trained, time left unknown yet"),
        (8.0, "zoo       digits: 9 models, 9 states in /x (5.0 s)"),
        (1 + 8.0 + 60, "sweeps    2 trials done (1 min 00 s)"),
        (70.0, "report    run/report.html (1.0 s)"),
    ]
    stages = _stages(marks, 72.0, tmp_path)
    assert stages["stages"] == {"start": 4.0, "zoo": 5.0, "sweeps": 60.0, "report": 1.0, "end": 2.0}
    assert stages["outside_seconds"] == pytest.approx(72 - 5 - 35)
    assert stages["trials_at_once"] == pytest.approx((20 + 5 + 30) / 60)


def test_an_exponent_is_the_slope_of_a_power_law():
    assert exponent([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)


def test_a_page_keeps_the_tables_that_were_not_measured_again(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    replace_tables(page, {"growth": found("old growth"), "students": found("old students")})
    replace_tables(page, {"students": found("new students")})
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.index("new students") < text.index("old growth")
    assert "old students" not in text
    assert text.count("### ") == 2


def test_a_part_gives_rows():
    (row,) = contrastive(quick=True)
    assert row.ratio > 0
    assert "contrastive loss" in table("contrastive", {**found(""), "rows": [row.to_dict()]})


def test_a_missing_gpu_and_a_part_without_one_are_said_in_a_line(capsys):
    for options, line in ((["--only", "students"], "measures behavioural"), ([], "no such device")):
        if torch.cuda.is_available() and not options:
            continue
        with pytest.raises(SystemExit, match="2"):
            main(["--device", "cuda", *options])
        assert line in capsys.readouterr().err
