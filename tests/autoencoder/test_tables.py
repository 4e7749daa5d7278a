"""The benchmark's cells and tables: what is finished stays, means and spreads, 80 columns."""

import pytest

from benchmarks.autoencoder.bench import Bench, Column, percent, summary, table


def test_a_finished_cell_is_not_run_again(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return [{"value": 2.0}, {"case": "a, finer", "value": 3.0}]

    for _ in range(2):
        bench = Bench(None, 1, tmp_path, "part")  # type: ignore[arg-type]
        bench.cell("a", 0, work)
    assert len(calls) == 1
    assert bench.rows == [{"case": "a", "seed": 0, "value": 2.0}, {"case": "a, finer", "seed": 0, "value": 3.0}]
    some = Bench(None, 1, tmp_path, "part", only=["b"])  # type: ignore[arg-type]
    some.cell("a", 0, work)
    assert some.rows == []


def test_tables_hold_means_and_deviations_in_80_columns():
    rows = [{"case": "a", "seed": i, "share": share, "kind": "x"} for i, share in enumerate((0.5, 0.6, 0.7))]
    lines = summary([*rows, {"case": "b", "seed": 0, "other": 1.0}])
    assert lines[0]["mean"]["share"] == pytest.approx(0.6)
    assert lines[0]["deviation"]["share"] == pytest.approx(0.1)
    assert table(lines, (percent("share", "share"),), "shares (%)").splitlines() == [
        "shares (%)",
        "      share",
        "a 60.0±10.0",
    ]
    with pytest.raises(ValueError, match="columns"):
        table(lines, tuple(Column("share", "x" * 20) for _ in range(5)), "wide")
