"""Sweeps on Ray Tune: one Tuner a space file, several side by side on one Ray session, each writing its journal.

Ctrl-C, a killed driver or a lost node leave the journals and Tune's own state behind; `run_sweeps` on the same folder
goes on from there: trials that failed run again, those that had finished never do.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback

from distrecon import config as configuration
from distrecon.cluster import session
from distrecon.cluster.space import Dimension, Sweep
from distrecon.cluster.trial import run_trial
from distrecon.errors import OUT_OF_MEMORY, UserError, WorkFailed, is_out_of_memory
from distrecon.record.artifacts import FINISHED
from distrecon.record.folder import RunFolder
from distrecon.record.journal import Journal
from distrecon.zoos import Zoo
from distrecon.zoos.storage import store

ASK_SECONDS = 5.0  # how often a sweep looks whether the cluster has grown
LEAVE_SECONDS = 10.0  # how long an interrupted command waits for Tune to let its trials go
WAITING = 8  # trials that wait for nodes an autoscaler may bring; each is a small process on the head

# What Tune writes of an actor that ended because its node or process did
LOST = ("its node has died", "ActorDiedError", "ActorUnavailableError", "The actor died unexpectedly", "actor is dead")


leaving = threading.Event()  # set when run_sweeps is left; no part of the callback, which Tune pickles


class Left(Exception):
    """The command was interrupted: Tune's loop ends, and what it saved last is what a resumed run goes on from."""


