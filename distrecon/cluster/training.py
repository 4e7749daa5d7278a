"""One autoencoder training on Ray Train: Ray Data shard -> steps -> report and checkpoint every epoch -> tasks.

`train_autoencoder` runs anywhere Ray is connected: from a command, or inside a Tune trial, whose trial it then reports to.
"""

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distrecon import config as configuration
from distrecon.autoencoder.model import ZooSample
from distrecon.autoencoder.store import save_autoencoder
from distrecon.autoencoder.tasks import run_tasks
from distrecon.autoencoder.training import Training
from distrecon.cluster.kinds import AutoencoderRun
from distrecon.zoos import Zoo

STATE = "training.pt"
RESERVE = 0.1  # of a CPU, left to the trial's driver and to Ray Data's reads when workers hold all others


def train_autoencoder(
    run: AutoencoderRun, zoos: Sequence[Zoo], storage: str, name: str, callbacks: Sequence[Any] = ()
) -> Any:
    """Trains and scores one autoencoder; returns Ray's Result.

    Everything lies under `storage`/`name`: each epoch's checkpoint, and with the last report the autoencoder, the
    tasks' arrays and the generated models. A training of the same name continues from its last checkpoint.
    """
    from ray import train
    from ray.train.torch import TorchTrainer

    resources = run.resources
    per_worker = {"CPU": max(0.1, resources.cpus_per_worker - RESERVE)}
    if resources.use_gpu:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"run": configuration.flatten(run), "zoos": list(zoos)},
        scaling_config=train.ScalingConfig(
            num_workers=resources.num_workers, use_gpu=resources.use_gpu, resources_per_worker=per_worker
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            callbacks=list(callbacks),
        ),
    )
    return trainer.fit()


def train_loop(settings: Mapping[str, Any]) -> None:
    """The body of every Ray Train worker."""
    from ray import train

    from distrecon.zoos.stream import stream

    run: AutoencoderRun = configuration.replace(AutoencoderRun(), settings["run"])
    zoos: list[Zoo] = settings["zoos"]
    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, math.floor(run.resources.cpus_per_worker)))
    device = torch.device("cuda" if run.resources.use_gpu else "cpu")
    began = time.monotonic()
    training, first_epoch = _prepare(run, zoos, device)
    batches = stream(
        zoos,
        split="train",
        batch_size=run.optim.batch_size,
        shards=run.data.shards,
        rank=rank,
        world_size=workers,
        seed=run.seed,
        first_epoch=first_epoch,
        last_epoch=run.optim.epochs,
    )
    sums: dict[str, float] = defaultdict(float)
    seen, started = 0, time.monotonic()
    for batch in batches:
        for key, value in training.step(batch).items():
            sums[key] += value * batch.global_size
        seen += batch.global_size
        if batch.last_of_epoch:
            spent = time.monotonic() - started
            metrics = {key: value / seen for key, value in sums.items()}
            metrics |= {"time/seconds": time.monotonic() - began, "time/models_per_second": seen / spent}
            _report(batch.epoch, metrics, training, rank)
            sums.clear()
            seen, started = 0, time.monotonic()
    _score(run, zoos, training, rank, began)


def _prepare(run: AutoencoderRun, zoos: Sequence[Zoo], device: torch.device) -> tuple[Training, int]:
    """The training, continued from Ray Train's last checkpoint where there is one, and its next epoch."""
    from ray import train

    samples = [
        ZooSample(zoo.architecture, zoo.sample(run.model.fisher_models, seed=run.seed), zoo.images()) for zoo in zoos
    ]
    steps = run.optim.epochs * steps_per_epoch(zoos, run.optim.batch_size)
    training = Training(run, samples, steps, device)
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return training, 1
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, map_location=device, weights_only=True)
    training.load_state_dict(state["training"])
    return training, state["epoch"] + 1


def _report(epoch: int, metrics: Mapping[str, float], training: Training, rank: int) -> None:
    """Ends an epoch on every worker: metrics, and from rank 0 a checkpoint."""
    from ray import train

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save({"training": training.state_dict(), "epoch": epoch}, Path(folder) / STATE)
            checkpoint = train.Checkpoint.from_directory(folder)
        train.report({"epoch": epoch, **metrics}, checkpoint=checkpoint)


def _score(run: AutoencoderRun, zoos: Sequence[Zoo], training: Training, rank: int, artifacts: str) -> None:
    """Rank 0 scores the autoencoder on the first zoo's held-out models and stores it with what the figures need."""
    from ray import train

    metrics: dict[str, Any] = {}
    if rank == 0:
        zoo = zoos[0]
        splits = [zoo.models(split) for split in ("train", "val", "test")]
        began = time.monotonic()
        results = run_tasks(training.autoencoder, *splits, zoo.images(), run)
        metrics = {**results.metrics, "time/scoring_seconds": time.monotonic() - began}
        with tempfile.TemporaryDirectory() as folder:
            save_autoencoder(folder, training.autoencoder)
            np.savez_compressed(Path(folder) / "arrays.npz", **results.arrays)
            upload(Path(folder), artifacts)
    train.report({"epoch": run.optim.epochs, **metrics, FINISHED: 1})
