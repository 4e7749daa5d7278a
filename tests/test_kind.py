"""A third kind of trial, defined in this file alone, is run by the real job on Ray, tabled, recorded and reported."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from distrecon import tune
from distrecon.console import DONE, SOME_FAILED
from distrecon.errors import UserError
from distrecon.kinds import KINDS
from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Arrays, Drawing, Kind, Metric, Trial, scientific, two_digits
from tests.conftest import CHECKOUT

SPACE = """
name: lines
kind: line
base: {points: 50}
space: {noise: {grid: [0.0, 0.5]}}
"""


@dataclass(frozen=True)
class LineConfig:
    points: int = 20
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 2:
            raise UserError(f"points must be at least 2, not {self.points}")


def run(config: LineConfig, trial: Trial) -> dict[str, float]:
    rng = np.random.default_rng(config.seed)
    x = rng.uniform(size=config.points)
    y = 3 * x + config.noise * rng.normal(size=config.points)
    if config.points > 1000:
        raise RuntimeError("too many points")
    slope, offset = np.polyfit(x, y, 1)
    np.savez(trial.folder / "arrays.npz", x=x, y=y)
    (trial.folder / "line.txt").write_text(f"{slope} {offset}")
    return {"line/slope": slope, "line/error": float(np.abs(slope - 3))}


def points(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from matplotlib.figure import Figure

    best = sweep.best()
    if best is None:
        return None
    figure = Figure()
    figure.subplots().scatter(arrays[best.trial]["x"], arrays[best.trial]["y"])
    return Drawing("points", "The best trial's points", f"{len(arrays[best.trial]['x'])} points of a line.", figure)


LINE = Kind(
    name="line",
    config_type=LineConfig,
    run=run,
    metrics=(
        Metric("line/error", "err", scientific, "difference of the fitted slope to the true one"),
        Metric("line/slope", "slope", two_digits, "the fitted slope"),
    ),
    objective="line/error",
    mode="min",
    smoke={"points": 3},
    figures=(points,),
)


@pytest.fixture
def folder(tmp_path, monkeypatch, ray_session):
    monkeypatch.setitem(KINDS, "line", LINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.yaml").write_text(SPACE)
    return tmp_path


def test_it_runs_is_tabled_recorded_and_reported(folder, capsys):
    code = tune.main(["--space", "lines.yaml", "--out", "run", "--json"])
    told = capsys.readouterr()
    assert code == DONE, told.err
    document = json.loads(told.out)
    (sweep,) = document["sweeps"]
    assert (sweep["kind"], sweep["metric"], sweep["mode"]) == ("line", "line/error", "min")
    exact, noisy = sweep["trials"]
    assert sweep["best"] == exact["trial_id"]
    assert exact["metrics"]["line/error"] < 1e-12 < noisy["metrics"]["line/error"]
    header = next(line for line in told.err.splitlines() if line.startswith("noise "))
    assert header.split() == ["noise", "err", "slope"]
    page = Path("run/report.html").read_text()
    assert "50 points of a line." in page
    assert "err: difference of the fitted slope to the true one; slope: the fitted slope" in page
    assert page.count("<figure>") == 2  # its own, and the metric against the noise
    assert "load_autoencoder" not in page
    assert (folder / "run" / "models" / "lines" / exact["trial_id"] / "line.txt").exists()
    client = MlflowClient(document["mlflow"])
    runs = client.search_runs([client.get_experiment_by_name("lines").experiment_id], "tags.trial_id != ''")
    assert {r.data.params["noise"]: r.data.metrics["line/slope"] for r in runs} == {
        "0.0": exact["metrics"]["line/slope"],
        "0.5": noisy["metrics"]["line/slope"],
    }


def test_its_wrong_values_and_failures_are_said_in_a_line(folder, capsys):
    assert tune.main(["--space", "lines.yaml", "--set", "points=1", "--out", "run"]) == 2
    assert "points must be at least 2, not 1" in capsys.readouterr().err
    assert not Path("run").exists()
    assert tune.main(["--space", "lines.yaml", "--set", "points=2000", "--out", "run"]) == SOME_FAILED
    out = capsys.readouterr().out
    assert out.count("failed: ") == 2
    assert "too many points" in out


def test_no_kind_is_asked_for_by_its_name():
    """What differs between kinds stands in their own files."""
    upper = [*(CHECKOUT / "distrecon").glob("*.py")]
    for folder in ("cluster", "record", "report"):
        upper += (CHECKOUT / "distrecon" / folder).glob("*.py")
    for file in upper:
        assert "kind ==" not in file.read_text(), file
        assert '"expand_cluster"' not in file.read_text(), file
