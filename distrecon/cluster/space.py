"""Space files: one sweep as YAML, read and checked completely before anything starts.

name: loss_weights
kind: autoencoder                # or expand_cluster
metric: reconstruct/agreement    # the objective, a metric of that kind
mode: max
scheduler: fifo                  # or asha: stop the worse half of the trials early
max_concurrent: 2                # trials at once; left out: as many as the cluster holds
samples: 1                       # draws of the random dimensions; a grid is run once per draw
base: {optim.epochs: 24}         # dotted names of the run's configuration
space:
  loss.terms: {grid: [C+S, C+S+B]}
  optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distrecon import config
from distrecon.errors import UserError, nearest, said
from distrecon.record.kind import Kind

KEYS = ("name", "kind", "metric", "mode", "scheduler", "max_concurrent", "samples", "base", "space")
SCHEDULERS = ("fifo", "asha")
RANGES = ("uniform", "loguniform", "randint")
MOST_TRIALS = 10_000  # of a sweep
DIMENSIONS = ("grid", "choice", *RANGES)


@dataclass(frozen=True)
class Dimension:
    """One swept key: `grid` and `choice` list values, the others give [low, high]."""

    how: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep; `base` is a complete configuration of its kind."""

    name: str
    kind: Kind
    metric: str
    mode: str
    scheduler: str
    max_concurrent: int | None
    samples: int
    base: Any
    space: dict[str, Dimension]

    @property
    def trials(self) -> int:
        """How many trials the sweep runs."""
        return self.samples * math.prod(len(d.values) for d in self.space.values() if d.how == "grid")

    @property
    def zoos(self) -> set[str]:
        """Every zoo that a trial may name."""
        values = self.space["zoo"].values if "zoo" in self.space else [getattr(self.base, "zoo", ())]
        return {name for zoo in values for name in zoo}

    def grid(self) -> Any:
        """Every combination of the grid dimensions, as dotted values."""
        grids = {key: d.values for key, d in self.space.items() if d.how == "grid"}
        return (dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values()))


def read_space(
    path: str | Path, kinds: Mapping[str, Kind], overrides: Mapping[str, Any] | None = None, smoke: bool = False
) -> Sweep:
    """Reads and checks a space file of one of these kinds.

    `overrides` are dotted values laid over the base (from `--set` and the other options); with `smoke` the base is
    shrunk and each grid keeps its first and last value. Raises UserError that names the file and the key.
    """
    path = Path(path)
    data = _load(path)
    for key in data:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), KEYS)}")
    for key in ("name", "kind", "space"):
        if key not in data:
            raise UserError(f"{path}: the key {key!r} is missing")
    name = _text(data, "name", path)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise UserError(
            f"{path}: name {name!r} may hold letters, digits, '_', '-' and '.' only, at most 100, "
            "and begin with a letter, a digit or '_'"
        )
    kind = kinds[_one_of(data, "kind", kinds, path)]
    dimensions = _dimensions(data, kind, path)
    base_values = _mapping(data, "base", path)
    for key in base_values:
        if key in dimensions:
            raise UserError(f"{path}: {key!r} stands both in base and in space")
    base, dimensions = _settle(kind, base_values, dimensions, overrides or {}, smoke, f"{path}: base")
    sweep = Sweep(
        name=name,
        kind=kind,
        metric=_one_of(data, "metric", kind.objectives, path, default=kind.objective),
        mode=_one_of(data, "mode", ("max", "min"), path, default=kind.mode),
        scheduler=_one_of(data, "scheduler", SCHEDULERS, path, default="fifo"),
        max_concurrent=_count(data, "max_concurrent", path),
        samples=_count(data, "samples", path) or 1,
        base=base,
        space=dimensions,
    )
    if sweep.trials > MOST_TRIALS:
        raise UserError(
            f"{path}: space has {sweep.trials:,} trials, more than {MOST_TRIALS:,}: shorten its grids, or draw samples "
            "of choice and ranges instead"
        )
    _check_scheduler(sweep, path)
    _check_every_corner(sweep, str(path))
    return sweep


def one_trial(
    name: str, kind: Kind, values: Mapping[str, Any], overrides: Mapping[str, Any], smoke: bool, source: str
) -> Sweep:
    """A sweep of a single trial, which is shown by its `values`; UserError names the source of a wrong one."""
    known = config.fields(kind.config_type)
    fixed = {key: Dimension("grid", (config.convert(v, known[key], f"{source} {key}"),)) for key, v in values.items()}
    base, dimensions = _settle(kind, values, fixed, overrides, smoke, source)
    sweep = Sweep(name, kind, kind.objective, kind.mode, "fifo", None, 1, base, dimensions)
    _check_every_corner(sweep, source)
    return sweep


