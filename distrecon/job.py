"""The job of `tune` and `train`: zoos -> sweeps side by side on Ray -> MLflow, summary.json, figures, report.html.

A job is described by a `Request`, kept in its run folder, so that `resume` needs nothing else.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrecon import config as configuration
from distrecon.autoencoder.config import RECOMMENDED
from distrecon.autoencoder.scoring import check_memory
from distrecon.cluster import session
from distrecon.cluster.space import Sweep, one_trial, read_space
from distrecon.cluster.sweeps import check_resources, run_sweeps
from distrecon.console import Progress, time_left
from distrecon.errors import UserError, WorkFailed, nearest, reading
from distrecon.kinds import KINDS
from distrecon.nets import ChainArchitecture
from distrecon.record.folder import REQUEST, RunFolder, check_absent
from distrecon.record.journal import SweepRecord
from distrecon.record.tracking import Tracker
from distrecon.recording import Outcome, Provenance, finish
from distrecon.report.progress import standing
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos.settings import ZOOS, described
from distrecon.zoos.storage import inside, store
from distrecon.zoos.train import ensure

SHIPPED = Path(__file__).resolve().parent.parent / "tune_spaces"  # beside the package, wherever it lies
DEFAULT_SPACES = tuple(f"tune_spaces/{name}.yaml" for name in ("loss_weights", "recommended_coder", "student_counts"))

# Settings that say nothing of how an autoencoder is trained; with these alone `train` takes the recommended coder
NOT_OF_TRAINING = ("model.latent", "data.align", "data.symmetries", "tasks.", "resources.", "seed")


@dataclass(frozen=True)
class Request:
    """What was asked for; everything that a resumed run needs to know."""

    spaces: tuple[str, ...] = ()  # space files
    zoo: tuple[str, ...] = ()  # zoos to train a single autoencoder on
    coder: dict[str, Any] = field(default_factory=dict)  # dotted values of that autoencoder that nobody asked for
    overrides: dict[str, Any] = field(default_factory=dict)  # dotted values laid over every space's base
    seed: int = 0
    smoke: bool = False
    address: str | None = None
    storage: str | None = None
    modules: tuple[str, ...] = ()  # that run the networks of zoos made with torch modules; a resumed job is given them
    images: str | None = None  # the directory of the images of zoos that have them not inside


def space_file(name: str) -> str:
    """The space file of that path or, where there is none, the shipped one of that name, with or without its folder.

    Raises UserError that lists the shipped ones.
    """
    shipped = SHIPPED / f"{Path(name).stem}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return str(path)
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    raise UserError(f"{name}: no such space file{nearest(shipped.stem, names)}")


def recommended(zoo: Sequence[str], overrides: Mapping[str, Any], smoke: bool) -> dict[str, Any]:
    """The recommended coder's settings where none of the overrides says how to train and it can code the zoos' models.

    A smoke run trains, since it tries every stage. Raises UserError when a zoo is missing.
    """
    if smoke or not all(key.startswith(NOT_OF_TRAINING) for key in overrides):
        return {}
    chains = (isinstance(opened.architecture, ChainArchitecture) for opened in _opened(zoo).values())
    return RECOMMENDED if all(chains) else {}


def read_sweeps(request: Request) -> list[Sweep]:
    """All sweeps of a request, completely checked; UserError names the file and key that are wrong."""
    overrides, smoke = request.overrides, request.smoke
    sweeps = [read_space(path, KINDS, overrides, smoke) for path in request.spaces]
    if request.zoo:
        values = {"zoo": list(request.zoo), **request.coder}
        sweeps.append(one_trial("train", KINDS["autoencoder"], values, overrides, smoke, "--zoo"))
    known = {name for s in sweeps for name in configuration.fields(type(s.base))}
    for key in request.overrides:
        if key not in known:
            raise UserError(f"--set: unknown key {key!r}{nearest(key, known)}")
    names = [sweep.name for sweep in sweeps]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two space files have the name {name!r}: rename one of the sweeps")
    return sweeps


def prepare(request: Request, out: str | None, command: str, verbose: bool = False) -> RunFolder:
    """Checks all that can be checked, joins Ray, and only then makes the run folder, with the space files in it."""
    check_absent(out)
    if request.storage:
        store(request.storage)  # refuses what is no address
    sweeps = read_sweeps(request)
    zoos = _folders(sweeps)
    session.connect(request.address, verbose=verbose)
    check_resources(sweeps)
    for zoo in zoos.values():
        check_memory(zoo, session.memory())
    copies = [f"spaces/{sweep.name}.yaml" for sweep, _ in zip(sweeps, request.spaces, strict=False)]
    digests = {name: zoo.digest for name, zoo in zoos.items()}
    folder = RunFolder.create(out, command, {**dataclasses.asdict(request), "spaces": copies, "zoos": digests})
    if copies:
        folder.spaces.mkdir()
    for source, copy in zip(request.spaces, copies, strict=True):
        shutil.copyfile(source, folder.path / copy)
    return _with_storage(folder, request)


def reopen(path: str, command: str, address: str | None, modules: tuple[str, ...] = ()) -> tuple[RunFolder, Request]:
    """An earlier job's folder and request, as it was made; only the cluster may be another.

    Modules are given anew: no file of a run decides what is imported.

    Raises UserError when the run is stale: a zoo changed since it began, or its request is not one of this version.
    """
    folder, saved = RunFolder.reopen(path, command)
    with reading(f"--resume {path}: {REQUEST}"):
        return _reopened(path, folder, saved, address, modules)


def _reopened(
    path: str, folder: RunFolder, saved: dict[str, Any], address: str | None, modules: tuple[str, ...]
) -> tuple[RunFolder, Request]:
    saved = {"zoo": [], "coder": {}, "images": None, "modules": [], **saved}  # earlier versions' runs had none of them
    names = [f.name for f in dataclasses.fields(Request)]
    if missing := [name for name in [*names, "zoos"] if name not in saved]:
        raise UserError(f"--resume {path}: {REQUEST} has no {missing[0]!r}; start anew with another --out")
    values = {name: saved[name] for name in names} | {"address": address or saved["address"], "modules": modules}
    if outside := [space for space in saved["spaces"] if not inside(space)]:
        raise UserError(f"--resume {path}: {REQUEST} names {outside[0]}, which is not in the run")
    values |= {"spaces": tuple(str(folder.path / space) for space in saved["spaces"]), "zoo": tuple(saved["zoo"])}
    request = Request(**values)
    for name, zoo in _folders(read_sweeps(request)).items():
        if zoo.digest != saved["zoos"].get(name):
            raise UserError(f"--resume {path}: the zoo {name} has changed since; start anew with another --out")
    return _with_storage(folder, request), request


def _with_storage(folder: RunFolder, request: Request) -> RunFolder:
    storage = f"{request.storage.rstrip('/')}/{folder.path.name}" if request.storage else ""
    return dataclasses.replace(folder, storage=storage)


def run(request: Request, folder: RunFolder, verbose: bool = False) -> Outcome:
    """Runs or continues the job in its folder. KeyboardInterrupt and WorkFailed leave it resumable."""
    began = time.monotonic()
    sweeps = read_sweeps(request)
    names = [sweep.name for sweep in sweeps]
    session.connect(request.address, verbose=verbose)
    check_resources(sweeps)
    _check_shared(folder, _folders(sweeps, request.images).values())
    zoos = _zoos(sweeps, request)
    provenance = Provenance(request.seed, request.smoke, request.overrides, zoos)
    tracker = Tracker(folder, names, provenance.tags())
    progress = _SweepsProgress(sweeps, folder)

    def watch() -> None:
        progress.show()
        tracker.sync()

    try:
        run_sweeps(sweeps, folder, zoos, request.seed, watch)
    except (KeyboardInterrupt, WorkFailed):
        tracker.sync(force=True)
        tracker.interrupt()
        raise
    progress.done()
    return finish(folder, names, provenance, tracker, time.monotonic() - began)


def _zoos(sweeps: Sequence[Sweep], request: Request) -> dict[str, Zoo]:
    """Every zoo that the sweeps name: a shipped one is trained unless it is there already, a folder is opened."""
    zoos = {}
    for name in sorted(_zoo_names(sweeps)):
        if name not in ZOOS:
            zoos[name] = open_zoo(name, images=request.images, module=request.modules)
            continue
        config = dataclasses.replace(ZOOS[name], seed=request.seed)
        flat = json.dumps(described(config), sort_keys=True)
        digest = hashlib.sha256(flat.encode()).hexdigest()[:8]
        folder = f"{request.storage or '.'}/zoos/{name}-{digest}"
        stage = Progress("zoo")

        def show(done: int, total: int, seconds: float, stage: Progress = stage, name: str = name) -> None:
            stage.show(f"{name}: {done} of {total} models trained, {time_left(done / total, seconds)}")

        zoos[name] = ensure(config, folder, show)
        zoo = zoos[name]
        stage.done(f"{name}: {zoo.num_models} models, {zoo.num_states} states in {zoo.store}")
    return zoos


def _check_shared(folder: RunFolder, zoos: Iterable[Zoo]) -> None:
    """UserError when what every node must read or write lies on a disk that another node does not see."""
    if (place := store(folder.storage or folder.path)).local:
        try:
            Path(place.root).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {place.root} ({error.strerror or error})") from None
    zoos = list(zoos)
    own = [where.root for where in (place, *(zoo.store for zoo in zoos)) if where.local]
    session.check_shared([*own, *(zoo.image_folder for zoo in zoos if zoo.image_folder is not None)])


def _folders(sweeps: Sequence[Sweep], images: str | None = None) -> dict[str, Zoo]:
    """The zoos that the sweeps name by folder."""
    return _opened(_zoo_names(sweeps), images)


def _opened(zoos: Iterable[str], images: str | None = None) -> dict[str, Zoo]:
    """Those of the zoos that are folders; the shipped ones, all of chains, are trained when they are missing."""
    names = sorted(set(zoos) - set(ZOOS))
    for name in names:
        if "/" not in name and not Path(name).exists():
            raise UserError(f"no zoo {name!r} here{nearest(name, ZOOS)} (or a folder)")
    return {name: open_zoo(name, images=images) for name in names}


def _zoo_names(sweeps: Sequence[Sweep]) -> set[str]:
    return {name for sweep in sweeps for name in sweep.zoos}


class _SweepsProgress:
    """One line about all sweeps, read from their journals."""

    def __init__(self, sweeps: Sequence[Sweep], folder: RunFolder) -> None:
        self.sweeps, self.folder, self.stage = sweeps, folder, Progress("sweeps")
        self.records = {s.name: SweepRecord(s.name, kind=s.kind.name, total=s.trials) for s in sweeps}
        self.offsets = {s.name: 0 for s in sweeps}

    def show(self) -> None:
        parts, shares = [], []
        for sweep in self.sweeps:
            record = self.records[sweep.name]
            events, self.offsets[sweep.name] = self.folder.journal(sweep.name).read(self.offsets[sweep.name])
            for event in events:
                record.apply(event)
            now = standing(record)
            running = f" ({', '.join(now.running)})" if now.running else ""
            parts.append(f"{sweep.name} {now.ended}/{sweep.trials}{running}")
            shares.append(now.share)
        told = [share for share in shares if share is not None]
        left = time_left(min(told), time.monotonic() - self.stage.start) if told else "training done"
        self.stage.show(f"{'; '.join(parts)}; {left}")

    def done(self) -> None:
        self.show()
        trials = [t for record in self.records.values() for t in record.trials.values()]
        failed = sum(t.status == "failed" for t in trials)
        self.stage.done(f"{len(trials) - failed} trials done" + (f", {failed} failed" if failed else ""))
