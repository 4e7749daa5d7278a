"""The main job: zoos -> sweeps side by side on Ray -> MLflow, summary.json, figures, report.html.

A job is described by a `Request`, kept in its run folder, so that `resume` needs nothing else.
"""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from distrecon import config as configuration
from distrecon import report, runs, tables, tracking
from distrecon.autoencoder.scoring import check_memory
from distrecon.cluster import session
from distrecon.cluster.journal import SweepRecord, read_sweep
from distrecon.cluster.space import Sweep, read_space
from distrecon.cluster.sweeps import Place, check_resources, run_sweeps
from distrecon.console import Progress, time_left
from distrecon.errors import UserError, WorkFailed, nearest
from distrecon.tracking import Tracker
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos.settings import ZOOS
from distrecon.zoos.train import ensure

DEFAULT_SPACES = ("tune_spaces/loss_weights.yaml", "tune_spaces/student_counts.yaml")


@dataclass(frozen=True)
class Request:
    """What was asked for; everything that a resumed run needs to know."""

    spaces: tuple[str, ...]
    overrides: dict[str, Any] = field(default_factory=dict)  # dotted values laid over every space's base
    seed: int = 0
    smoke: bool = False
    address: str | None = None
    storage: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished job: its records and where to look next."""

    folder: Path
    sweeps: list[SweepRecord]
    seconds: float
    tracker: Tracker

    @property
    def failed(self) -> int:
        return sum(t.status == "failed" for sweep in self.sweeps for t in sweep.trials.values())


def shipped_spaces() -> list[str]:
    """The space files of the default run: of the working directory, or of the checkout that the package lies in."""
    checkout = Path(__file__).resolve().parent.parent
    for root in (Path.cwd(), checkout):
        if all((root / space).exists() for space in DEFAULT_SPACES):
            return [str(root / space) for space in DEFAULT_SPACES]
    raise UserError(f"{DEFAULT_SPACES[0]} is not here: run in distrecon's checkout, or name space files with --space")


def read_sweeps(request: Request) -> list[Sweep]:
    """All sweeps of a request, completely checked; UserError names the file and key that are wrong."""
    sweeps = [read_space(path, request.overrides, request.smoke) for path in request.spaces]
    known = {name for s in sweeps for name in configuration.fields(type(s.base))}
    for key in request.overrides:
        if key not in known:
            raise UserError(f"--set: unknown key {key!r}{nearest(key, known)}")
    names = [sweep.name for sweep in sweeps]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two space files have the name {name!r}: rename one of the sweeps")
    return sweeps


def prepare(request: Request, out: str | None, command: str, verbose: bool = False) -> Path:
    """Checks all that can be checked, joins Ray, and only then makes the run folder, with the space files in it."""
    runs.check_absent(out)
    sweeps = read_sweeps(request)
    zoos = _folders(sweeps)
    session.connect(request.address, verbose=verbose)
    check_resources(sweeps)
    for zoo in zoos.values():
        check_memory(zoo, session.memory())
    kept = [f"spaces/{sweep.name}.yaml" for sweep in sweeps]
    held = {name: zoo.digest for name, zoo in zoos.items()}
    folder = runs.create(out, command, {**dataclasses.asdict(request), "spaces": kept, "zoos": held})
    (folder / "spaces").mkdir()
    for source, copy in zip(request.spaces, kept, strict=True):
        shutil.copyfile(source, folder / copy)
    return folder


def reopen(folder: str, command: str, address: str | None) -> tuple[Path, Request]:
    """An earlier job's folder and request, as it was made; only the cluster may be another.

    Raises UserError when the run is stale: a zoo changed since it began, or its request is not one of this version.
    """
    path, saved = runs.reopen(folder, command)
    names = [f.name for f in dataclasses.fields(Request)]
    if missing := [name for name in [*names, "zoos"] if name not in saved]:
        raise UserError(f"--resume {folder}: {runs.REQUEST} has no {missing[0]!r}; start anew with another --out")
    spaces = tuple(str(path / space) for space in saved["spaces"])
    fields = {name: saved[name] for name in names}
    request = Request(**{**fields, "spaces": spaces, "address": address or saved["address"]})
    for name, zoo in _folders(read_sweeps(request)).items():
        if zoo.digest != saved["zoos"].get(name):
            raise UserError(f"--resume {folder}: the zoo {name} has changed since; start anew with another --out")
    return path, request


def run(request: Request, folder: Path, verbose: bool = False) -> Outcome:
    """Runs or continues the job in its folder. KeyboardInterrupt and WorkFailed leave it resumable."""
    began = time.monotonic()
    sweeps = read_sweeps(request)
    session.connect(request.address, verbose=verbose)
    check_resources(sweeps)
    zoos = _zoos(sweeps, request)
    tracker = Tracker(folder, [s.name for s in sweeps], tags(request, zoos))
    storage = f"{request.storage.rstrip('/')}/{folder.name}" if request.storage else str(folder)
    place = Place(folder, storage)
    progress = _SweepsProgress(sweeps, place)

    def watch() -> None:
        progress.show()
        tracker.sync()

    try:
        run_sweeps(sweeps, place, zoos, request.seed, watch)
    except (KeyboardInterrupt, WorkFailed):
        tracker.sync(force=True)
        tracker.interrupt()
        raise
    progress.done()
    return finish(request, place, [s.name for s in sweeps], zoos, tracker, time.monotonic() - began)


def finish(
    request: Request, place: Place, names: Sequence[str], zoos: Mapping[str, Zoo], tracker: Tracker, seconds: float
) -> Outcome:
    """Everything that is made of the journals: MLflow's rest, summary.json, figures, models, report.html."""
    stage = Progress("report")
    records = [read_sweep(place.journal(name).path) for name in names]
    tracker.sync(force=True)
    # a resumed run took as long as its sweeps, earlier starts included
    about = _about(request, zoos, max([seconds, *(record.seconds for record in records)]))
    runs.write_json(place.folder / "summary.json", runs.summary(records, **about))
    files = report.write(place.folder, records, place, about, tracker)
    _log_artifacts(tracker, records, files)
    stage.done(f"{place.folder / 'report.html'}")
    return Outcome(place.folder, records, seconds, tracker)


