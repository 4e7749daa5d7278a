"""MLflow's store: where it lies, how it is made and asked, what a run may hold. `tracking.py` fills it."""

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from mlflow.artifacts import download_artifacts
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from distrecon.errors import UserError, redact, said

MODEL = "model"  # the artifact folder of a trial's files in runs of version 0.1
FILES = "files"  # where an MLflow model has the files of its own
NOTE = "mlflow.note.content"  # the tag that the UI shows as a description
NOTE_LENGTH = 5000  # of a description
PARAM_LENGTH = 500  # MLflow's databases hold 500 to 8,000 characters
PARAMS = 90  # of one request, which holds 100
DEFAULT = "0"  # the experiment that MLflow puts into every new database, for runs that name none
BEST = "best_run"  # the tag of a sweep's run that names its best trial's


def store_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path("mlflow.db").absolute())


def sqlite_uri(database: Path) -> str:
    """The address of a database file; what an address gives a meaning of its own is encoded."""
    return f"sqlite:///{str(database).replace('%', '%25').replace('?', '%3F')}"


def database_of(uri: str) -> Path:
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
    except Exception as error:  # MLflow's, its database's or its driver's: the work is done, and stays
        return f"MLflow at {redact(uri)}: {said(error)}"
    return None


def connect(uri: str) -> MlflowClient:
    """The store's client; a local database that is not there is made."""
    for library in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if uri.startswith("sqlite:///") and "?" not in uri:
        _create(database_of(uri))
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


def _create(database: Path) -> None:
    """Makes MLflow's database whole or not at all: one that an interrupt left half made would break every later run."""
    if database.exists():
        return
    # a name that was never used: MLflow keeps a process's stores by their address
    temporary = database.with_name(f".{database.name}.{uuid.uuid4().hex[:8]}")
    try:
        client = MlflowClient(sqlite_uri(temporary))
        if any(found.experiment_id == DEFAULT for found in client.search_experiments()):
            client.delete_experiment(DEFAULT)  # an empty row; `mlflow experiments restore` restores it
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, database)
    finally:
        temporary.unlink(missing_ok=True)


def _text(value: Any) -> str:
    return redact(value if isinstance(value, str) else json.dumps(value))[:PARAM_LENGTH]


def without_user(uri: str) -> str:
    """A server's address without user and password, so that a link to it works; the browser asks for them."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri
