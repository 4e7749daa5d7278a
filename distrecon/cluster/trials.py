"""What one trial of each kind does. Each is a function of Tune's sampled values and the sweep's fixed ones.

A trial that had finished before a crash reports its stored metrics again instead of running again.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrecon import config as configuration
from distrecon.cluster.artifacts import FINISHED, finish, finished, upload
from distrecon.cluster.kinds import AutoencoderRun, RecoveryRun, ResourcesConfig
from distrecon.zoos import Zoo

DRIVER_CPUS = 0.01  # what an autoencoder trial itself takes; its workers take the rest


def reserved(kind: str, config: ResourcesConfig) -> dict[str, float]:
    """What Tune reserves for one trial's own process."""
    if kind == "autoencoder":  # Ray Train reserves its workers' CPUs and GPUs itself
        return {"CPU": DRIVER_CPUS}
    return {"CPU": config.cpus_per_worker}


def autoencoder(values: Mapping[str, Any], base: Mapping[str, Any], zoos: Mapping[str, Zoo], storage: str) -> None:
    """Trains and scores one autoencoder; the training's own reports become the trial's."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from distrecon.cluster.training import train_autoencoder

    run: AutoencoderRun = configuration.replace(AutoencoderRun(), {**base, **values})
    trial = tune.get_context().get_trial_id()
    if (stored := finished(storage, trial)) is not None:
        tune.report(stored)
        return
    result = train_autoencoder(run, [zoos[name] for name in run.zoo], storage, trial, [TuneReportCallback()])
    finish(storage, trial, result.metrics)


def expand_cluster(values: Mapping[str, Any], base: Mapping[str, Any], zoos: Mapping[str, Zoo], storage: str) -> None:
    """Trains a teacher, recovers it from its answers alone, scores the recovery against it."""
    from ray import tune

    from distrecon.cluster.recovery import recover_teacher

    run: RecoveryRun = configuration.replace(RecoveryRun(), {**base, **values})
    trial = tune.get_context().get_trial_id()
    metrics = finished(storage, trial)
    if metrics is None:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            metrics = recover_teacher(run, Path(folder))
            metrics |= {"time/seconds": time.monotonic() - began, "epoch": 0, FINISHED: 1}
            upload(Path(folder), f"{storage}/{trial}")
        finish(storage, trial, metrics)
    tune.report(metrics)


RUNNERS = {"autoencoder": autoencoder, "expand_cluster": expand_cluster}
