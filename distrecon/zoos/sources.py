"""Where foreign models lie: Ray Tune trees, folders of checkpoint files with a table of properties, single files.

Every kind of source lists its models (`Model`: an id and where to look), and reads one model's properties and files
(`states`). Nothing here opens a checkpoint: `importing.py` does, with `checkpoints.py`.

A published zoo is a Ray Tune tree: one folder a model, with `params.json` (its configuration), `result.json` (a JSON
line an epoch) and `checkpoint_000020/checkpoints` (a state dict).
"""

import csv
import io
import json
import math
import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow.fs as pafs

from distrecon.errors import UserError
from distrecon.zoos.checkpoints import SUFFIXES
from distrecon.zoos.storage import Store

# where result.json lines and tables of properties keep each metric
METRIC_NAMES = {
    "train_accuracy": ("train_accuracy", "train_acc"),
    "test_accuracy": ("test_accuracy", "test_acc"),
    "generalization_gap": ("generalization_gap", "ggap"),
    "train_loss": ("train_loss",),
}
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
    files, folders = _list(store, "")
    checkpoints = tuple(name for name in files if name.endswith(SUFFIXES) and name != "dataset.pt")
    if checkpoints:
        return FileFolder(store, checkpoints, _properties(store, files))
    trials = tuple(_trials(store, "", folders, depth=3))
    if not trials:
        raise UserError(
            f"{store} is neither a Ray Tune tree (folders with params.json) nor a folder of {', '.join(SUFFIXES)} files"
        )
    return TuneTree(store, trials)