def _zoos(sweeps: Sequence[Sweep], request: Request) -> dict[str, Zoo]:
    """Every zoo that the sweeps name: a shipped one is trained unless it is there already, a folder is opened."""
    zoos = {}
    for name in sorted(_zoo_names(sweeps)):
        if name not in ZOOS:
            zoos[name] = open_zoo(name)
            continue
        config = dataclasses.replace(ZOOS[name], seed=request.seed)
        flat = json.dumps(configuration.flatten(config), sort_keys=True)
        digest = hashlib.sha256(flat.encode()).hexdigest()[:8]
        folder = f"{request.storage or '.'}/zoos/{name}-{digest}"
        stage = Progress("zoo")

        def show(done: int, total: int, seconds: float, stage: Progress = stage, name: str = name) -> None:
            stage.show(f"{name}: {done} of {total} models trained, {time_left(done / total, seconds)}")

        zoos[name] = ensure(config, folder, show)
        zoo = zoos[name]
        stage.done(f"{name}: {zoo.num_models} models, {zoo.num_states} states in {zoo.store}")
    return zoos


def _folders(sweeps: Sequence[Sweep]) -> dict[str, Zoo]:
    """The zoos that the sweeps name by folder; the shipped ones are trained when they are missing."""
    names = sorted(_zoo_names(sweeps) - set(ZOOS))
    for name in names:
        if "/" not in name and not Path(name).exists():
            raise UserError(f"no zoo {name!r} here{nearest(name, ZOOS)} (or a folder)")
    return {name: open_zoo(name) for name in names}


