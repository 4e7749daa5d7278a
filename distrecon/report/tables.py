"""The table of a sweep, for the terminal and the page; its columns are the metrics of the sweep's kind."""

from collections.abc import Mapping
from typing import Any

from distrecon import console
from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Kind


def label(config: Mapping[str, Any]) -> str:
    """A trial's short name: its swept values."""
    words = []
    for key, value in config.items():
        if isinstance(value, str):
            words.append(value)
        elif isinstance(value, list):
            words.append("+".join(map(str, value)))
        else:
            words.append(f"{key.rsplit('.', 1)[-1]} {value:.3g}" if isinstance(value, float) else f"{value}")
    return ", ".join(words) or "trial"


def heading(sweep: SweepRecord) -> str:
    """What a sweep's trials differ in."""
    keys = next((list(t.config) for t in sweep.trials.values()), [])
    return ", ".join(keys) or "trial"


def rows(sweep: SweepRecord, kind: Kind) -> list[list[str]]:
    """One row a trial: its label, then its metrics as text; a failed trial's status stands in the first."""
    table = []
    best = sweep.best()
    for trial in sweep.trials.values():
        mark = " *" if trial is best else ""
        cells = [metric.text(trial.metrics.get(metric.name)) for metric in kind.columns]
        if cells and trial.status != "completed":
            cells[0] = trial.status.replace("_", " ")
        table.append([label(trial.config) + mark, *cells])
    return table


def legend(kind: Kind) -> list[str]:
    """One line a column: what it means."""
    return [f"{metric.heading}: {metric.meaning}" for metric in kind.columns]


def render(sweep: SweepRecord, kind: Kind) -> str:
    """A sweep's table for the terminal, its best trial marked."""
    header = [heading(sweep), *(metric.heading for metric in kind.columns)]
    return console.table(header, rows(sweep, kind))
