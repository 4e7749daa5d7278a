"""What is sent to MLflow. Journals are sent to the tracking store as they grow, from the driver.

The journal is the record, the store a copy: what was sent is remembered in the run folder, so when the store is down
the rest is sent later, and nothing is sent twice. An experiment a sweep name, a parent run a sweep, a child a trial.
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# a store that is down must not hold the sweep's progress up for minutes: what fails is sent again later anyway
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow.artifacts import download_artifacts
from mlflow.entities import LifecycleStage, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from distrecon import console
from distrecon.errors import UserError, redact, said
from distrecon.files import write_json
from distrecon.record.artifacts import FINISHED
from distrecon.record.folder import RunFolder

STATUS = {"completed": "FINISHED", "stopped_early": "KILLED", "failed": "FAILED"}
RETRY_SECONDS = 30.0
MODEL = "model"  # the artifact folder of a trial's files in runs of version 0.1
FILES = "files"  # where an MLflow model has the files of its own
NOTE = "mlflow.note.content"  # the tag that the UI shows as a description
NOTE_LENGTH = 5000  # of a description
PARAM_LENGTH = 500  # MLflow's databases hold 500 to 8,000 characters
PARAMS = 90  # of one request, which holds 100
DEFAULT = "0"  # the experiment that MLflow puts into every new database, for runs that name none


COMPARED = 100  # runs that one address names
LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` shows a local store
BEST = "best_run"  # the tag of a sweep's run that names its best trial's


def store_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(Path("mlflow.db").absolute())


def _sqlite(database: Path) -> str:
    """The address of a database file; what an address gives a meaning of its own is encoded."""
    return f"sqlite:///{str(database).replace('%', '%25').replace('?', '%3F')}"


def _database(uri: str) -> Path:
    """The file of such an address."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


def model_folder(run_id: str) -> Path:
    """A local copy of the model's files of a trial's run, or of a sweep's best trial; UserError when there are none."""
    try:
        client = MlflowClient(store_uri())
        best = client.get_run(run_id).data.tags.get(BEST, run_id)
        outputs = client.get_run(best).outputs
        if outputs is not None and outputs.model_outputs:
            model = outputs.model_outputs[-1].model_id
            return Path(download_artifacts(f"models:/{model}", tracking_uri=store_uri())) / "artifacts" / FILES
        if not client.list_artifacts(best, MODEL):
            raise UserError(f"MLflow run {run_id} holds no model: name an autoencoder's run, or its sweep's")
        return Path(client.download_artifacts(best, MODEL))
    except UserError:
        raise
    except Exception as error:  # MLflow's, its database's or its driver's
        raise UserError(redact(f"MLflow at {store_uri()}: {said(error)}")) from None


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
        return f"mlflow ui --backend-store-uri {_sqlite(Path(console.short(_database(self.uri))))}"

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
        return _without_user(self.uri).rstrip("/") if self.uri.startswith("http") else LOCAL_UI

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


def record_once(
    name: str,
    run: str,
    began: float,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    files: Sequence[Path],
    about: str,
) -> str | None:
    """Sends a piece of work that has no run folder: one finished run, with figures, in the experiment `name`, which
    gets the description `about`. Returns why the store did not take it, in one line."""
    uri, now = store_uri(), int(time.time() * 1000)
    try:
        client = connect(uri)
        where = experiment(client, uri, name)
        client.set_experiment_tag(where, NOTE, about[:NOTE_LENGTH])
        made = client.create_run(where, int(began * 1000), {"mlflow.runName": run}).info.run_id
        log(client, made, [Metric(key, value, now, 0) for key, value in metrics.items()], params, tags)
        for file in files:
            client.log_artifact(made, str(file), "figures")
        client.set_terminated(made, "FINISHED", now)
    except (MlflowException, OSError) as error:
        return f"MLflow at {redact(uri)}: {said(error)}"
    return None


def connect(uri: str) -> MlflowClient:
    """The store's client; a local database that is not there is made."""
    for library in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///") and "?" not in uri:
        _create(_database(uri))
    return MlflowClient(uri)


def experiment(client: MlflowClient, uri: str, name: str, known: str | None = None, other: str = "again") -> str:
    """The id of the experiment of that name (or the `known` one), made where there is none.

    One that was deleted in MLflow's page comes back; where the store does not let it, its name stays taken, and a new
    one has `other` in its name.
    """
    found = client.get_experiment(known) if known else client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == LifecycleStage.DELETED:
        try:
            client.restore_experiment(found.experiment_id)
        except MlflowException:
            found, name = None, f"{name} ({other})"
    if found is not None:
        return found.experiment_id
    local = uri.startswith("sqlite")
    return client.create_experiment(name, Path("mlruns").absolute().as_uri() if local else None)


def log(
    client: MlflowClient, run_id: str, metrics: Sequence[Metric], params: Mapping[str, Any], tags: Mapping[str, str]
) -> None:
    """Adds to a run, in requests that hold as much as they may."""
    parameters = [Param(key, _text(value)) for key, value in params.items()]
    run_tags = [RunTag(key, redact(str(value))[:PARAM_LENGTH]) for key, value in tags.items()]
    for start in range(PARAMS, len(parameters), PARAMS):
        client.log_batch(run_id, params=parameters[start : start + PARAMS])
    if metrics or parameters or run_tags:
        client.log_batch(run_id, metrics=metrics, params=parameters[:PARAMS], tags=run_tags)


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


def _create(database: Path) -> None:
    """Makes MLflow's database whole or not at all: one that an interrupt left half made would break every later run."""
    if database.exists():
        return
    # a name that was never used: MLflow keeps a process's stores by their address
    temporary = database.with_name(f".{database.name}.{uuid.uuid4().hex[:8]}")
    try:
        client = MlflowClient(_sqlite(temporary))
        if any(found.experiment_id == DEFAULT for found in client.search_experiments()):
            client.delete_experiment(DEFAULT)  # an empty row; `mlflow experiments restore` restores it
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, database)
    finally:
        temporary.unlink(missing_ok=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")


def _text(value: Any) -> str:
    return redact(value if isinstance(value, str) else json.dumps(value))[:PARAM_LENGTH]


def _without_user(uri: str) -> str:
    """A server's address without user and password, so that a link to it works; the browser asks for them."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
