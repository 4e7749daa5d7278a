"""What a trial leaves in storage: its models and arrays, and, last, its metrics, which mark it as finished.

A trial's address is a path or URL, `<storage>/trials/<sweep>/<trial>`.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distrecon.files import plain
from distrecon.zoos.storage import store

FINISHED = "finished/trial"  # reported with a trial's last metrics
ARRAYS = "arrays.npz"  # what figures are drawn from; every other artifact is a model's file


def upload(folder: Path, trial: str) -> None:
    """Copies the files of a folder to the trial's artifacts, each atomically."""
    where = store(trial)
    for file in sorted(folder.iterdir()):
        where.write(f"artifacts/{file.name}", file.read_bytes())


def fetch(trial: str, target: Path) -> tuple[dict[str, np.ndarray], list[Path]]:
    """The trial's arrays for figures, and its models' files, copied to `target`, which is made where there are any."""
    where, arrays, copies = store(trial), {}, []
    for name in where.names("artifacts"):
        content, file = where.read(name), target / name.rsplit("/", 1)[-1]
        if file.name == ARRAYS:
            with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
                arrays = dict(loaded)
            continue
        target.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        copies.append(file)
    return arrays, copies


def finish(trial: str, metrics: Mapping[str, Any]) -> None:
    """Marks the trial as finished; written after everything else."""
    store(trial).write("finished.json", json.dumps(plain(metrics, not_finite=float)).encode())


def finished(trial: str) -> dict[str, Any] | None:
    """The metrics of a trial that had finished, else None."""
    where = store(trial)
    return json.loads(where.read("finished.json")) if where.exists("finished.json") else None
