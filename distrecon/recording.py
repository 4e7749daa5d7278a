"""How every command records its run: MLflow, summary.json, figures, models and report.html, all made of the journals.

`finish` does it for a run whose journals are written; `record` does one piece of work in this process, as a sweep of
one trial, and writes its journal. None of this loads Ray Tune.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from distrecon import console
from distrecon.cluster import session
from distrecon.errors import UserError, WorkFailed, redact
from distrecon.files import write_json
from distrecon.kinds import KINDS
from distrecon.record.artifacts import ARRAYS, FINISHED
from distrecon.record.folder import RESUMABLE, RunFolder
from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Kind
from distrecon.record.store import record_once
from distrecon.record.tracking import Tracker
from distrecon.record.usage import measured
from distrecon.report import figures, page, tables, trends
from distrecon.served.package import package
from distrecon.zoos import Zoo

TRIAL = "00000"  # the only one of a run that works in this process


@dataclass(frozen=True)
class Provenance:
    """What a run's numbers came from."""

    seed: int
    smoke: bool
    overrides: Mapping[str, Any] = field(default_factory=dict)
    zoos: Mapping[str, Zoo] = field(default_factory=dict)

    def tags(self) -> dict[str, str]:
        """For MLflow."""
        tags = {f"version.{name}": metadata.version(name) for name in ("distrecon", "torch", "ray", "mlflow")}
        if commit := git_commit():
            tags["mlflow.source.git.commit"] = commit
        if self.smoke:
            tags["smoke"] = "true: the numbers mean nothing"
        return {**tags, "seed": str(self.seed), "zoos": ", ".join(str(zoo.store) for zoo in self.zoos.values())}

    def about(self, seconds: float) -> dict[str, Any]:
        """For summary.json and the report: what was run, on what, how long."""
        return {
            "distrecon": metadata.version("distrecon"),
            "smoke": self.smoke,
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": session.machine(),
            "commit": git_commit(),
            "versions": {name: metadata.version(name) for name in ("torch", "ray", "mlflow")},
            "overrides": dict(self.overrides),
            "zoos": {
                name: {
                    "path": str(zoo.store),
                    "models": zoo.num_models,
                    "states": zoo.num_states,
                    "architecture": zoo.architecture.name,
                    "parameters": zoo.architecture.num_parameters,
                    "images": zoo.image_set,
                }
                for name, zoo in self.zoos.items()
            },
        }


def git_commit() -> str | None:
    """The checkout's commit, when the package runs from one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


@dataclass(frozen=True)
class Outcome:
    """A finished run: its records, and where they were sent."""

    folder: RunFolder
    sweeps: list[SweepRecord]
    seconds: float
    tracker: Tracker

    @property
    def failed(self) -> int:
        return sum(t.status == "failed" for sweep in self.sweeps for t in sweep.trials.values())


def finish(
    folder: RunFolder,
    sweeps: Sequence[str],
    provenance: Provenance,
    tracker: Tracker,
    seconds: float,
    extra: Mapping[str, Any] | None = None,
) -> Outcome:
    """Makes everything that is made of the journals; `extra` are summary.json's keys beside the sweeps'."""
    stage = console.Progress("report")
    records = [folder.read(name) for name in sweeps]
    # a resumed run took as long as its sweeps, earlier starts included
    about = provenance.about(max([seconds, *(record.seconds for record in records)]))
    files = page.draw(folder, records, KINDS)
    page.write(folder, records, KINDS, about, files, tracker)
    write_json(folder.summary, {**about, **(extra or {}), "sweeps": [summarise(record) for record in records]})
    if tracker.sync(force=True):
        page.write(folder, records, KINDS, about, files, tracker)  # with the links to MLflow's runs
    for record in records:
        kind, best = KINDS[record.kind], record.best()
        tracker.artifacts(record.name, "", [folder.page, folder.summary])
        tracker.artifacts(record.name, "", files.figures[record.name], "figures")
        for trial, models in files.models[record.name].items():
            _log_model(tracker, record, trial, models)
        tracker.conclude(
            record.name,
            best.trial if best else None,
            best.metrics if best else {},
            tables.render(record, kind),
            "\n".join(trends.advice(record, kind)),
            columns(kind),
        )
    stage.done(f"{folder.page}")
    return Outcome(folder, records, seconds, tracker)


def columns(kind: Kind) -> str:
    """What the columns of an experiment mean, as Markdown."""
    metrics = "\n".join(f"- `{m.name}`{f' ({m.heading})' if m.heading else ''}: {m.meaning}" for m in kind.metrics)
    return (
        f"Trials of kind `{kind.name}`. A run without a parent is a sweep, called as its run folder, with the report, "
        "the figures and its best trial's metrics; its children are the trials. Parameters are settings by dotted name "
        f"(docs/settings.md).\n\n{metrics}\n- `system/...`: what the trial's own process took, at most\n"
        "- `time/...`: seconds, and what they were spent on\n"
    )


def _log_model(tracker: Tracker, record: SweepRecord, trial: str, files: Sequence[Path]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        if package(KINDS[record.kind], files, target):
            tracker.model(record.name, trial, target, record.kind)


def summarise(sweep: SweepRecord) -> dict[str, Any]:
    """A sweep as it stands in summary.json: every trial with its configuration and the last value of each metric."""
    best = sweep.best()
    return {
        "name": sweep.name,
        "kind": sweep.kind,
        "metric": sweep.metric,
        "mode": sweep.mode,
        "seconds": round(sweep.seconds, 1),
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


# -- work in this process ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a piece of work came to: its metrics, and its own keys of summary.json."""

    metrics: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)


