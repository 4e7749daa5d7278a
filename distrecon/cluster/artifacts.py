"""What a trial leaves in storage: its models and arrays, and, last, its metrics, which mark it as finished."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrecon.zoos.storage import store

FINISHED = "finished/trial"  # reported with a trial's last metrics


def upload(folder: Path, target: str) -> None:
    """Copies the files of a folder to `target`/artifacts, each atomically."""
    where = store(target)
    for file in sorted(folder.iterdir()):
        where.write(f"artifacts/{file.name}", file.read_bytes())


def finish(storage: str, trial: str, metrics: Mapping[str, Any]) -> None:
    """Marks a trial as finished; written after everything else."""
    store(f"{storage}/{trial}").write("finished.json", json.dumps(metrics).encode())


def finished(storage: str, trial: str) -> dict[str, Any] | None:
    """The metrics of a trial that had finished, else None."""
    where = store(f"{storage}/{trial}")
    return json.loads(where.read("finished.json")) if where.exists("finished.json") else None
