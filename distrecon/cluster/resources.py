"""What one trial takes of the cluster, as settings."""

import math
from dataclasses import dataclass

from distrecon.config import check, setting
from distrecon.errors import UserError

DEVICES = ("auto", "cuda", "cpu")
RESERVE = 0.1  # of a CPU, left to the trial's driver and to Ray Data's reads when workers hold all others
MODELS_SHARE = 1 / 4  # of a node's memory, for the models that its workers keep
NO_CUDA = (
    "a GPU is reserved, but torch finds none on this node: install its CUDA build and a driver that fits, "
    "or rehearse with resources.device=cpu"
)


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
    device: str = setting(
        "auto", "auto: the worker's GPU with use_gpu; cpu reserves GPUs and computes without", choices=DEVICES
    )
    cpus_per_worker: float = setting(1.0, above=0)
    gpus_per_worker: float = setting(
        1.0, "with use_gpu; a share packs several small trials of one worker on a GPU", above=0, most=1
    )
    max_failures: int = setting(2, "restarts from the last checkpoint after a lost worker, driver or node", least=0)

    def __post_init__(self) -> None:
        check(self, "resources")
        if self.min_workers > self.num_workers:
            raise UserError(
                f"resources.min_workers must be from 0 to resources.num_workers ({self.num_workers}), "
                f"not {self.min_workers}"
            )
        if self.use_gpu and self.num_workers > 1 and self.gpus_per_worker < 1:
            raise UserError(
                f"resources.gpus_per_worker must be 1 with {self.num_workers} workers, not {self.gpus_per_worker:g}: "
                "NCCL refuses two processes on one GPU; shares are for trials of one worker"
            )
        if self.device == "cuda" and not self.use_gpu:
            raise UserError("resources.device is cuda, but no GPU is asked for: add --use-gpu, or leave it auto")

    @property
    def worker(self) -> dict[str, float]:
        """What Ray reserves for one worker of a training, and for scoring after it."""
        gpus = {"GPU": self.gpus_per_worker} if self.use_gpu else {}
        return {"CPU": max(0.1, self.cpus_per_worker - RESERVE), **gpus}


def threads(resources: ResourcesConfig) -> int:
    """Of torch, in a worker."""
    return max(1, math.floor(resources.cpus_per_worker))


def models_memory(resources: ResourcesConfig) -> int:
    """Bytes for the models that a worker keeps on this node: all that fit on it share `MODELS_SHARE` of its memory."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    has: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})
    fit = [has.get(kind, 0.0) / count for kind, count in resources.worker.items() if count]
    return int(has.get("memory", 0.0) * MODELS_SHARE / max(1.0, math.floor(min(fit))))
