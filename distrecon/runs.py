"""Run folders: made anew by each command, never overwritten, holding the request that made them and summary.json."""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrecon.cluster.journal import SweepRecord
from distrecon.errors import UserError

if TYPE_CHECKING:
    from distrecon.autoencoder.model import Autoencoder

REQUEST = "request.json"
FORMAT = 1
MLFLOW_RUN = "runs:/"
RESUMABLE = ("tune", "train")  # commands whose runs another call continues


def create(out: str | None, command: str, request: Mapping[str, Any]) -> Path:
    """A new run folder, `runs/<time>-<command>` by default, holding the request.

    Raises UserError when it exists or cannot be written.
    """
    check_absent(out)
    folder = Path(out) if out is not None else Path("runs") / time.strftime(f"%Y%m%d-%H%M%S-{command}")
    try:
        folder.mkdir(parents=True)
        write_json(folder / REQUEST, {"format": FORMAT, "command": command, **request})
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror or error})") from None
    return folder.absolute()


def check_absent(out: str | None) -> None:
    """Raises UserError when the folder asked for exists."""
    if out is not None and Path(out).exists():
        hint = f", or continue it with --resume {out}" if _command(Path(out)) in RESUMABLE else ""
        raise UserError(f"--out {out}: exists already; choose another folder{hint}")


def reopen(folder: str | Path, command: str) -> tuple[Path, dict[str, Any]]:
    """An earlier run's folder and request; UserError when it is none, another command's, or of a newer version."""
    path = Path(folder)
    try:
        request = json.loads((path / REQUEST).read_text())
    except FileNotFoundError:
        raise UserError(f"--resume {folder}: no run there ({REQUEST} is missing)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {folder}: {REQUEST} cannot be read ({error})") from None
    if request.get("command") != command:
        raise UserError(f"--resume {folder}: was made by distrecon.{request.get('command')}, not distrecon.{command}")
    if request.get("format", 0) > FORMAT:
        raise UserError(f"--resume {folder}: was made by a newer distrecon; update to continue it")
    return path.absolute(), request


def _command(folder: Path) -> str | None:
    """Which command made a run folder; None where there is none, or no readable one."""
    try:
        return json.loads((folder / REQUEST).read_text()).get("command")
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process; UserError when another process works in it. A dead process holds nothing."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--resume {folder}: another process still works on it; wait, or stop it") from None
        yield


def autoencoder_folder(path: str | Path) -> Path:
    """Where the autoencoder of a run lies: the folder itself, or the best trial's of its first autoencoder sweep.

    Raises UserError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run of distrecon.train or distrecon.tune")
    if (path / "autoencoder.json").exists():
        return path
    summary = read_summary(path)
    for sweep in summary.get("sweeps", ()):
        if sweep["kind"] == "autoencoder" and sweep["best"]:
            return path / "models" / sweep["name"] / sweep["best"]
    raise UserError(f"{path}: this run trained no autoencoder; name a run of distrecon.train or distrecon.tune")


def read_summary(path: Path) -> dict[str, Any]:
    """A run's summary.json; UserError when it is missing (the run did not finish) or damaged."""
    try:
        return json.loads((path / "summary.json").read_text())
    except FileNotFoundError:
        made_by = _command(path)
        if made_by in RESUMABLE:
            hint = f"the run did not finish: continue it with python -m distrecon.{made_by} --resume {path}"
        else:
            hint = "name a run of distrecon.train or distrecon.tune"
        raise UserError(f"{path} holds no autoencoder and no finished run; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/summary.json cannot be read ({error})") from None


def load_autoencoder(path: str | Path) -> "Autoencoder":
    """An autoencoder, on the CPU: of a run folder (the best trial's), of a folder that `save_autoencoder` wrote, or of
    an MLflow run, `runs:/RUN_ID` (a sweep's run gives its best trial's; the store is MLFLOW_TRACKING_URI, or mlflow.db
    here). Raises UserError when there is none."""
    from distrecon.autoencoder.store import load_autoencoder as load

    if str(path).startswith(MLFLOW_RUN):
        from distrecon.tracking import model_folder

        return load(model_folder(str(path).removeprefix(MLFLOW_RUN)))
    return load(autoencoder_folder(path))


def write_json(path: Path, data: Any) -> None:
    """Writes JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(plain(data), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plain(value: Any) -> Any:
    """Strict JSON data: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def summary(sweeps: Iterable[SweepRecord], **extra: Any) -> dict[str, Any]:
    """The content of summary.json: every trial of every sweep, with its configuration and last metrics."""
    return {**extra, "sweeps": [_summarise(sweep) for sweep in sweeps]}


def _summarise(sweep: SweepRecord) -> dict[str, Any]:
    best = sweep.best()
    ended = sweep.ended or time.time()
    return {
        "name": sweep.name,
        "kind": sweep.kind,
        "metric": sweep.metric,
        "mode": sweep.mode,
        "seconds": round(ended - sweep.started, 1) if sweep.started else 0.0,
        "best": best.trial if best else None,
        "trials": [
            {
                "trial_id": trial.trial,
                "status": trial.status,
                "error": trial.error,
                "config": trial.config,
                "metrics": trial.metrics,
                "started": trial.started,
                "ended": trial.ended,
            }
            for trial in sweep.trials.values()
        ],
    }