def record(
    folder: RunFolder,
    command: str,
    kind: Kind,
    metric: str,
    mode: str,
    config: Mapping[str, Any],
    provenance: Provenance,
    work: Callable[[RunFolder], Result],
    resumable: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Does `work(folder)`, whose files go to the folder's models/ (and arrays.npz there, for figures), and records it.

    `config` tells this piece of work from others of the command; `settings` are the rest of its parameters.

    A new folder is removed when the request turns out to be wrong (UserError) and, unless the work is `resumable`, when
    it breaks off for any other reason; the error goes on. What the work left stays, whatever happens after it.
    """
    began, resumed, done = time.monotonic(), folder.begun or folder.stages.exists(), False
    try:
        with folder.locked():
            journal = folder.journal(command)
            journal.write(
                "sweep", name=command, kind=kind.name, metric=metric, mode=mode, trials=1, settings=settings or {}
            )
            journal.write("started", trial=TRIAL, config=dict(config))
            folder.models.mkdir(exist_ok=True)
            with measured() as usage:
                result = work(folder)
            _store_arrays(folder, command)
            journal.write("metrics", trial=TRIAL, epoch=0, metrics={**result.metrics, **usage, FINISHED: 1})
            journal.write("finished", trial=TRIAL, status="completed", error=None)
            journal.write("done")
            done = True
            tracker = Tracker(folder, [command], provenance.tags())
            outcome = finish(folder, [command], provenance, tracker, time.monotonic() - began, result.summary)
            _log_model(tracker, outcome.sweeps[0], TRIAL, sorted(folder.models.iterdir()))
            return outcome
    except UserError:
        if not resumed and not done:
            folder.remove()
        raise
    except BaseException:
        if not resumable and not done:
            folder.remove()
        raise


def _store_arrays(folder: RunFolder, sweep: str) -> None:
    """Moves the arrays for figures from models/ to the trial's artifacts."""
    arrays = folder.models / ARRAYS
    if arrays.exists():
        target = Path(folder.trials(sweep)) / TRIAL / "artifacts"
        target.mkdir(parents=True, exist_ok=True)
        arrays.replace(target / ARRAYS)


# -- zoos, which have no run folder -----------------------------------------------------------------------------------


ABOUT_ZOOS = (
    "Zoos that `distrecon.zoo train` and `import` made, a run each: how many models and states they have, and the mean "
    "and the best accuracy on test images of the last states. The tag `path` says where a zoo lies, `digest` which one."
)


def record_zoo(zoo: Zoo, command: str, began: float, settings: Mapping[str, Any]) -> str | None:
    """Records a zoo that was just made in MLflow; returns why it was not recorded, in one line."""
    metrics = {
        "zoo/models": float(zoo.num_models),
        "zoo/states": float(zoo.num_states),
        "zoo/parameters": float(zoo.architecture.num_parameters),
        "time/seconds": time.time() - began,
    }
    groups = {split: values for split in ("train", "val", "test") if len(values := _last_accuracies(zoo, split))}
    if groups:
        accuracy = np.concatenate(list(groups.values()))
        metrics |= {"zoo/accuracy_mean": float(accuracy.mean()), "zoo/accuracy_max": float(accuracy.max())}
    tags = {**Provenance(0, False).tags(), "path": str(zoo.store), "digest": zoo.digest, "command": f"zoo {command}"}
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "accuracies.png"
        if groups:
            figures.save_png(figures.accuracy_distributions({zoo.name: groups}), picture)
        return record_once("zoos", zoo.name, began, settings, metrics, tags, [picture] if groups else [], ABOUT_ZOOS)


def _last_accuracies(zoo: Zoo, split: str) -> np.ndarray:
    """Of each model's last state, where they are known."""
    table = zoo.table(split, ["epoch", "test_accuracy"])
    epoch, accuracy = (table[name].to_numpy().astype(float) for name in ("epoch", "test_accuracy"))
    return accuracy[(epoch == epoch.max(initial=0)) & np.isfinite(accuracy)]


# -- what is printed --------------------------------------------------------------------------------------------------


def answer(
    outcome: Outcome, args: argparse.Namespace, command: str, text: str | None = None, code: int = console.DONE
) -> console.Answer:
    """A finished run's exit code, the text to print (the tables where none is given), its summary and its folder.

    `args` are the command's own: whether its numbers mean anything (`smoke`), and a name to `register` the model under.
    """
    registered = list(_register(outcome, args.register)) if args.register else []
    if outcome.failed or outcome.tracker.problem:
        code = console.SOME_FAILED
    body = "\n".join(tables_and_failures(outcome)) if text is None else text
    return console.Answer(
        code,
        "\n".join([body, *where(outcome, command, args.smoke), *(f"model    {uri}" for uri in registered)]),
        {
            "folder": str(outcome.folder.path),
            **outcome.folder.read_summary(),
            "mlflow": redact(outcome.tracker.uri),
            **({"registered": registered} if args.register else {}),
        },
    )


def _register(outcome: Outcome, name: str) -> Iterator[str]:
    """The new version of the best model of each sweep, under this name or, of several sweeps, name-sweep."""
    for sweep in outcome.sweeps:
        full = name if len(outcome.sweeps) == 1 else f"{name}-{sweep.name}"
        best = sweep.best() or next(iter(sweep.trials.values()))
        uri = outcome.tracker.register(sweep.name, best.trial, full)
        if uri is None:
            reason = outcome.tracker.problem or "its best trial left none"
            raise WorkFailed(f"--register {full}: no model of {sweep.name} was registered ({reason})")
        yield uri


def tables_and_failures(outcome: Outcome) -> Iterator[str]:
    """Each sweep's table, and the trials that failed."""
    for sweep in outcome.sweeps:
        yield f"\n{sweep.name} (* best by {sweep.metric})\n{tables.render(sweep, KINDS[sweep.kind])}"
        for trial in sweep.trials.values():
            if trial.error:
                yield f"failed: {tables.label(trial.config)}: {trial.error}"


def where(outcome: Outcome, command: str, smoke: bool) -> Iterator[str]:
    """Where the report, the numbers and the MLflow runs are."""
    if smoke:
        yield "\nA smoke run: every stage ran at its smallest, the numbers mean nothing."
    tracker, folder = outcome.tracker, outcome.folder
    yield f"\nreport   {console.short(folder.page)}\nnumbers  {console.short(folder.summary)}"
    if tracker.problem:
        yield f"MLflow   NOT COMPLETE: {tracker.problem}\n         all metrics are in the run folder"
        if command in RESUMABLE:
            yield f"         send the rest with python -m distrecon.{command} --resume {console.short(folder.path)}"
    else:
        yield f"MLflow   {tracker.viewer}"
