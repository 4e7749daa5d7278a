"""Scores an autoencoder on a zoo and stores it with the tasks' arrays and the generated models."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.model import Autoencoder
from distrecon.autoencoder.precision import products
from distrecon.autoencoder.probes import save_probes
from distrecon.autoencoder.store import save_autoencoder
from distrecon.autoencoder.tasks import Show, run_tasks
from distrecon.errors import UserError
from distrecon.nets import ModuleArchitecture
from distrecon.zoos import Zoo


def zoo_index(autoencoder: Autoencoder, zoo: Zoo) -> int:
    """Which of the autoencoder's zoos has this one's architecture, whose module it then runs; or UserError."""
    for index, arch in enumerate(autoencoder.architectures):
        if arch.same_networks(zoo.architecture):
            if isinstance(arch, ModuleArchitecture):
                autoencoder.adopt(index, zoo.architecture)
            return index
    known = ", ".join(f"{a.name} ({a.num_parameters} parameters, {a.kind})" for a in autoencoder.architectures)
    arch = zoo.architecture
    raise UserError(
        f"{zoo.store}: its models are {arch.name} ({arch.num_parameters} parameters, {arch.kind}); "
        f"the autoencoder was trained on {known}: name a zoo of those, or train one on this zoo"
    )


COPIES = 3  # of a zoo's weights, in memory at once to score: as read, in canonical order, aligned for novelty


def check_memory(zoo: Zoo, has: float) -> None:
    """UserError when scoring on this zoo could not fit into `has` bytes."""
    states, gib = zoo.num_states, 2.0**30
    needs = COPIES * 4 * states * zoo.architecture.num_parameters
    if needs > has:
        raise UserError(
            f"{zoo.store}: scoring holds its {states} states {COPIES} times, {needs / gib:.1f} GiB, and a machine has "
            f"{has / gib:.1f} GiB: import fewer states (distrecon.zoo import --epochs), or take one with more memory"
        )


def score(
    autoencoder: Autoencoder,
    zoo: Zoo,
    config: AutoencoderConfig,
    folder: Path,
    show: Show = lambda *stage: None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The three tasks on the zoo's held-out models, computed on `device`; files go to `folder`. Returns the metrics."""
    index = zoo_index(autoencoder, zoo)
    began = time.monotonic()
    train, validation, test = (zoo.models(split) for split in ("train", "val", "test"))
    images = zoo.images().on(device)
    with products(torch.device(device), "float32"):
        results = run_tasks(autoencoder.to(device), train, validation, test, images, config, index, show)
    save_autoencoder(folder, autoencoder)
    save_probes(folder, results.probes)
    save_file({"theta": results.generated_theta_BP.contiguous()}, folder / "generated.safetensors")
    layers = np.array(zoo.architecture.layer_names)
    np.savez_compressed(folder / "arrays.npz", allow_pickle=False, layers=layers, **results.arrays)  # type: ignore[arg-type]
    return {**results.metrics, "time/scoring_seconds": time.monotonic() - began}