def _zoo_names(sweeps: Sequence[Sweep]) -> set[str]:
    return {name for sweep in sweeps for name in sweep.zoos}


class _SweepsProgress:
    """One line about all sweeps, read from their journals."""

    def __init__(self, sweeps: Sequence[Sweep], place: Place) -> None:
        self.sweeps, self.place, self.stage = sweeps, place, Progress("sweeps")
        self.records = {s.name: SweepRecord(s.name, kind=s.kind, total=s.trials) for s in sweeps}
        self.offsets = {s.name: 0 for s in sweeps}

    def show(self) -> None:
        parts, shares = [], []
        for sweep in self.sweeps:
            record = self.records[sweep.name]
            events, self.offsets[sweep.name] = self.place.journal(sweep.name).read(self.offsets[sweep.name])
            for event in events:
                record.apply(event)
            epochs = sweep.base.optim.epochs if sweep.kind == "autoencoder" else None
            running = [t for t in record.trials.values() if t.status == "running"]
            ended = len(record.trials) - len(running)
            share = (ended + sum(_share(t, epochs) for t in running)) / max(1, sweep.trials)
            now = ", ".join(_now(tables.label(t.config), t, epochs) for t in running)
            parts.append(f"{sweep.name} {ended}/{sweep.trials}" + (f" ({now})" if now else ""))
            shares.append(share)
        self.stage.show(f"{'; '.join(parts)}; {time_left(min(shares), time.monotonic() - self.stage.start)}")

    def done(self) -> None:
        self.show()
        trials = [t for record in self.records.values() for t in record.trials.values()]
        failed = sum(t.status == "failed" for t in trials)
        self.stage.done(f"{len(trials) - failed} trials done" + (f", {failed} failed" if failed else ""))


def _share(trial: Any, epochs: int | None) -> float:
    """Share of a running trial that is done; scoring counts for about a tenth."""
    return 0.9 * max(trial.epochs, default=0) / epochs if epochs else 0.0


def _now(label: str, trial: Any, epochs: int | None) -> str:
    return f"{label} {max(trial.epochs, default=0)}/{epochs}" if epochs else label


def tags(request: Request, zoos: Mapping[str, Zoo]) -> dict[str, str]:
    tags = {f"version.{name}": metadata.version(name) for name in ("distrecon", "torch", "ray", "mlflow")}
    commit = _git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    if request.smoke:
        tags["smoke"] = "true: the numbers mean nothing"
    return {**tags, "seed": str(request.seed), "zoos": ", ".join(str(zoo.store) for zoo in zoos.values())}


def _git_commit() -> str | None:
    """The checkout's commit, when the package runs from one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _about(request: Request, zoos: Mapping[str, Zoo], seconds: float) -> dict[str, Any]:
    """What was run, on what, how long."""
    return {
        "distrecon": metadata.version("distrecon"),
        "smoke": request.smoke,
        "seed": request.seed,
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": session.machine(),
        "commit": _git_commit(),
        "versions": {name: metadata.version(name) for name in ("torch", "ray", "mlflow")},
        "overrides": request.overrides,
        "zoos": {
            name: {
                "path": str(zoo.store),
                "models": zoo.num_models,
                "states": zoo.num_states,
                "architecture": zoo.architecture.name,
                "parameters": zoo.architecture.num_parameters,
                "images": zoo.image_set,
            }
            for name, zoo in zoos.items()
        },
    }


def _log_artifacts(tracker: Tracker, records: Sequence[SweepRecord], files: report.Files) -> None:
    for record in records:
        tracker.artifacts(record.name, "", [files.page, files.summary])
        tracker.artifacts(record.name, "", files.figures.get(record.name, []), "figures")
        for trial, models in files.models.get(record.name, {}).items():
            tracker.artifacts(record.name, trial, models, tracking.MODEL)
        best = record.best()
        tracker.conclude(record.name, best.trial if best else None, tables.render(record))
