"""What one trial takes of the cluster, as settings."""

from dataclasses import dataclass

from distrecon.errors import UserError


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
