"""Models and zoos made for measuring: untrained ones, random numbers, a small trained zoo. Without Ray."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrecon.images import load
from distrecon.nets import Architecture, architecture, evaluate, fit, initialise
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.storage import store

ARCH = architecture("cnn_small")
PART = 12_500  # states in a file: 57 MiB
SIDE = 448  # the first two weights of random state i are i // SIDE and i % SIDE


def random_models(arch: Architecture, count: int) -> torch.Tensor:
    """Untrained models [count, P]."""
    return initialise(arch, ["kaiming_normal"] * count, range(count))


def _write(folder: Path, parts: Iterable[dict[str, Any]], arch: Architecture = ARCH) -> Zoo:
    """A zoo of the columns of these parts, one file each."""
    where = store(folder)
    written = [
        zoo_format.write_part(where, zoo_format.part_name(i), zoo_format.states_table(arch, **columns))
        for i, columns in enumerate(parts)
    ]
    images = {"name": "digits", "directory": None, "preprocessing": "", "classes": [str(digit) for digit in range(10)]}
    origin = {"kind": "benchmark"}
    zoo_format.commit(where, name="made", arch=arch, image_set=images, parts=written, origin=origin)
    return open_zoo(folder)


def random_zoo(folder: Path, states: int, arch: Architecture = ARCH, size: int = PART) -> Zoo:
    """Random numbers whose first two weights tell the row; reading it costs what reading any zoo costs.

    `size`: states in a file.
    """
    starts = range(0, states, size)
    return _write(folder, (_random(i, np.arange(a, min(a + size, states)), arch) for i, a in enumerate(starts)), arch)


def _random(number: int, rows: np.ndarray, arch: Architecture) -> dict[str, Any]:
    draw = np.random.default_rng(number)
    theta_SP = torch.from_numpy(draw.standard_normal((len(rows), arch.num_parameters), np.float32))
    theta_SP[:, 0], theta_SP[:, 1] = torch.from_numpy(rows // SIDE), torch.from_numpy(rows % SIDE)
    return {
        "model_id": [f"m{row // 4}" for row in rows],
        "epoch": [int(row % 4) for row in rows],
        "split": ["train"] * len(rows),
        "theta_SP": theta_SP,
        "metrics": {metric: [0.5] * len(rows) for metric in zoo_format.METRICS},
        "config": ["{}"] * len(rows),
    }


def rows_of(theta_BP: torch.Tensor) -> torch.Tensor:
    """Which rows of a random zoo these are."""
    return (theta_BP[:, 0] * SIDE + theta_BP[:, 1]).long()


def small_zoo(folder: Path, models: int = 60, epochs: int = 3) -> Zoo:
    """Digits networks after each of a few epochs of training; of ten models one validates and two test."""
    images = load("digits")
    theta_BP = initialise(ARCH, ["kaiming_uniform"] * models, range(models))
    training = fit(
        ARCH, theta_BP, images.train.images, images.train.labels_Q, epochs=epochs, lr_B=torch.full((models,), 3e-3)
    )
    return _write(folder, (_trained(images, epoch, state.theta_BP) for epoch, state in enumerate(training, 1)))


def _trained(images: Any, epoch: int, theta_BP: torch.Tensor) -> dict[str, Any]:
    train = evaluate(ARCH, theta_BP, images.train.images, images.train.labels_Q)
    test = evaluate(ARCH, theta_BP, images.test.images, images.test.labels_Q)
    metrics = {
        "train_accuracy": train.accuracy_B,
        "test_accuracy": test.accuracy_B,
        "generalization_gap": train.accuracy_B - test.accuracy_B,
        "train_loss": train.loss_B,
    }
    models = range(len(theta_BP))
    return {
        "model_id": [f"m{i}" for i in models],
        "epoch": [epoch] * len(theta_BP),
        "split": [{7: "val", 8: "test", 9: "test"}.get(i % 10, "train") for i in models],
        "theta_SP": theta_BP,
        "metrics": {name: metrics[name].tolist() for name in zoo_format.METRICS},
        "config": ["{}"] * len(theta_BP),
    }
