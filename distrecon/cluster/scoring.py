"""Scoring of a trained autoencoder as a Ray task of its own, for which the training's workers have made room.

The task asks for what one worker of the training had. It reads the autoencoder from the trial's artifacts, so that it
may run on any node, and runs again on another when its node is lost.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distrecon import config as configuration
from distrecon.autoencoder.scoring import score
from distrecon.autoencoder.store import load_autoencoder
from distrecon.cluster.resources import NO_CUDA, ResourcesConfig, threads
from distrecon.cluster.training import AutoencoderRun
from distrecon.errors import UserError
from distrecon.record.artifacts import fetch, upload
from distrecon.zoos import Zoo, tasks


def score_autoencoder(run: AutoencoderRun, zoo: Zoo, trial: str) -> dict[str, Any]:
    """The metrics of the autoencoder that a training left at this address, where what belongs to them is put too.

    Waits for a place. Errors of the task are raised as themselves.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    nowhere: Any = None  # as Ray's documentation has it; its types say otherwise
    resources = {
        "num_cpus": run.resources.worker["CPU"],
        "num_gpus": run.resources.worker.get("GPU", 0.0),
        # a task of a Tune trial would have to fit into what the trial's own small process reserved
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=nowhere),
    }
    ((_, metrics),) = tasks.run(_score, [trial], configuration.flatten(run), zoo, resources=resources)
    return metrics


def _score(trial: str, values: Mapping[str, Any], zoo: Zoo) -> dict[str, Any]:
    run: AutoencoderRun = configuration.replace(AutoencoderRun(), values)
    torch.set_num_threads(threads(run.resources))
    with tempfile.TemporaryDirectory() as folder:
        trained, scored = Path(folder, "trained"), Path(folder, "scored")
        fetch(trial, trained)
        autoencoder = load_autoencoder(trained)
        scored.mkdir()
        metrics = score(autoencoder, zoo, run.autoencoder, scored, device=_device(run.resources))
        upload(scored, trial)
    return metrics


def _device(resources: ResourcesConfig) -> str:
    """The GPU that Ray gave this task, or the CPU; UserError where one was reserved and torch cannot use it."""
    if not resources.use_gpu or resources.device == "cpu":
        return "cpu"
    if tasks.assigned_device() != "cuda":
        raise UserError(NO_CUDA)
    return "cuda"