class JournalCallback(Callback):
    """Writes Tune's events to the journal; ends Tune's loop when the command is left."""

    def __init__(self, sweep: Sweep, journal: Journal) -> None:
        self.sweep, self.journal = sweep, journal

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if leaving.is_set():
            raise Left

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        s, kind = self.sweep, self.sweep.kind
        settings = {key: value for key, value in configuration.flatten(s.base).items() if key not in s.space}
        self.journal.write(
            "sweep",
            name=s.name,
            kind=kind.name,
            metric=s.metric,
            mode=s.mode,
            trials=s.trials,
            epochs=kind.epochs(s.base),
            settings=settings,
        )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.journal.write("started", trial=trial.trial_id, config=trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = {key: value for key, value in result.items() if "/" in key and not key.startswith("config/")}
        self.journal.write("metrics", trial=trial.trial_id, epoch=result.get("epoch", 0), metrics=metrics)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune begins the trial again; one that failed by itself, not with its node, only once."""
        if not _lost(trial):
            trial.max_failures = min(trial.max_failures, trial.num_failures)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        finished = (trial.last_result or {}).get(FINISHED, False)
        self.journal.write(
            "finished", trial=trial.trial_id, status="completed" if finished else "stopped_early", error=None
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.journal.write("finished", trial=trial.trial_id, status="failed", error=root_cause(trial))


def _lost(trial: Any) -> bool:
    """Whether the trial's last failure was the loss of its process or node."""
    text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
    return any(sign in text.rpartition("Failure # ")[2] for sign in LOST)


def root_cause(trial: Any) -> str:
    """One line of the trial's error text: its innermost error."""
    file = Path(trial.error_file) if trial.error_file else None
    if file is None or not file.exists():
        return "the trial's process was lost"
    return innermost(file.read_text(errors="replace"))


def innermost(text: str) -> str:
    """The last line of an error's text that names an error, or its last line."""
    if is_out_of_memory(text):
        return OUT_OF_MEMORY
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["unknown error"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)(\(\w+\))?: ", line)]
    line = (named or lines)[-1]
    return re.sub(r"^[\w.]*UserError: ", "", line)[:500]


def run_sweeps(
    sweeps: Sequence[Sweep],
    folder: RunFolder,
    zoos: Mapping[str, Zoo],
    seed: int,
    watch: Callable[[], None],
) -> None:
    """Runs the sweeps side by side until all their trials ended; `watch` is called about twice a second.

    Ray must be connected. An interrupt in `watch` leaves everything resumable.
    """
    threads: list[threading.Thread] = []
    failures: list[str] = []
    leaving.clear()
    try:
        for sweep in sweeps:
            _start(sweep, folder, zoos, seed, threads, failures)
        while any(thread.is_alive() for thread in threads):
            watch()
            time.sleep(0.5)
    finally:  # Ray ends a process in which a thread still uses it after the shutdown, with an exit code of its own
        leaving.set()
        for thread in threads:
            thread.join(LEAVE_SECONDS)
    watch()
    if failures:
        raise WorkFailed("; ".join(failures))


def _start(
    sweep: Sweep,
    folder: RunFolder,
    zoos: Mapping[str, Zoo],
    seed: int,
    threads: list[threading.Thread],
    failures: list[str],
) -> None:
    """Starts a sweep's thread, unless all its trials have completed."""
    journal = folder.journal(sweep.name)
    events, offset = journal.read()
    failed = any(t.status == "failed" for t in folder.read(sweep.name).trials.values())
    if events and events[-1]["event"] == "done" and not failed:
        return

    def run() -> None:
        try:
            _tuner(sweep, folder, zoos, seed, journal).fit()
            journal.write("done")
        except Left:
            return
        except Exception as error:  # handed to the main thread, which raises it
            errors = [event["error"] for event in journal.read()[0] if event.get("error")] or [innermost(str(error))]
            failures.append(f"sweep {sweep.name} broke off: {errors[-1]}")

    threads.append(threading.Thread(target=run, name=sweep.name, daemon=True))
    threads[-1].start()
    # Tune's registry is not thread-safe while a Tuner starts: wait until this one runs before starting the next
    while threads[-1].is_alive() and not any(e["event"] == "sweep" for e in journal.read(offset)[0]):
        time.sleep(0.05)


def _tuner(sweep: Sweep, folder: RunFolder, zoos: Mapping[str, Zoo], seed: int, journal: Journal) -> tune.Tuner:
    trainable = _trainable(sweep, folder, zoos)
    path = f"{folder.tune}/{sweep.name}"
    if tune.Tuner.can_restore(path) and _has_state(folder.tune, sweep.name):
        return tune.Tuner.restore(
            path, trainable=trainable, resume_unfinished=True, resume_errored=True, param_space=_param_space(sweep)
        )
    if journal.read()[0]:  # an earlier start broke off before Tune could store its state: all trials begin anew
        journal.write("restart")
    return tune.Tuner(
        trainable,
        param_space=_param_space(sweep),
        tune_config=tune.TuneConfig(
            num_samples=sweep.samples,
            scheduler=_scheduler(sweep),
            search_alg=Variants(sweep, seed),
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            storage_path=folder.tune,
            callbacks=[JournalCallback(sweep, journal)],
            failure_config=tune.FailureConfig(max_failures=_restarts(sweep)),
            verbose=0,
        ),
    )


def _restarts(sweep: Sweep) -> int:
    resources = getattr(sweep.base, "resources", None)
    return resources.max_failures if resources is not None else 0


class Variants(tune.search.BasicVariantGenerator):
    """The sweep's trials, as many at once as the cluster holds, asked anew as it grows."""

    def __init__(self, sweep: Sweep, seed: int) -> None:
        super().__init__(random_state=seed)
        self.sweep, self.asked = sweep, -math.inf

    def next_trial(self) -> Any:
        if time.monotonic() - self.asked > ASK_SECONDS:
            self.max_concurrent, self.asked = self.sweep.max_concurrent or concurrent(self.sweep), time.monotonic()
        return super().next_trial()

    def get_state(self) -> Any:
        state = super().get_state()
        return {key: value for key, value in state.items() if key not in ("sweep", "asked")} if state else state


def _trainable(sweep: Sweep, folder: RunFolder, zoos: Mapping[str, Zoo]) -> Any:
    """What Tune runs for this sweep: a function of its own, named as the sweep.

    Tune keeps functions and their parameters by name; under one name a sweep would run another's trials.
    """

    def trial(values: Mapping[str, Any], **fixed: Any) -> None:
        run_trial(values, **fixed)

    trial.__name__ = trial.__qualname__ = sweep.name
    function = tune.with_parameters(
        trial,
        kind=sweep.kind,
        base=configuration.flatten(sweep.base),
        zoos={name: zoos[name] for name in sweep.zoos},
        storage=folder.trials(sweep.name),
    )
    needs = sweep.kind.needs(sweep.base)
    # a process that only waits for workers of its own is safest on the head
    place = session.on_head() if needs.process != needs.whole else {}
    return tune.with_resources(function, {**needs.process, **place})


def _has_state(storage: str, name: str) -> bool:
    """Whether Tune stored its trials whole; without them `Tuner.restore` would make new ones beside the journal's."""
    where = store(storage)
    states = [where.read(file) for file in where.names(name) if "experiment_state" in file]
    return any(state.rstrip().endswith(b"}") for state in states)


def check_resources(sweeps: Sequence[Sweep]) -> None:
    """UserError when the cluster could never run one trial of a sweep; where it grows by itself, nobody knows."""
    if session.grows():
        return
    has = session.available()
    for sweep in sweeps:
        for name, least in sweep.kind.needs(sweep.base).least.items():
            if least > has[name]:
                raise UserError(
                    f"a trial needs {least:g} {name}s and the whole cluster has at most {has[name]:g}: "
                    f"lower resources.num_workers or resources.{name.lower()}s_per_worker"
                    + (", or leave out --use-gpu" if name == "GPU" else "")
                )


def concurrent(sweep: Sweep) -> int:
    """How many of the sweep's trials are begun at once: what the cluster holds now, and where it grows by itself some
    more, for which it then starts nodes."""
    has, needs = session.available(), sweep.kind.needs(sweep.base)
    fits = int(min(has[name] // amount for name, amount in needs.whole.items()))
    return max(1, fits + (WAITING if session.grows() else 0))


def _scheduler(sweep: Sweep) -> Any:
    if sweep.scheduler == "fifo":
        return None
    epochs = sweep.kind.epochs(sweep.base) or 1
    # counted in epochs: Tune's own count of reports starts again when a sweep is restored
    return tune.schedulers.ASHAScheduler(
        time_attr="epoch", metric=sweep.metric, mode=sweep.mode, max_t=epochs + 1, grace_period=max(1, epochs // 4)
    )


def _param_space(sweep: Sweep) -> dict[str, Any]:
    return {key: _domain(dimension) for key, dimension in sweep.space.items()}


def _domain(dimension: Dimension) -> Any:
    if dimension.how == "grid":
        return tune.grid_search(list(dimension.values))
    if dimension.how == "choice":
        return tune.choice(list(dimension.values))
    return getattr(tune, dimension.how)(*dimension.values)
