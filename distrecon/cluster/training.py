"""One autoencoder training on Ray Train: Ray Data shard -> steps -> report and checkpoint every epoch.

`train_autoencoder` runs anywhere Ray is connected: from a command, or inside a Tune trial, to which it then reports.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from distrecon import config as configuration
from distrecon.autoencoder import distributed
from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.model import ZooSample
from distrecon.autoencoder.store import save_autoencoder
from distrecon.autoencoder.training import Training
from distrecon.cluster.resources import NO_CUDA, ResourcesConfig, models_memory, threads
from distrecon.config import setting
from distrecon.errors import UserError
from distrecon.record.artifacts import upload
from distrecon.record.usage import cpu_seconds, usage
from distrecon.zoos import Zoo
from distrecon.zoos.models import Batch
from distrecon.zoos.stream import plan, stream

STATE = "training.pt"
RESIZE_SECONDS = 60.0  # how often an elastic training looks for room to grow: a resize goes back to the last checkpoint
SAMPLE = 4096  # training states that statistics and the linear start are computed from


@dataclass(frozen=True)
class AutoencoderRun(AutoencoderConfig):
    """One autoencoder trial: which zoos (shipped names or folders), the autoencoder, what it takes."""

    zoo: tuple[str, ...] = setting(("digits",), "shipped names or folders", filled=True)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        shards, workers = self.data.shards, self.resources.num_workers
        if shards < workers:
            raise UserError(f"data.shards ({shards}) must be at least resources.num_workers ({workers})")

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """What of the run belongs to the autoencoder itself, and is stored with it."""
        return AutoencoderConfig(**{f.name: getattr(self, f.name) for f in fields(AutoencoderConfig)})


def train_autoencoder(run: AutoencoderRun, zoos: Sequence[Zoo], storage: str, name: str, in_trial: bool = False) -> Any:
    """Trains one autoencoder; returns Ray's Result. `in_trial` of Ray Tune its reports are the trial's too.

    Everything lies under `storage`/`name`: each epoch's checkpoint, and at the end the autoencoder among the artifacts.
    A training of the same name continues from its last checkpoint.
    """
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    resources = run.resources
    elastic = (resources.min_workers, resources.num_workers)
    scaling: dict[str, Any] = {  # as Ray Train's second version has it; ray.train's stubs show the first
        "num_workers": elastic if resources.min_workers else resources.num_workers,
        "use_gpu": resources.use_gpu,
        "resources_per_worker": resources.worker,
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
    }
    callbacks: list[Any] = [TuneReportCallback()] if in_trial else []
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "run": configuration.flatten(run),
            "zoos": list(zoos),
            "artifacts": f"{storage}/{name}",
        },
        scaling_config=train.ScalingConfig(**scaling),
        torch_config=TorchConfig(backend="gloo" if resources.device == "cpu" else None),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            callbacks=callbacks,
        ),
    )
    return trainer.fit()


def train_loop(settings: Mapping[str, Any]) -> None:
    """The body of every Ray Train worker: train, report every epoch, and leave the autoencoder at the end."""
    from ray import train

    run: AutoencoderRun = configuration.replace(AutoencoderRun(), settings["run"])
    zoos: list[Zoo] = settings["zoos"]
    rank = train.get_context().get_world_rank()
    torch.set_num_threads(threads(run.resources))
    began, cpu = time.monotonic(), cpu_seconds()
    training, first_epoch = _prepare(run, zoos)
    world_size = train.get_context().get_world_size()
    memory = models_memory(run.resources) if run.data.memory is None else int(run.data.memory * 2**30)
    for epoch, metrics in train_epochs(run, zoos, training, first_epoch, rank, world_size, memory):
        _report(epoch, {**metrics, **usage(began, cpu), "time/seconds": time.monotonic() - began}, training, rank)
    if not run.epochs:
        _report(0, {**usage(began, cpu), "time/seconds": time.monotonic() - began}, training, rank)
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            save_autoencoder(folder, training.autoencoder)
            upload(Path(folder), settings["artifacts"])


def train_epochs(
    run: AutoencoderRun,
    zoos: Sequence[Zoo],
    training: Training,
    first_epoch: int,
    rank: int,
    world_size: int,
    memory: int = 0,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains epoch by epoch, counted from 1; yields each one's mean losses and models a second.

    `memory`: bytes of models that this worker may keep.
    """
    batches = _Timed(
        stream(
            zoos,
            batch_size=run.optim.batch_size,
            first_epoch=first_epoch - 1,
            last_epoch=run.epochs - 1,
            shards=run.data.shards,
            rank=rank,
            world_size=world_size,
            seed=run.seed,
            memory=memory,
        )
    )
    sums: dict[str, float] = defaultdict(float)
    counted: dict[str, int] = defaultdict(int)  # a loss may join in the middle of an epoch
    seen, started = 0, time.monotonic()
    for batch, losses in training.steps(batches):
        for key, value in losses.items():
            sums[key] += value * batch.global_size
            counted[key] += batch.global_size
        seen += batch.global_size
        if batch.last:
            spent = time.monotonic() - started
            means = {key: value / counted[key] for key, value in sums.items()}
            yield (
                batch.epoch + 1,
                {
                    **means,
                    "time/models_per_second": seen / spent,
                    "time/data_wait_share": batches.waited / spent,
                    "data/rows": seen,
                },
            )
            sums.clear()
            counted.clear()
            seen, batches.waited, started = 0, 0.0, time.monotonic()


class _Timed:
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.waited = iter(batches), 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            asked = time.monotonic()
            batch = next(self.batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch


def _prepare(run: AutoencoderRun, zoos: Sequence[Zoo]) -> tuple[Training, int]:
    """The training, continued from Ray Train's last checkpoint where there is one, and its next epoch."""
    from ray import train

    device = _device(run.resources)
    samples = [ZooSample(zoo.architecture, sample_of(zoo, run.seed, device), zoo.images()) for zoo in zoos]
    steps = plan(zoos, batch_size=run.optim.batch_size, shards=run.data.shards, seed=run.seed)
    training = Training(run.autoencoder, samples, sum(steps.steps(epoch) for epoch in range(run.epochs)), device)
    checkpoint = train.get_checkpoint()
    if checkpoint is None:
        return training, 1
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, map_location=device, weights_only=True)
    training.load_state_dict(state["training"])
    return training, state["epoch"] + 1


def _device(resources: ResourcesConfig) -> torch.device:
    """The GPU that Ray gave this worker, or the CPU; UserError where a GPU was reserved and torch cannot use it."""
    from ray.train.torch import get_device

    if not resources.use_gpu or resources.device == "cpu":
        return torch.device("cpu")
    device = get_device()
    if device.type != "cuda":
        raise UserError(NO_CUDA)
    return device


def sample_of(zoo: Zoo, seed: int, device: torch.device) -> torch.Tensor:
    """States [S, P] drawn from all over the zoo, which the first worker reads and sends to the others: they lie in as
    many row groups, gigabytes of a large zoo."""
    count = min(SAMPLE, len(zoo.rows("train")))
    return distributed.from_first(lambda: zoo.sample(count, seed), (count, zoo.architecture.num_parameters), device)


def _report(epoch: int, metrics: Mapping[str, float], training: Training, rank: int) -> None:
    """Ends an epoch on every worker: metrics, and from rank 0 a checkpoint."""
    from ray import train

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save({"training": training.state_dict(), "epoch": epoch}, Path(folder) / STATE)
            checkpoint = train.Checkpoint.from_directory(folder)
        train.report({"epoch": epoch, **metrics}, checkpoint=checkpoint)
