"""What one trial takes of the cluster, as settings."""

from dataclasses import dataclass

from distrecon.config import check, setting
from distrecon.errors import UserError


@dataclass(frozen=True)
class ResourcesConfig:
    """What one trial takes of the cluster. An autoencoder trial is `num_workers` data-parallel workers.

    0 workers train in the trial's own process: a quick start for debugging, without checkpoints to resume from.
    """

    num_workers: int = setting(1, "data-parallel workers of an autoencoder trial", least=0)
    min_workers: int = setting(
        0, "elastic: after a loss go on with as few as these, and grow again (0: wait for num_workers)", least=0
    )
    use_gpu: bool = setting(False, "a GPU, or a share of one, for each worker")
    cpus_per_worker: float = setting(1.0, above=0)
    gpus_per_worker: float = setting(1.0, "with use_gpu; a share packs several small trials on one GPU", above=0)
    max_failures: int = setting(2, "restarts from the last checkpoint after a lost worker or node", least=0)

    def __post_init__(self) -> None:
        check(self, "resources")
        if self.min_workers > self.num_workers:
            raise UserError(
                f"resources.min_workers must be from 0 to resources.num_workers ({self.num_workers}), "
                f"not {self.min_workers}"
            )
