"""What a sweep can run: kinds of trials as data. A kind is a configuration, its objectives, its smallest instance."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.errors import UserError
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.nets import activation

SYNTHETIC = "synthetic"  # in the place of an image set's name


@dataclass(frozen=True)
class ResourcesConfig:
    """What one trial takes of the cluster. An autoencoder trial is `num_workers` data-parallel workers.

    0 workers train in the trial's own process: a quick start for debugging, without checkpoints to resume from.
    """

    num_workers: int = 1
    min_workers: int = 0  # elastic: after a loss go on with as few as these, and grow again (0: wait for num_workers)
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 1.0  # with use_gpu; a share packs several small trials on one GPU
    max_failures: int = 2  # restarts from the last checkpoint after a lost worker or node

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise UserError(f"resources.num_workers must be at least 0, not {self.num_workers}")
        if not 0 <= self.min_workers <= self.num_workers:
            raise UserError(
                f"resources.min_workers must be from 0 to resources.num_workers ({self.num_workers}), "
                f"not {self.min_workers}"
            )
        if self.cpus_per_worker <= 0 or self.gpus_per_worker <= 0:
            raise UserError("resources.cpus_per_worker and resources.gpus_per_worker must be positive")
        if self.max_failures < 0:
            raise UserError(f"resources.max_failures must be at least 0, not {self.max_failures}")


@dataclass(frozen=True)
class AutoencoderRun(AutoencoderConfig):
    """One autoencoder trial: which zoos (shipped names or folders), the autoencoder, what it takes."""

    zoo: tuple[str, ...] = ("digits",)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.zoo:
            raise UserError("zoo must name at least one zoo")
        shards, workers = self.data.shards, self.resources.num_workers
        if shards < workers:
            raise UserError(f"data.shards ({shards}) must be at least resources.num_workers ({workers})")

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """What of the run belongs to the autoencoder itself, and is stored with it."""
        return AutoencoderConfig(**{f.name: getattr(self, f.name) for f in fields(AutoencoderConfig)})


@dataclass(frozen=True)
class TeacherConfig:
    """The black box of a recovery trial, known to scores only: a classifier of an image set, trained on the spot.

    Or, with images "synthetic", one of Expand-and-Cluster's random problems of `inputs` inputs and one hidden layer.
    """

    images: str = "digits"
    hidden: tuple[int, ...] = (20,)
    activation: str = "tanh"
    seed: int = 0
    inputs: int = 8  # of a synthetic teacher

    def __post_init__(self) -> None:
        activation(self.activation)
        if not self.hidden or min(self.hidden) < 1:
            raise UserError(f"teacher.hidden must list positive sizes, not {list(self.hidden)}")
        if self.images == SYNTHETIC and len(self.hidden) != 1:
            raise UserError(f"teacher.hidden of a synthetic teacher is one layer, not {list(self.hidden)}")
        if self.inputs < 1:
            raise UserError(f"teacher.inputs must be at least 1, not {self.inputs}")


@dataclass(frozen=True)
class RecoveryRun(RecoveryConfig):
    """One Expand-and-Cluster trial: its teacher, the recovery, what it takes."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)


@dataclass(frozen=True)
class Kind:
    """A kind of sweep. `metrics` are the possible objectives, the first the default; `varied` heads its table."""

    config_type: type
    metrics: tuple[str, ...]
    mode: str
    smoke: Mapping[str, Any]


KINDS: dict[str, Kind] = {
    "autoencoder": Kind(
        config_type=AutoencoderRun,
        metrics=(
            "reconstruct/agreement_on_errors",
            "reconstruct/agreement",
            "reconstruct/own_nearest",
            "reconstruct/accuracy_mean",
            "reconstruct/accuracy_max",
            "reconstruct/output_mse",
            "reconstruct/weight_l2",
            "generate/accuracy_mean",
            "generate/accuracy_max",
            "predict/test_accuracy_r2",
            "predict/generalization_gap_r2",
            "loss/total",
        ),
        mode="max",
        smoke={
            "zoo": ["smoke"],
            "model.width": 16,
            "model.layers": 1,
            "model.heads": 2,
            "model.latent": 4,
            "model.fisher_models": 8,
            "optim.epochs": 2,
            "data.query_pool": 64,
            "data.queries": 32,
            "tasks.samples": 4,
        },
    ),
    "expand_cluster": Kind(
        config_type=RecoveryRun,
        metrics=(
            "recover/size_overhead",
            "recover/max_cosine_distance",
            "recover/mean_cosine_distance",
            "recover/output_rmse",
            "recover/agreement",
            "recover/queries",
            "time/seconds",
        ),
        mode="min",
        smoke={"teacher.hidden": [3], "budget.attempts": 1, "warm_start.steps": 100},
    ),
}
