"""Where foreign models lie: Ray Tune trees, folders of checkpoint files with a table of properties, single files.

Every kind of source lists its models (`Model`: an id and where to look), and reads one model's properties and files
(`states`). Nothing here opens a checkpoint: `importing.py` does, with `checkpoints.py`.

A published zoo is a Ray Tune tree: one folder a model, with `params.json` (its configuration), `result.json` (a JSON
line an epoch) and `checkpoint_000020/checkpoints` (a state dict).
"""

import csv
import io
import json
import re
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow.fs as pafs

from distrecon.errors import UserError, said
from distrecon.zoos.checkpoints import SUFFIXES
from distrecon.zoos.storage import Store

# where result.json lines and tables of properties keep each metric
METRIC_NAMES = {
    "train_accuracy": ("train_accuracy", "train_acc"),
    "test_accuracy": ("test_accuracy", "test_acc"),
    "generalization_gap": ("generalization_gap", "ggap"),
    "train_loss": ("train_loss",),
}
LARGEST = float(np.finfo(np.float32).max)  # that a zoo's file can hold
NOT_MEASURED = -999  # what published zoos write for the training metrics of the untrained model
REQUIRED = ("train_accuracy", "test_accuracy")
ACCURACIES = ("train_accuracy", "test_accuracy")

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Model:
    """One model of a source: its id, and the files or the folder that hold it."""

    model_id: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """A checkpoint to read. `metrics` is None where the source says nothing of metrics at all."""

    epoch: int
    file: str
    metrics: Metrics | None
    config: str


@dataclass(frozen=True)
class Skip:
    """Something that is left out, and why."""

    file: str
    reason: str


class Source(Protocol):
    """A kind of source; pickles, so that tasks can read it."""

    @property
    def store(self) -> Store: ...

    @property
    def left_out(self) -> tuple["Skip", ...]: ...  # what belongs to no model

    def models(self) -> list[Model]: ...

    def states(self, model: Model) -> Iterator[State | Skip]: ...


def find(store: Store) -> Source:
    """The source at a path: a single checkpoint, a Ray Tune tree or a folder of checkpoint files; else UserError."""
    info = store.filesystem.get_file_info(store.root)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{store}: there is nothing to import")
    if info.is_file:
        folder, _, name = store.root.rpartition("/")
        return FileFolder(Store(store.filesystem, folder), (name,), {})
    files, folders, unnamed = _list(store, "")
    checkpoints = tuple(name for name in files if name.endswith(SUFFIXES) and name != "dataset.pt")
    if checkpoints:
        rows, no_tables = table_of(store, files, checkpoints)
        return FileFolder(store, checkpoints, rows, (*unnamed, *no_tables))
    found = [*unnamed, *_trials(store, "", folders, depth=3)]
    trials = tuple(trial for trial in found if isinstance(trial, str))
    if not trials:
        raise UserError(
            f"{store} is neither a Ray Tune tree (folders with params.json) nor a folder of {', '.join(SUFFIXES)} files"
        )
    return TuneTree(store, trials, tuple(skip for skip in found if isinstance(skip, Skip)))


def _list(store: Store, folder: str) -> tuple[list[str], list[str], list[Skip]]:
    """Names of the files and of the folders in a folder, sorted, and what has a name that is no text."""
    names: dict[bool, list[str]] = {True: [], False: []}
    unnamed = []
    for info in store.filesystem.get_file_info(pafs.FileSelector(store.path(folder).rstrip("/"))):
        try:
            names[info.is_file].append(info.base_name)
        except UnicodeDecodeError as error:
            name = bytes(error.object).decode(errors="backslashreplace")
            unnamed.append(Skip(f"{folder}/{name}".lstrip("/"), "its name is not UTF-8"))
    return sorted(names[True]), sorted(names[False]), unnamed


# -- Ray Tune trees ---------------------------------------------------------------------------------------------------


def _trials(store: Store, folder: str, folders: list[str], depth: int) -> Iterator[str | Skip]:
    """Folders of models below a folder. Names as Ray Tune gives them are taken without opening them."""
    for name in folders:
        path = f"{folder}/{name}".lstrip("/")
        if "_trainable_" in name:
            yield path
            continue
        try:
            files, inner, unnamed = _list(store, path)
        except OSError as error:
            yield Skip(path, f"cannot be read ({said(error)})")
            continue
        yield from unnamed
        if "params.json" in files or any(_epoch_of(n) is not None for n in inner):
            yield path
        elif depth > 1:
            yield from _trials(store, path, inner, depth - 1)


