"""What is sent to MLflow. Journals are sent to the tracking store as they grow, from the driver.

The journal is the record, the store a copy: what was sent is remembered in the run folder, so when the store is down
the rest is sent later, and nothing is sent twice. An experiment a sweep name, a parent run a sweep, a child a trial.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from distrecon import console
from distrecon.errors import redact, said
from distrecon.files import write_json
from distrecon.record.artifacts import FINISHED
from distrecon.record.folder import RunFolder
from distrecon.record.store import (
    BEST,
    NOTE,
    NOTE_LENGTH,
    connect,
    database_of,
    experiment,
    log,
    sqlite_uri,
    store_uri,
    without_user,
)

STATUS = {"completed": "FINISHED", "stopped_early": "KILLED", "failed": "FAILED"}
RETRY_SECONDS = 30.0
COMPARED = 100  # runs that one address names
LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` shows a local store


class Tracker:
    """Sends the journals of one run folder to MLflow; `sync` as often as one likes.

    A store that does not answer, or raises whatever it may, is asked again after 30 s; `problem` then holds the reason
    in one line.
    """

    def __init__(self, folder: RunFolder, sweeps: Sequence[str], tags: Mapping[str, str]) -> None:
        self.folder, self.sweeps, self.tags = folder, list(sweeps), dict(tags)
        self.uri = store_uri()
        self.problem: str | None = None
        self._next_try = 0.0
        self._client: MlflowClient | None = None
        self._sent = self._load()

    # -- sending ------------------------------------------------------------------------------------------------------

    def sync(self, force: bool = False) -> bool:
        """Sends what is new; False when the store did not answer."""
        if time.monotonic() < self._next_try and not force:
            return False
        try:
            with _undisturbed():
                for name in self.sweeps:
                    self._sync_sweep(name)
        except Exception as error:  # MLflow's, its database's or its driver's: the record is the journal, and goes on
            self.problem = self._said(error)
            self._next_try = time.monotonic() + RETRY_SECONDS
            return False
        self.problem = None
        return True

    def _said(self, error: Exception) -> str:
        return redact(f"MLflow at {self.uri}: {said(error)}")

    def _sync_sweep(self, name: str) -> None:
        sent = self._sent.setdefault(name, {"offset": 0, "runs": {}, "experiment": None})
        events, offset = self.folder.journal(name).read(sent["offset"])
        for event in events:
            self._send(name, sent, event)
        if offset != sent["offset"]:
            sent["offset"] = offset
            self._save()

    def _send(self, name: str, sent: dict[str, Any], event: Mapping[str, Any]) -> None:
        what, at = event["event"], int(event["time"] * 1000)
        trial = event.get("trial", "")
        if what == "sweep":
            sent["settings"] = event.get("settings", {})
            self._open(
                name, sent, "", self.folder.path.name, at, {"kind": event["kind"], "objective": event["metric"]}, {}
            )
        elif what == "started":
            label = ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in event["config"].items())
            params = {**sent.get("settings", {}), **event["config"]}
            self._open(name, sent, trial, label or trial, at, {"trial_id": trial}, params)
        elif what == "metrics":
            metrics = [
                Metric(key, float(value), at, int(event["epoch"]))
                for key, value in event["metrics"].items()
                if _is_number(value) and key != FINISHED
            ]
            self._log(sent["runs"][trial], metrics=metrics)
        elif what == "finished":
            if event["error"]:
                self._log(sent["runs"][trial], tags={"error": event["error"]})
            self.client.set_terminated(sent["runs"][trial], STATUS[event["status"]], at)
        elif what == "done":
            self.client.set_terminated(sent["runs"][""], "FINISHED", at)

    def _open(
        self,
        name: str,
        sent: dict[str, Any],
        key: str,
        label: str,
        at: int,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
    ) -> None:
        """Starts a run (`key` "" is the sweep's own), or sets an interrupted one going again."""
        if key in sent["runs"]:
            self.client.update_run(sent["runs"][key], status="RUNNING")
            return
        sent["experiment"] = experiment(self.client, self.uri, name, sent["experiment"], self.folder.path.name)
        parent = {"mlflow.parentRunId": sent["runs"][""]} if key else {}
        run = self.client.create_run(
            sent["experiment"], at, {"mlflow.runName": label, "run_folder": str(self.folder.path), **parent}
        )
        sent["runs"][key] = run.info.run_id
        self._save()
        # a request that a slow server answers too late is sent again by MLflow's client, and has made a run each time
        for other in self.client.search_runs([sent["experiment"]], f"attributes.start_time = {at}"):
            if other.info.run_id != run.info.run_id and other.data.tags == run.data.tags:
                self.client.delete_run(other.info.run_id)
        self._log(run.info.run_id, params=params, tags={**self.tags, **tags})

    def _log(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        log(self.client, run_id, metrics, params or {}, tags or {})

    @property
    def client(self) -> MlflowClient:
        """Made on first use, which creates a local database where there is none."""
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    # -- files, the end -----------------------------------------------------------------------------------------------

    def artifacts(self, sweep: str, trial: str, files: Sequence[Path], folder: str | None = None) -> bool:
        """Adds files to a trial's run, or with trial "" to the sweep's; False when the store did not answer."""
        run = self._sent.get(sweep, {}).get("runs", {}).get(trial)
        if run is None:
            return False

        def send() -> None:
            for file in files:
                self.client.log_artifact(run, str(file), folder)

        return self._try(send)

    def model(self, sweep: str, trial: str, package: Path, kind: str) -> bool:
        """Adds an MLflow model, a folder, to a trial's run, once; False when the store did not answer."""
        sent = self._sent.get(sweep, {})
        run = sent.get("runs", {}).get(trial)
        models = sent.setdefault("models", {})
        if run is None or trial in models:
            return run is not None

        def send() -> None:
            model = self.client.create_logged_model(sent["experiment"], name=kind, source_run_id=run, model_type=kind)
            self.client.log_model_artifacts(model.model_id, str(package))
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self.client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
            models[trial] = model.model_id
            self._save()

        return self._try(send)

    def register(self, sweep: str, trial: str, name: str) -> str | None:
        """Registers a trial's model as the next version of `name`, and says which; None when there is no such model."""
        model = self._sent.get(sweep, {}).get("models", {}).get(trial)
        versions: list[str] = []

        def send() -> None:
            with contextlib.suppress(MlflowException):  # it is there already; what else it may be, the next line meets
                self.client.create_registered_model(name)
            run = self._sent[sweep]["runs"][trial]
            made = self.client.create_model_version(name, f"models:/{model}", run_id=run, model_id=model)
            versions.append(f"models:/{name}/{made.version}")

        return versions[0] if model is not None and self._try(send) else None

    def _try(self, send: Callable[[], None]) -> bool:
        """False, with the reason in `problem`, when the store did not answer."""
        try:
            send()
        except Exception as error:
            self.problem = self._said(error)
            return False
        return True

    def interrupt(self) -> None:
        """Leaves no run RUNNING: what has not ended is marked as killed, until a resumed run goes on with it."""
        for name, sent in self._sent.items():
            events, _ = self.folder.journal(name).read()
            ended = {e["trial"] for e in events if e["event"] == "finished"}
            ended |= {""} if any(e["event"] == "done" for e in events) else set()
            try:
                for key, run in sent["runs"].items():
                    if key not in ended:
                        self.client.set_terminated(run, "KILLED")
            except Exception as error:
                self.problem = self._said(error)
                return

    def run_ids(self, sweep: str) -> dict[str, str]:
        """Trial -> MLflow run id; "" is the sweep's own."""
        return dict(self._sent.get(sweep, {}).get("runs", {}))

    def conclude(
        self, sweep: str, best: str | None, metrics: Mapping[str, Any], table: str, advice: str, about: str
    ) -> None:
        """Gives a sweep's run its table and what to try next, which the UI shows as its description, its best trial's
        run and metrics, by which sweeps compare; and the experiment a description of its columns."""
        run_ids, at = self.run_ids(sweep), int(time.time() * 1000)

        def send() -> None:
            self.client.set_experiment_tag(self._sent[sweep]["experiment"], NOTE, about[:NOTE_LENGTH])
            compare = f"[Compare the trials]({url})" if (url := self.compare_url(sweep)) else ""
            text = "\n\n".join(filter(None, [compare, f"```\n{table}\n```", advice]))
            self.client.set_tag(run_ids[""], NOTE, text[:NOTE_LENGTH])
            if best in run_ids:
                self.client.set_tag(run_ids[""], BEST, run_ids[best])
                numbers = [
                    Metric(key, float(v), at, 0) for key, v in metrics.items() if _is_number(v) and key != FINISHED
                ]
                self._log(run_ids[""], metrics=numbers)

        if "" in run_ids:
            self._try(send)

    @property
    def viewer(self) -> str:
        """Where the store is shown: its address, or the command that shows a local one."""
        if not self.uri.startswith("sqlite:///"):
            return redact(self.uri)
        return f"mlflow ui --backend-store-uri {sqlite_uri(Path(console.short(database_of(self.uri))))}"

    def run_url(self, sweep: str, trial: str) -> str | None:
        """Where a trial's run is shown (of a local store while `viewer` runs); None when it was never sent."""
        sent = self._sent.get(sweep, {})
        run = sent.get("runs", {}).get(trial)
        return f"{self._ui}/#/experiments/{sent['experiment']}/runs/{run}" if run else None

    def compare_url(self, sweep: str) -> str | None:
        """Where a sweep's trials are compared, its first hundred; None of fewer than two."""
        sent = self._sent.get(sweep, {})
        runs = [run for trial, run in sent.get("runs", {}).items() if trial][:COMPARED]
        if len(runs) < 2:
            return None
        values = {"runs": json.dumps(runs), "experiments": json.dumps([sent["experiment"]])}
        return f"{self._ui}/#/compare-runs?{urlencode(values, quote_via=quote)}"

    @property
    def _ui(self) -> str:
        return without_user(self.uri).rstrip("/") if self.uri.startswith("http") else LOCAL_UI

    def _load(self) -> dict[str, Any]:
        """What was sent before to this store. Where that cannot be read, all is sent again: as new runs, but whole."""
        try:
            saved = json.loads(self.folder.tracking.read_text())
            same = saved["uri"] == redact(self.uri)
            sent = {
                name: {"offset": int(one["offset"]), "runs": dict(one["runs"]), "experiment": one["experiment"],
                       "models": dict(one.get("models", {})), "settings": dict(one.get("settings", {}))}
                for name, one in saved["sweeps"].items()
            }  # fmt: skip
        except (OSError, LookupError, AttributeError, TypeError, ValueError, RecursionError):
            return {}
        return sent if same else {}

    def _save(self) -> None:
        write_json(self.folder.tracking, {"uri": redact(self.uri), "sweeps": self._sent})


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts an interrupt off to the end: between a run's making and its note it would leave a run without a record."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    pending: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: pending.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")