def _list(store: Store, folder: str) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, sorted."""
    infos = store.filesystem.get_file_info(pafs.FileSelector(store.path(folder).rstrip("/")))
    files = sorted(info.base_name for info in infos if info.is_file)
    return files, sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


# -- Ray Tune trees ---------------------------------------------------------------------------------------------------


def _trials(store: Store, folder: str, folders: list[str], depth: int) -> Iterator[str]:
    """Folders of models below a folder. Names as Ray Tune gives them are taken without opening them."""
    for name in folders:
        path = f"{folder}/{name}".lstrip("/")
        if "_trainable_" in name:
            yield path
            continue
        files, inner = _list(store, path)
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

    def models(self) -> list[Model]:
        return [Model(trial.rpartition("/")[2], (trial,)) for trial in self.trials]

    def states(self, model: Model) -> Iterator[State | Skip]:
        (trial,) = model.files
        files, folders = _list(self.store, trial)
        config = "{}"
        if "params.json" in files:
            try:
                config = json.dumps(json.loads(self.store.read(f"{trial}/params.json")))
            except (json.JSONDecodeError, UnicodeDecodeError):
                yield Skip(f"{trial}/params.json", "not JSON")
        results: dict[int, Metrics] = {}
        if "result.json" in files:
            results = yield from self._results(f"{trial}/result.json")
        epochs = sorted((epoch, name) for name in folders if (epoch := _epoch_of(name)) is not None)
        if not epochs:
            yield Skip(trial, "no checkpoints")
        for epoch, name in epochs:
            inside, _ = _list(self.store, f"{trial}/{name}")
            chosen = [f for f in inside if f == "checkpoints" or f.endswith(SUFFIXES)]
            if len(chosen) != 1:
                yield Skip(f"{trial}/{name}", "no checkpoint file" if not chosen else "several checkpoint files")
            else:
                yield State(epoch, f"{trial}/{name}/{chosen[0]}", results.get(epoch, {}), config)

    def _results(self, file: str) -> Generator[Skip, None, dict[int, Metrics]]:
        results: dict[int, Metrics] = {}
        for number, line in enumerate(self.store.read(file).decode(errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                results[int(entry["training_iteration"])] = metrics_of(entry)
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
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

    def models(self) -> list[Model]:
        grouped: dict[str, list[str]] = {}
        for file in self.files:
            grouped.setdefault(self._key(file)[0], []).append(file)
        return [Model(model_id, tuple(files)) for model_id, files in sorted(grouped.items())]

    def _row(self, file: str) -> Mapping[str, Any]:
        return self.properties.get(file, self.properties.get(file.rpartition(".")[0], {}))

    def _key(self, file: str) -> tuple[str, int]:
        row, stem = self._row(file), file.rpartition(".")[0]
        match = re.fullmatch(r"(.+?)[-_.](?:epoch|ep|checkpoint)[-_]?(\d+)", stem)
        name, epoch = (match[1], int(match[2])) if match else (stem, 0)
        return str(row.get("model_id") or name), int(row.get("epoch") or epoch)

    def states(self, model: Model) -> Iterator[State | Skip]:
        for file in sorted(model.files, key=lambda f: (self._key(f)[1], f)):
            row = self._row(file)
            metrics = None
            if self.properties:
                try:
                    metrics = metrics_of(row)
                except (TypeError, ValueError):
                    yield Skip(file, "a metric is not a number")
                    continue
            known = {name for names in METRIC_NAMES.values() for name in names} | {*FILE_COLUMNS, "model_id", "epoch"}
            config = {key: value for key, value in row.items() if key not in known}
            yield State(self._key(file)[1], file, metrics, json.dumps(config))


FILE_COLUMNS = ("file", "filename", "path", "checkpoint")


def _properties(store: Store, files: list[str]) -> dict[str, dict[str, Any]]:
    """File name -> its row of the only CSV or JSON table in the folder; UserError when it cannot be used."""
    tables = [name for name in files if name.endswith((".csv", ".json"))]
    if len(tables) > 1:
        raise UserError(f"{store} has several tables of properties ({', '.join(tables)}): keep one")
    if not tables:
        return {}
    (name,) = tables
    text = store.read(name).decode(errors="replace")
    rows = list(csv.DictReader(io.StringIO(text))) if name.endswith(".csv") else _json_rows(store.path(name), text)
    found = {}
    for row in rows:
        column = next((c for c in (*FILE_COLUMNS, "model_id") if c in row), None)
        if column is None:
            raise UserError(f"{store.path(name)}: a row names no file: one of {', '.join(FILE_COLUMNS)} is needed")
        found[str(row[column])] = row
    return found


def _json_rows(path: str, text: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
        content = [{"file": file, **row} for file, row in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{path} must be a list of objects, or an object of objects by file name")
    return content


# -- metrics ----------------------------------------------------------------------------------------------------------


def metrics_of(entry: Mapping[str, Any]) -> Metrics:
    """The format's metrics out of a result; None where one is missing. ValueError for what is no number."""
    metrics: Metrics = {}
    for metric, names in METRIC_NAMES.items():
        value = next((entry[name] for name in names if entry.get(name) not in (None, "", NOT_MEASURED)), None)
        metrics[metric] = None if value is None else float(value)
    train, test = metrics["train_accuracy"], metrics["test_accuracy"]
    if metrics["generalization_gap"] is None and train is not None and test is not None:
        metrics["generalization_gap"] = train - test
    return metrics


def problem(metrics: Metrics | None) -> str | None:
    """Why metrics cannot be used, or None. A source without any metrics is no problem: they stay unknown."""
    if metrics is None:
        return None
    missing = [metric for metric in REQUIRED if metrics.get(metric) is None]
    if missing:
        return f"missing metrics ({', '.join(missing)})"
    reasons = (impossible(metric, value) for metric, value in metrics.items())
    return next((reason for reason in reasons if reason is not None), None)


def impossible(metric: str, value: float | None) -> str | None:
    """Why a metric cannot have this value, or None; an unknown value is no problem."""
    if value is not None and not math.isfinite(value):
        return f"non-finite metrics ({metric} is {value})"
    if value is not None and metric in ACCURACIES and not 0 <= value <= 1:
        return f"impossible metrics ({metric} is {value}, not a share)"
    return None
