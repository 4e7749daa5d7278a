"""The benchmarks: every part runs, finished cells stay, tables say what their rows hold, pages keep the rest."""

import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from benchmarks import harness, scaling, solvers
from benchmarks.__main__ import PARTS, main
from benchmarks.harness import BEGIN, CPU, END, SPEED, Cell, Part, Table, percent, share, spread, timing, written
from benchmarks.recovery import SUMMARY, TEACHERS
from benchmarks.recovery import tables as recovery_tables
from benchmarks.tune_run import stages, union
from tests.conftest import CHECKOUT, environment

QUICK = {"contrastive": "contrastive loss, 64 models", "tokens": "tokenise, cnn3, 16 models", "gpu": "Not measured"}


def options(folder, **values):
    return Namespace(**{"quick": False, "device": CPU, "rows": folder / "rows.jsonl", "only": None, **values})


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_a_line_of_help_and_options_of_its_own(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert PARTS[name].title in capsys.readouterr().out
    part = importlib.import_module(f"benchmarks.{PARTS[name].module}").PARTS[name]
    assert part.kept is not PARTS[name].suite


def test_help_lists_every_part(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and entry.title in text for name, entry in PARTS.items())


@pytest.mark.parametrize(("name", "line"), QUICK.items())
def test_a_quick_part_prints_its_table(name, line, capsys):
    assert main([name, "--quick"]) == 0
    printed = capsys.readouterr().out
    assert f"### {PARTS[name].title}" in printed
    assert line in printed


def test_recovery_writes_rows_json_and_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    command = ["recovery", "--quick", "--teachers", "synthetic", "--json", "all.json", "--page", "page.md"]
    for _ in range(2):  # the second time from the finished rows
        assert main(command) == 0
    (row,) = json.loads((tmp_path / "all.json").read_text())["recovery"]["rows"]
    assert (row["sizes"], row["activation"], row["seed"]) == ("2-2-1", "relu", 0)
    assert row["exact"]
    assert row["verified"]
    assert len((tmp_path / "runs/benchmarks/recovery.jsonl").read_text().splitlines()) == 1
    assert "| synthetic relu | 1 of 1 | 1 | 0 |" in page.read_text()
    assert "| d=2 | 1 of 1 |" in page.read_text()
    assert capsys.readouterr().out.count("teachers synthetic,") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if name not in QUICK])
def test_every_part_runs_with_quick(name, tmp_path):
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--json", "all.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"### {PARTS[name].title}" in done.stdout
    assert json.loads((tmp_path / "all.json").read_text())[name]["rows"]


def test_several_parts_run_each_in_a_process(monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(command[1:])
        return Namespace(returncode=int("linkage" in command))

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["gpu", "linkage", "--quick"]) == 1
    assert commands == [["-m", "benchmarks", name, "--quick"] for name in ("gpu", "linkage")]
    assert "failed: linkage" in capsys.readouterr().err
    commands.clear()
    assert main(["--quick"]) == 1
    assert [command[2] for command in commands] == [name for name, entry in PARTS.items() if entry.suite]


def test_a_missing_gpu_and_parts_without_one_are_said_in_a_line(capsys):
    lines = {"students": "measures behavioural", "nothing": "no part nothing", "": "no such device"}
    for words, line in ((name.split(), line) for name, line in lines.items()):
        if torch.cuda.is_available() and not words:
            continue
        with pytest.raises(SystemExit, match="2"):
            main([*words, "--device", "cuda"])
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("losses", "--zoo: which zoo?"),
        ("recovery --teachers synthetic --inputs 3", "choose nothing"),
        ("recovery --set students.cout=3 --teachers synthetic --quick", "students.count"),
        ("contrastive --page missing.md", "--page missing.md"),
    ],
)
def test_wrong_options_are_said_in_a_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert line in capsys.readouterr().err


def test_what_a_gpu_measures_needs_no_ray():
    modules = {f"benchmarks.{entry.module}" for entry in PARTS.values() if entry.gpu} | {"benchmarks.__main__"}
    code = f"import sys, {', '.join(modules)}; print({{'ray', 'mlflow'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- cells -------------------------------------------------------------------------------------------------------------


