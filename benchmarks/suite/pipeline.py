"""What Ray costs: start-up, a trial's overhead, a step's wait for its data; the default run by stages. Wall time."""

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.default_run import measure
from benchmarks.suite.harness import Row
from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.model import ZooSample
from distrecon.autoencoder.training import Batch, Training
from distrecon.zoos import Zoo
from distrecon.zoos.stream import stream


def _zoo(folder: Path, models: int) -> Zoo:
    """A zoo of random weights: reading it costs what reading any zoo costs."""
    from distrecon.nets import architecture
    from distrecon.zoos import format as zoo_format
    from distrecon.zoos import open_zoo
    from distrecon.zoos.storage import store

    arch, where = architecture("cnn_small"), store(folder)
    table = zoo_format.states_table(
        arch,
        model_id=[f"m{i}" for i in range(models)],
        epoch=[1] * models,
        split=["train"] * models,
        theta_SP=0.1 * torch.randn(models, arch.num_parameters),
        metrics={metric: [0.5] * models for metric in zoo_format.METRICS},
        config=["{}"] * models,
    )
    parts = [zoo_format.write_part(where, zoo_format.part_name(0), table)]
    images = {"name": "digits", "directory": None, "preprocessing": "", "classes": []}
    zoo_format.commit(where, name="made", arch=arch, image_set=images, parts=parts, origin={"kind": "benchmark"})
    return open_zoo(folder)


def waiting(zoo: Zoo, epochs: int) -> Row:
    """Share of an epoch that steps of the default configuration wait for Ray Data, after the first epoch."""
    config = AutoencoderConfig()
    sample_BP = zoo.sample(64, 0)
    training = Training(config, [ZooSample(zoo.architecture, sample_BP, zoo.images())], total_steps=1000)
    waited: dict[int, float] = defaultdict(float)
    spent: dict[int, float] = defaultdict(float)
    asked = time.monotonic()
    for batch in stream([zoo], batch_size=config.optim.batch_size, last_epoch=epochs - 1):
        came = time.monotonic()
        training.step(Batch(batch.epoch, batch.step, 0, batch.row_b, batch.theta_bP, batch.global_size, batch.offset))
        waited[batch.epoch] += came - asked
        spent[batch.epoch] += time.monotonic() - asked
        asked = time.monotonic()
    shares = [waited[epoch] / spent[epoch] for epoch in sorted(spent)]
    note = (
        f"{100 * median(shares[1:]):.1f} % of later epochs, {100 * shares[0]:.0f} % of the first, with Ray Data's start"
    )
    return Row(
        "step waits for data", median(list(waited.values())[1:]), note=note, numbers={"share": median(shares[1:])}
    )


def ray_costs(quick: bool) -> list[Row]:
    """Starting Ray here, an empty trial of Ray Tune, and the waiting for data."""
    import ray
    from ray import tune

    start = time.monotonic()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=256 * 2**20,
    )  # fmt: skip
    rows = [Row("start of Ray on this machine", time.monotonic() - start)]
    try:
        trials = 4 if quick else 16
        with tempfile.TemporaryDirectory() as folder:
            tuner = tune.Tuner(
                tune.with_resources(lambda config: {"metric": config["x"]}, {"cpu": 1}),
                param_space={"x": tune.grid_search(list(range(trials)))},
                run_config=tune.RunConfig(storage_path=folder, verbose=0),
            )
            start = time.monotonic()
            tuner.fit()
            seconds = time.monotonic() - start
            rows.append(Row("an empty trial of Ray Tune", seconds / trials, note=f"{trials} trials, two at a time"))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(waiting(_zoo(Path(folder) / "zoo", 320 if quick else 960), 3))
    finally:
        ray.shutdown()
    return rows


def default_run(quick: bool) -> list[Row]:
    """The default command on an empty folder, stage by stage, and its wall time outside work."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(["--smoke"] if quick else [], Path(folder))
    if figures["rc"]:
        raise RuntimeError(f"distrecon.tune ended with {figures['rc']}")
    return run_rows(figures)


def run_rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of what `benchmarks.default_run.measure` found."""
    names = {"start": "imports, checks, Ray's start", "end": "the tables, Ray's end"}
    notes = {"sweeps": f"training, scoring or recovering {figures['trials_at_once']:.1f} trials at once"}
    share = figures["outside_share"]
    return [
        *(Row(f"stage: {names.get(s, s)}", seconds, note=notes.get(s, "")) for s, seconds in figures["stages"].items()),
        Row("the whole default run", figures["seconds"], note=f"{figures['peak_gib']:.1f} GiB at most"),
        Row(
            "of it, outside zoo, training, recovery and scoring", figures["outside_seconds"],
            note=f"{100 * share:.0f} % of the wall time", numbers={"share": share},
        ),
    ]  # fmt: skip
