"""One piece of work in this process, recorded as a sweep of one trial: the same journal, MLflow runs and report."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distrecon import job, runs
from distrecon.cluster.artifacts import FINISHED, upload
from distrecon.cluster.sweeps import Place
from distrecon.tracking import Tracker
from distrecon.zoos import Zoo

TRIAL = "single"


def record(
    name: str,
    kind: str,
    metric: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    zoos: Mapping[str, Zoo],
    out: str | None,
    seed: int,
    work: Callable[[Path], dict[str, Any]],
    smoke: bool = False,
) -> job.Outcome:
    """Makes a run folder, does `work(artifacts folder) -> metrics` in it, and records everything.

    When the work raises, no folder is left and the error goes on.
    """
    request = job.Request(spaces=(), overrides=dict(settings), seed=seed, smoke=smoke)
    folder = runs.create(out, name, {"config": dict(config), "settings": dict(settings), "seed": seed})
    place = Place(folder, str(folder))
    journal, began = place.journal(name), time.monotonic()
    artifacts = folder / ".work"
    artifacts.mkdir()
    try:
        metrics = work(artifacts)
    except BaseException:
        shutil.rmtree(folder)
        raise
    upload(artifacts, f"{place.storage}/trials/{name}/{TRIAL}")
    for file in artifacts.iterdir():
        file.unlink()
    artifacts.rmdir()
    journal.write("sweep", name=name, kind=kind, metric=metric, mode="max", trials=1)
    journal.write("started", trial=TRIAL, config=dict(config))
    journal.write("metrics", trial=TRIAL, epoch=0, metrics={**metrics, FINISHED: 1})
    journal.write("finished", trial=TRIAL, status="completed", error=None)
    journal.write("done")
    tracker = Tracker(folder, [name], job.tags(request, zoos))
    return job.finish(request, place, [name], zoos, tracker, time.monotonic() - began)