def counting(calls):
    def work(case):
        calls.append(case)
        return [{"value": 2.0}, {"case": f"{case}, finer", "value": 3.0}]

    cells = [Cell({"case": case}, lambda case=case: work(case)) for case in "ab"]
    return Part(lambda args: cells, (Table((spread("value", "value"),), by=lambda row: row["case"]),))


def test_a_finished_cell_is_not_worked_again(tmp_path):
    calls = []
    part = counting(calls)
    first = harness.measure(part, options(tmp_path, only=["a"]))
    assert first["rows"] == [{"case": "a", "value": 2.0}, {"case": "a, finer", "value": 3.0}]
    assert [row["case"] for row in harness.measure(part, options(tmp_path))["rows"]] == [
        "a",
        "a, finer",
        "b",
        "b, finer",
    ]
    assert calls == ["a", "b"]
    harness.measure(part, options(tmp_path, quick=True, only=["a"]))  # small sizes are other cells
    assert calls == ["a", "b", "a"]


def test_a_line_that_was_being_written_at_the_end_is_worked_again(tmp_path):
    calls = []
    part, rows = counting(calls), tmp_path / "rows.jsonl"
    harness.measure(part, options(tmp_path))
    rows.write_text(rows.read_text()[:-10])
    harness.measure(part, options(tmp_path))
    assert calls == ["a", "b", "b"]
    assert len([json.loads(line) for line in rows.read_text().splitlines()]) == 2


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_hold_means_and_deviations_in_80_columns():
    rows = [{"case": "a", "seed": i, "share": part, "kind": "x"} for i, part in enumerate((0.5, 0.6, 0.7))]
    rows.append({"case": "b", "seed": 0, "other": 1.0})
    table = Table((percent("share", "share"),), by=lambda row: row["case"], title="shares (%)", plain=True)
    assert written(table, rows).splitlines() == ["shares (%)", "      share", "a 60.0±10.0"]
    wide = table._replace(columns=tuple(spread("x" * 20, "share") for _ in range(5)))
    with pytest.raises(ValueError, match="columns"):
        written(wide, rows)


def test_a_total_counts_all_rows():
    rows = [{"kind": kind, "good": good} for kind, good in (("a", True), ("b", False), ("b", True))]
    table = Table((share("good", lambda row: row["good"]),), by=lambda row: row["kind"], heading="kind", total=True)
    assert written(table, rows).splitlines() == [
        "| kind | good |", "| --- | ---: |", "| a | 1 of 1 |", "| b | 1 of 2 |", "| all | 2 of 3 |",
    ]  # fmt: skip


def test_a_row_of_the_suite_says_median_and_extremes():
    row = timing("a", 0.5e-3, 1.0, [3000.0, 2.0, 12.34], "a note")
    line = "| a | 500 us | 1 s | **12.3** (2.0 to 3,000) | a note |"
    assert written(SPEED, [row]).splitlines()[-1] == line
    assert written(SPEED, [timing("b", math.nan)]).splitlines()[-1] == "| b | not reached |  |  |  |"


def recovered(sizes, exact, verified, distance, **more):
    row = {"teachers": "synthetic", "sizes": sizes, "activation": "g", "cpu_seconds": 1.0, "recover/queries": 1000}
    return row | {"exact": exact, "verified": verified, "recover/max_cosine_distance": distance} | more


def test_recoveries_are_counted():
    rows = [
        recovered("2-2-1", True, True, 1e-20),
        recovered("2-2-1", True, False, 2e-12, cpu_seconds=3.0),
        recovered("2-4-1", False, True, 0.5, cpu_seconds=2.0),
    ]
    assert (
        written(SUMMARY, rows).splitlines()[-1] == "| synthetic g | 2 of 3 | 2 | 1 | 2e-12 |  | 2.0, 3.0 | 1,000 |  |"
    )
    assert recovery_tables(rows, None).splitlines()[-1] == "| d=2 | 2 of 2 | 0 of 1 |"
    rows.append(recovered("64-20-10", True, True, 1e-20, teachers="shallow", **{"recover/agreement": 0.5}))
    assert "| 64-20-10 g | 1 of 1 | 1 | 0 | 1e-20 | 0.5000 | 1.0, 1.0 | 1,000 |  |" in written(SUMMARY, rows)
    assert written(SUMMARY, rows).splitlines()[-1].startswith("| all | 3 of 4 | 3 | 1 |")


def test_the_published_problems_are_chosen():
    chosen = Namespace(inputs=None, hidden=None, activation=["g"], seeds=None)
    assert len(list(TEACHERS["synthetic"].cases(chosen))) == 150
    assert len(list(TEACHERS["synthetic"].cases(Namespace(**vars(chosen) | {"activation": ["tanh"]})))) == 75
    other = Namespace(**vars(chosen) | {"hidden": [(15, 15)], "seeds": 1})
    assert list(TEACHERS["shallow"].cases(other)) == [((64, 15, 15, 10), "g", 0)]
    assert list(TEACHERS["wide"].cases(chosen)) == []


def test_where_adam_never_arrives_its_time_is_the_limit():
    row = {"limit": 10, "adam_seconds": 10.0, "adam_final": 1e-5, "solver_to_adams_final": 0.25}
    row |= {f"solver_to_{target:g}": math.inf for target in solvers.TARGETS}
    row |= {f"adam_to_{target:g}": math.inf for target in solvers.TARGETS} | {"solver_to_0.0001": 0.5}
    first, second, _, own = solvers.ratios([row])
    assert (first["ratio"], first["ours_seconds"], first["baseline_seconds"]) == (20, 0.5, 10)
    assert "by Adam on 0; a lower bound" in first["note"]
    assert math.isnan(second["ours_seconds"])
    assert own["ratio"] == 40


def test_a_step_of_the_model_cluster_is_the_sum_of_its_parts():
    job = scaling.Job(1e12, 1e9, 500 * 2**20, 2**20, 0.5, 100)
    cluster = scaling.Cluster(gpu_tflops=10, overhead_ms=1, latency_us=0, link_gbyte=100)
    terms = scaling.step_terms(job, cluster, 2, 10)
    assert terms == pytest.approx(
        {"arithmetic": 0.5, "overhead": 1e-3, "sending": 0.01, "gradients": 0.01, "checkpoint": 0.1,
         "reading": 0.3125, "storage": 0.02}
    )  # fmt: skip
    assert scaling.step_seconds(terms) == pytest.approx(0.611)
    hidden = scaling.step_terms(replace(job, backward=0.5), cluster, 2, 10)
    assert hidden["gradients"] == pytest.approx(0.01 / 120)  # the last of 1e9 bytes' buckets
    partly = scaling.step_terms(replace(job, backward=0.01), cluster, 2, 10)
    assert partly["gradients"] == pytest.approx(0.01 - 0.01 * 0.5)


def test_a_page_keeps_the_tables_that_were_not_measured_again(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    harness.replace_sections(page, ["### B\n\nold B\n", "### A\n\nold A\n", "### by hand\n"], ["A", "B"])
    harness.replace_sections(page, ["### A\n\nnew A\n"], ["A", "B"])
    assert page.read_text() == f"before\n{BEGIN}\n\n### A\n\nnew A\n\n### B\n\nold B\n\n### by hand\n\n{END}\nafter\n"


# -- what is computed besides times ------------------------------------------------------------------------------------


def test_overlapping_spans_count_once():
    assert union([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert union([]) == 0


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
    found = stages(marks, 72.0, tmp_path)
    assert found["stages"] == {"start": 4.0, "zoo": 5.0, "sweeps": 60.0, "report": 1.0, "end": 2.0}
    assert found["outside_seconds"] == pytest.approx(72 - 5 - 35)
    assert found["trials_at_once"] == pytest.approx((20 + 5 + 30) / 60)


def test_an_exponent_is_the_slope_of_a_power_law():
    assert harness.exponent([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