def _settle(
    kind: Kind,
    base_values: Mapping[str, Any],
    dimensions: dict[str, Dimension],
    overrides: Mapping[str, Any],
    smoke: bool,
    source: str,
) -> tuple[Any, dict[str, Dimension]]:
    """The complete base configuration and what is swept, after `--smoke` and the overrides."""
    base = config.replace(kind.config_type(), base_values, source)
    if smoke:
        base = config.replace(base, kind.smoke, "--smoke")
        dimensions = {key: _ends(d) for key, d in dimensions.items()}
    known = config.fields(kind.config_type)
    base = config.replace(base, {k: v for k, v in overrides.items() if k in known}, "--set")
    return base, {key: d for key, d in dimensions.items() if key not in overrides}


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such space file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        data = yaml.safe_load(text)
    except config.NOT_YAML as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f" near line {line + 1}" if line is not None else ""
        raise UserError(f"{path}: not YAML{where} ({getattr(error, 'problem', None) or said(error)})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a space file: wanted keys such as name, kind and space")
    return data


def _text(data: Mapping[str, Any], key: str, path: Path) -> str:
    if not isinstance(data[key], str):
        raise UserError(f"{path}: {key} must be text, not {data[key]!r}")
    return data[key]


def _one_of(data: Mapping[str, Any], key: str, known: Any, path: Path, default: str | None = None) -> str:
    if key not in data and default is not None:
        return default
    value = _text(data, key, path)
    if value not in known:
        raise UserError(f"{path}: {key} {value!r} is unknown{nearest(value, known)}")
    return value


def _count(data: Mapping[str, Any], key: str, path: Path) -> int | None:
    value = data.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{path}: {key} must be a whole number from 1, not {value!r}")
    return value


def _mapping(data: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must map dotted names to values, not {value!r}")
    return value


def _dimensions(data: Mapping[str, Any], kind: Kind, path: Path) -> dict[str, Dimension]:
    known = config.fields(kind.config_type)
    dimensions = {}
    for key, value in _mapping(data, "space", path).items():
        if key not in known:
            raise UserError(f"{path}: space: unknown key {key!r}{nearest(str(key), known)}")
        where = f"{path}: space: {key}"
        if not isinstance(value, dict) or len(value) != 1:
            raise UserError(f"{where} must be one of {{grid|choice: [...]}} or {{{'|'.join(RANGES)}: [low, high]}}")
        ((how, values),) = value.items()
        if how not in DIMENSIONS:
            raise UserError(f"{where}: unknown dimension {how!r}{nearest(str(how), DIMENSIONS)}")
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: {how} is empty; list at least one value")
        if how in RANGES and len(values) != 2:
            raise UserError(f"{where}: {how} wants [low, high], not {values!r}")
        converted = tuple(config.convert(v, known[key], where) for v in values)
        if how in RANGES and not (converted[0] < converted[1] and (how != "loguniform" or converted[0] > 0)):
            raise UserError(f"{where}: {how} wants {'0 < ' if how == 'loguniform' else ''}low < high, not {values!r}")
        dimensions[key] = Dimension(how, converted)
    return dimensions


def _ends(dimension: Dimension) -> Dimension:
    if dimension.how == "grid" and len(dimension.values) > 2:
        return Dimension("grid", (dimension.values[0], dimension.values[-1]))
    return dimension


def _check_scheduler(sweep: Sweep, path: Path) -> None:
    if sweep.scheduler != "asha":
        return
    early = [metric.name for metric in sweep.kind.metrics if metric.every_epoch]
    if sweep.metric not in early:
        use = f"metric {' or '.join(early)}, or scheduler fifo" if early else "scheduler fifo"
        raise UserError(
            f"{path}: scheduler asha compares trials at every epoch, and {sweep.metric} is known at their end only: "
            f"use {use}"
        )


def _check_every_corner(sweep: Sweep, source: str) -> None:
    """Builds every grid point and both ends of every range, so that a bad value is found before the first trial."""
    others = {key: d.values for key, d in sweep.space.items() if d.how != "grid"}
    longest = max((len(v) for v in others.values()), default=1)
    for values in sweep.grid():
        for i in range(longest):
            corner = {key: v[min(i, len(v) - 1)] for key, v in others.items()}
            config.replace(sweep.base, {**values, **corner}, f"{source}: space")
