"""Run folders: made anew by each command, never overwritten, with everything that a run leaves behind.

    request.json                        what was asked for, and by which command
    summary.json                        every number; written last, so that it marks a finished run
    report.html  figures/*.png          the same for reading
    models/                             best autoencoders, generated models, recovered networks
    sweeps/<sweep>/journal.jsonl        the record that all of the above is made of
    trials/<sweep>/<trial>/             checkpoints and artifacts (under the run's storage, where that is elsewhere)
    tune/                               Ray Tune's own state (there too)
    tracking.json                       what MLflow has got
    progress.json                       the last line of progress
    spaces/  stages/                    a job's space files; the stages of a recovery

No other file spells these names.
"""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrecon import console
from distrecon.errors import UserError, said
from distrecon.files import write_json
from distrecon.record.journal import Journal, SweepRecord, read_sweep

REQUEST = "request.json"
FORMAT = 1
RESUMABLE = ("tune", "train")  # commands whose runs another call continues


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on the driver, and the `storage` that every node reaches ("" is the folder itself)."""

    path: Path
    storage: str = ""

    # -- what is where ------------------------------------------------------------------------------------------------

    @property
    def request(self) -> Path:
        return self.path / REQUEST

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def spaces(self) -> Path:
        return self.path / "spaces"

    @property
    def stages(self) -> Path:
        return self.path / "stages"

    @property
    def tracking(self) -> Path:
        return self.path / "tracking.json"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    def sweeps(self) -> list[str]:
        """Names of the sweeps that have begun, or that were asked for by space files."""
        began = [path.parent.name for path in self.path.glob("sweeps/*/journal.jsonl")]
        return sorted({*began, *(path.stem for path in self.spaces.glob("*.yaml"))})

    def journal(self, sweep: str) -> Journal:
        return Journal(self.path / "sweeps" / sweep / "journal.jsonl")

    def read(self, sweep: str) -> SweepRecord:
        """The sweep as its journal has it so far."""
        return read_sweep(self.journal(sweep).path)

    def trials(self, sweep: str) -> str:
        """Where a sweep's trials lie: a path or URL that every node reaches."""
        return f"{self.storage or self.path}/trials/{sweep}"

    @property
    def tune(self) -> str:
        """Where Ray Tune keeps its state."""
        return f"{self.storage or self.path}/tune"

    # -- making, finding, removing ------------------------------------------------------------------------------------

    @classmethod
    def create(cls, out: str | None, command: str, request: Mapping[str, Any]) -> "RunFolder":
        """A new run folder, `runs/<time>-<command>` by default, with the request in it.

        Raises UserError when it exists or cannot be written.
        """
        check_absent(out)
        path = Path(out) if out is not None else Path("runs") / time.strftime(f"%Y%m%d-%H%M%S-{command}")
        folder = cls(path.absolute())
        try:
            path.mkdir(parents=True)
            try:
                write_json(folder.request, {"format": FORMAT, "command": command, **request})
            except OSError:
                folder.remove()
                raise
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written ({error.strerror or error})") from None
        return folder

    @classmethod
    def reopen(cls, folder: str | Path, command: str) -> tuple["RunFolder", dict[str, Any]]:
        """An earlier run's folder and request; UserError when it is none, another command's, or a newer version's."""
        path = Path(folder)
        try:
            request = _read_object(path / REQUEST)
        except FileNotFoundError:
            raise UserError(f"--resume {folder}: no run there ({REQUEST} is missing)") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--resume {folder}: {REQUEST} cannot be read ({said(error)})") from None
        if (made_by := request.get("command")) != command:
            raise UserError(f"--resume {folder}: was made by distrecon.{made_by}, not distrecon.{command}")
        if not isinstance(request.get("format", 0), int) or request.get("format", 0) > FORMAT:
            raise UserError(f"--resume {folder}: was made by a newer distrecon; update to continue it")
        return cls(path.absolute()), request

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.path)

    @property
    def begun(self) -> bool:
        """Whether a sweep of the run has begun."""
        return (self.path / "sweeps").exists()

    @property
    def command(self) -> str | None:
        """Which command made the folder; None where there is none, or no readable one."""
        try:
            command = _read_object(self.request).get("command")
            return command if isinstance(command, str) else None
        except (OSError, ValueError, RecursionError):
            return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for this process; UserError when another one works in it. A process's end unlocks it."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"--resume {self.path}: another process still works on it; wait, or stop it"
                raise UserError(message) from None
            with console.kept(self.progress):
                yield

    @property
    def working(self) -> bool:
        """Whether a process works in the folder now."""
        try:
            with open(self.path / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def last_progress(self) -> dict[str, Any] | None:
        """The last line of progress, as `stage`, `text` and `time`."""
        try:
            content = _read_object(self.progress)
            return {"stage": content["stage"], "text": content["text"], "time": float(content["time"])}
        except (OSError, LookupError, OverflowError, TypeError, ValueError, RecursionError):
            return None

    def read_summary(self) -> dict[str, Any]:
        """summary.json; UserError when it is missing (the run did not finish) or damaged."""
        try:
            return _read_object(self.summary)
        except FileNotFoundError:
            if (made_by := self.command) in RESUMABLE:
                hint = f"the run did not finish: continue it with python -m distrecon.{made_by} --resume {self.path}"
            else:
                hint = "name a run of distrecon.train or distrecon.tune"
            raise UserError(f"{self.path} holds no autoencoder and no finished run; {hint}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.summary} cannot be read ({said(error)})") from None


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object in a file; ValueError where it holds anything else."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def check_absent(out: str | None) -> None:
    """Raises UserError when the folder asked for exists."""
    if out is not None and Path(out).exists():
        hint = f", or continue it with --resume {out}" if RunFolder(Path(out)).command in RESUMABLE else ""
        raise UserError(f"--out {out}: exists already; choose another folder{hint}")
