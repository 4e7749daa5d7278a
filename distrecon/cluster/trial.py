"""One trial of any kind on Ray Tune: its configuration is put together, its results are stored and reported."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrecon import config as configuration
from distrecon.record.artifacts import FINISHED, finish, finished, upload
from distrecon.record.kind import Kind, Trial
from distrecon.record.usage import measured
from distrecon.zoos import Zoo


def run_trial(
    values: Mapping[str, Any], kind: Kind, base: Mapping[str, Any], zoos: Mapping[str, Zoo], storage: str
) -> None:
    """Runs the trial of Tune's sampled `values` laid over the sweep's fixed ones, `base`.

    A trial that had finished before a crash reports its stored metrics again instead of running again.
    """
    from ray import tune

    config = configuration.replace(kind.config_type(), {**base, **values})
    name = tune.get_context().get_trial_id()
    address = f"{storage}/{name}"
    if (stored := finished(address)) is not None:
        tune.report(stored)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with measured() as usage:
            metrics = dict(kind.run(config, Trial(name, zoos, storage, Path(folder))))
        if not kind.reports_itself:
            metrics |= {**usage, "time/seconds": time.monotonic() - began, "epoch": 0}
        metrics[FINISHED] = 1
        upload(Path(folder), address)
    finish(address, metrics)
    tune.report(metrics)
