"""What a kind of trial is: one object, from which running, objectives, tables, figures, help and docs are derived.

The kinds themselves are the files of `distrecon/kinds/`; docs/extending.md has a whole one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrecon.record.journal import SweepRecord

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # trial -> name -> values, as the trials stored them in arrays.npz


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def two_digits(value: float) -> str:
    return f"{value:.2f}"


def scientific(value: float) -> str:
    return f"{value:.0e}"


def whole(value: float) -> str:
    return f"{value:.0f}"


def sizes(value: list[int]) -> str:
    return "-".join(map(str, value))


def yes_or_no(value: float) -> str:
    return "yes" if value else "no"


@dataclass(frozen=True)
class Metric:
    """One number of a trial. With a heading it is a column of the tables, where `write` makes text of it."""

    name: str  # as the trial reports it, like recover/queries
    heading: str
    write: Callable[[Any], str]
    meaning: str
    objective: bool = True  # whether a sweep may choose its best trial by it
    every_epoch: bool = False  # whether it is known while the trial runs, so that bad trials can be stopped early

    def text(self, value: Any) -> str:
        """A value as tables show it: `-` for None; numbers that are not finite are text in a journal, and stay it."""
        return "-" if value is None else value if isinstance(value, str) else self.write(value)


@dataclass(frozen=True)
class Drawing:
    """A figure (matplotlib's) with its title and the sentences that stand for it where it cannot be seen."""

    name: str
    title: str
    description: str
    figure: Any


@dataclass(frozen=True)
class Table:
    """A small table of the report, as text, with the sentences that say what it shows; without rows, these alone."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


@dataclass(frozen=True)
class Needs:
    """What one trial takes of the cluster, as {"CPU": ..., "GPU": ...}."""

    process: Mapping[str, float]  # reserved by Ray Tune for the trial's own process
    whole: Mapping[str, float]  # with the workers that it starts itself
    least: Mapping[str, float]  # with as few workers as it can go on with


ONE_CPU = Needs({"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0})


@dataclass(frozen=True)
class Trial:
    """What a trial is given besides its configuration."""

    name: str
    zoos: Mapping[str, Any]  # the sweep's opened zoos by the names that the space file has for them
    storage: str  # where the sweep's trials lie, reached by every node
    folder: Path  # what is written here becomes the trial's artifacts: models' files, and arrays.npz for the figures


@dataclass(frozen=True)
class Served:
    """A trial's model for callers who know numpy only: `call(array, **options)` answers with an array."""

    model: Any  # the thing itself
    call: Callable[..., np.ndarray]
    example: np.ndarray  # of what it takes
    options: Mapping[str, str | int | float] = field(default_factory=dict)  # their defaults


@dataclass(frozen=True)
class Kind:
    """A kind of trial.

    `run(config, trial)` does one and returns its metrics; it is called in a process of its own, on any node.
    A configuration with a field `zoo` (a tuple of names or folders) gets these zoos opened in `trial.zoos`.
    """

    name: str
    config_type: type  # a frozen dataclass that can be made without arguments
    run: Callable[[Any, Trial], Mapping[str, Any]]
    metrics: tuple[Metric, ...]
    objective: str  # the default of a sweep's `metric`, and `mode` of its `mode`
    mode: str  # max or min
    smoke: Mapping[str, Any]  # dotted settings that make a trial as small as can be
    figures: tuple[Callable[[SweepRecord, Arrays], Drawing | None], ...] = ()  # None where there is nothing to draw
    tables: tuple[Callable[[SweepRecord, Arrays], Table | None], ...] = ()  # of the report, beside the trials' own
    needs: Callable[[Any], Needs] = lambda config: ONE_CPU
    epochs: Callable[[Any], int | None] = lambda config: None  # how many a trial reports, where it does
    reports_itself: bool = (
        False  # epoch by epoch to Ray Tune, with the time; what `run` returns is reported in any case
    )
    offer: tuple[str, str] | None = None  # of the best trial: what it is, and the line of Python that loads {run}
    serve: Callable[[Path], Served | None] | None = None  # the model of a folder with a trial's files, where it has one

    @property
    def columns(self) -> tuple[Metric, ...]:
        """The metrics that tables show."""
        return tuple(metric for metric in self.metrics if metric.heading)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metrics that a sweep may choose by, the default first."""
        others = (metric.name for metric in self.metrics if metric.objective and metric.name != self.objective)
        return (self.objective, *others)

    def drawings(self, sweep: SweepRecord, arrays: Arrays) -> list[Drawing]:
        """All figures of a sweep that have something to show."""
        made = (draw(sweep, arrays) for draw in self.figures)
        return [drawing for drawing in made if drawing is not None]