def _epoch_of(name: str) -> int | None:
    match = re.fullmatch(r"checkpoint_(\d+)", name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class TuneTree:
    """A Ray Tune experiment; a model's id is the name of its folder."""

    store: Store
    trials: tuple[str, ...]
    left_out: tuple[Skip, ...] = ()

    def models(self) -> list[Model]:
        return [Model(trial.rpartition("/")[2], (trial,)) for trial in self.trials]

    def states(self, model: Model) -> Iterator[State | Skip]:
        (trial,) = model.files
        files, folders, unnamed = _list(self.store, trial)
        yield from unnamed
        config = "{}"
        if "params.json" in files:
            try:
                content = json.loads(self.store.read(f"{trial}/params.json"))
                if not isinstance(content, dict):
                    yield Skip(f"{trial}/params.json", "not a JSON object")
                else:
                    config = json.dumps(content)
            except (ValueError, RecursionError, OSError):
                yield Skip(f"{trial}/params.json", "not JSON")
        results: dict[int, Metrics] = {}
        if "result.json" in files:
            results = yield from self._results(f"{trial}/result.json")
        epochs = sorted((epoch, name) for name in folders if (epoch := _epoch_of(name)) is not None)
        if not epochs:
            yield Skip(trial, "no checkpoints")
        for epoch, name in epochs:
            try:
                inside, _, _ = _list(self.store, f"{trial}/{name}")
            except OSError as error:
                yield Skip(f"{trial}/{name}", f"cannot be read ({said(error)})")
                continue
            chosen = [f for f in inside if f == "checkpoints" or f.endswith(SUFFIXES)]
            if len(chosen) != 1:
                yield Skip(f"{trial}/{name}", "no checkpoint file" if not chosen else "several checkpoint files")
            else:
                yield State(
                    epoch, f"{trial}/{name}/{chosen[0]}", results.get(epoch, dict.fromkeys(METRIC_NAMES)), config
                )

    def _results(self, file: str) -> Generator[Skip, None, dict[int, Metrics]]:
        results: dict[int, Metrics] = {}
        for number, line in enumerate(self.store.read(file).decode(errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                results[whole(entry["training_iteration"])] = metrics_of(entry)
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
                yield Skip(file, f"line {number} is not a result with a training_iteration")
        return results


# -- folders of files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileFolder:
    """Checkpoint files side by side, with the rows of a table of properties by file name, if there is one.

    A row names model_id and epoch; without them, `net7_epoch_20.pt` is epoch 20 of `net7`.
    """

    store: Store
    files: tuple[str, ...]
    properties: Mapping[str, Mapping[str, Any]]
    left_out: tuple[Skip, ...] = ()

    def models(self) -> list[Model]:
        grouped: dict[str, list[str]] = {}
        for file in self.files:
            grouped.setdefault(str(self._row(file).get("model_id") or self._named(file)[0]), []).append(file)
        return [Model(model_id, tuple(files)) for model_id, files in sorted(grouped.items())]

    def _row(self, file: str) -> Mapping[str, Any]:
        return self.properties.get(file, self.properties.get(file.rpartition(".")[0], {}))

    def _named(self, file: str) -> tuple[str, int]:
        """Model and epoch by the file's name."""
        stem = file.rpartition(".")[0]
        match = re.fullmatch(r"(.+?)[-_.](?:epoch|ep|checkpoint)[-_]?(\d+)", stem)
        return (match[1], int(match[2])) if match else (stem, 0)

    @cached_property
    def _columns(self) -> frozenset[str]:
        """The columns of the table in which any row has something."""
        return frozenset(
            key for row in self.properties.values() for key, value in row.items() if value not in (None, "")
        )

    def states(self, model: Model) -> Iterator[State | Skip]:
        known = {name for names in METRIC_NAMES.values() for name in names} | {*FILE_COLUMNS, "model_id", "epoch"}
        unknown = [metric for metric, names in METRIC_NAMES.items() if not self._columns & {*names}]
        found: list[tuple[int, str]] = []
        for file in model.files:
            epoch = self._row(file).get("epoch")
            try:
                found.append((self._named(file)[1] if epoch in (None, "") else whole(epoch), file))
            except (ArithmeticError, TypeError, ValueError):
                yield Skip(file, f"impossible epoch ({epoch!r:.40})")
        for epoch, file in sorted(found):
            row = self._row(file)
            try:
                metrics = metrics_of(row)
            except (ArithmeticError, TypeError, ValueError):
                yield Skip(file, "a metric is not a number")
                continue
            config = {str(key): value for key, value in row.items() if key not in known}
            # what the table has for no state at all is not missing, it is not known
            told = {metric: value for metric, value in metrics.items() if value is not None or metric not in unknown}
            yield State(epoch, file, told if self.properties else None, json.dumps(config))


FILE_COLUMNS = ("file", "filename", "path", "checkpoint")


def table_of(
    store: Store, files: list[str], checkpoints: Collection[str]
) -> tuple[dict[str, dict[str, Any]], list[Skip]]:
    """File name -> its row of the folder's table of properties; and files that could be one but name no checkpoint.

    Raises UserError where a table cannot be used, or several can.
    """
    known = {*checkpoints, *(name.rpartition(".")[0] for name in checkpoints)}
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    others = []
    for name in files:
        if not name.endswith((".csv", ".json")):
            continue
        path, content = store.path(name), store.read(name)
        try:
            rows = _by_file(path, _csv_rows(content) if name.endswith(".csv") else _json_rows(path, content))
        except UserError:
            if name.endswith(".csv") or not _is_json(content):
                raise
            rows = {}
        if rows.keys() & known:
            tables[name] = rows
        else:
            others.append(Skip(name, "no table of properties: it names no checkpoint file"))
    if len(tables) > 1:
        raise UserError(f"{store} has several tables of properties ({', '.join(tables)}): keep one")
    return next(iter(tables.values()), {}), others


def _by_file(path: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for row in rows:
        column = next((c for c in (*FILE_COLUMNS, "model_id") if c in row), None)
        if column is None:
            raise UserError(f"{path}: a row names no file: one of {', '.join(FILE_COLUMNS)} is needed")
        found[str(row[column])] = row
    return found


def _csv_rows(content: bytes) -> list[dict[str, Any]]:
    """Rows of a table as spreadsheets write it: with a byte order mark or not, split at commas, semicolons or tabs."""
    text = content.decode("utf-8-sig", errors="replace")
    split = max(",;\t", key=text.partition("\n")[0].count)
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=split, skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"the table of properties cannot be read ({error})") from None
    if split == ";":  # where decimals have commas
        rows = [{key: _decimal(value) for key, value in row.items()} for row in rows]
    return rows


def _decimal(value: Any) -> Any:
    return value.replace(",", ".") if isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value) else value


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _json_rows(path: str, content: bytes) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {said(error)}") from None
    if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"file": file, **row} for file, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must be a list of objects, or an object of objects by file name")
    return rows


# -- metrics ----------------------------------------------------------------------------------------------------------


def whole(value: Any) -> int:
    """A whole number however it is written (7, "7", "7.0"); ValueError, TypeError or OverflowError for another."""
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, bool) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def metrics_of(entry: Mapping[str, Any]) -> Metrics:
    """The format's metrics out of a result; None where one is missing. ValueError or so for what is no number."""
    metrics: Metrics = {}
    for metric, names in METRIC_NAMES.items():
        value = next((entry[name] for name in names if entry.get(name) not in (None, "", NOT_MEASURED)), None)
        metrics[metric] = None if value is None else float(value)
    train, test = metrics["train_accuracy"], metrics["test_accuracy"]
    if metrics["generalization_gap"] is None and train is not None and test is not None:
        metrics["generalization_gap"] = train - test
    return metrics


def in_shares(state: State) -> State:
    """A state whose accuracies were percentages."""
    if state.metrics is None:
        return state
    hundredths = {*ACCURACIES, "generalization_gap"}
    scaled = {m: v / 100 if v is not None and m in hundredths else v for m, v in state.metrics.items()}
    return replace(state, metrics=scaled)


def problem(metrics: Metrics | None) -> str | None:
    """Why metrics cannot be used, or None. What a source knows of no state is no problem: it stays unknown."""
    if metrics is None:
        return None
    missing = [metric for metric in REQUIRED if metric in metrics and metrics[metric] is None]
    if missing:
        return f"missing metrics ({', '.join(missing)})"
    reasons = (impossible(metric, value) for metric, value in metrics.items())
    return next((reason for reason in reasons if reason is not None), None)


def impossible(metric: str, value: float | None) -> str | None:
    """Why a metric cannot have this value, or None; an unknown value is no problem."""
    if value is not None and not abs(value) <= LARGEST:
        return f"non-finite metrics ({metric} is {value:g})"
    if value is not None and metric in ACCURACIES and not 0 <= value <= 1:
        hint = "; --percent if it is one" if 1 < value <= 100 else ""
        return f"impossible metrics ({metric} is {value}, not a share{hint})"
    return None
