"""Small zoos without training: random networks suffice for the mathematics."""

import torch

from distrecon.autoencoder import AutoencoderConfig
from distrecon.config import replace
from distrecon.images import ImageSet
from distrecon.nets import INITIALISATIONS, Architecture, evaluate, initialise
from distrecon.zoos.models import Models

TINY = {
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.latent": 4,
    "model.projection": 6,
    "optim.batch_size": 6,
    "optim.epochs": 1,
    "data.query_pool": 40,
    "data.queries": 16,
    "data.target_precision": "float32",
    "tasks.samples": 6,
    "tasks.pairs": 3,
    "tasks.candidates": 2,
}


def tiny(**values) -> AutoencoderConfig:
    """A configuration small enough for tests; keyword `loss__beta` sets `loss.beta`."""
    return replace(AutoencoderConfig(), TINY | {key.replace("__", "."): v for key, v in values.items()})


def random_models(arch: Architecture, count: int, first_seed: int = 0) -> torch.Tensor:
    kinds = [INITIALISATIONS[i % 4] for i in range(count)]
    return initialise(arch, kinds, range(first_seed, first_seed + count))


def related_models(arch: Architecture, count: int) -> torch.Tensor:
    """Models that differ in three directions only, so that an autoencoder can learn them in a few steps."""
    ends_4P = 2 * random_models(arch, 4, first_seed=90)
    mix_B3 = torch.rand(count, 3, generator=torch.Generator().manual_seed(5)) - 0.5
    return ends_4P[0] + mix_B3 @ ends_4P[1:]


def as_models(arch: Architecture, theta_BP: torch.Tensor, images: ImageSet, first_row: int = 0) -> Models:
    train = evaluate(arch, theta_BP, images.train.images, images.train.labels_Q)
    test = evaluate(arch, theta_BP, images.test.images, images.test.labels_Q)
    count = len(theta_BP)
    return Models(
        theta_BP,
        [f"model{first_row + i}" for i in range(count)],
        torch.arange(first_row, first_row + count),
        torch.arange(count) % 3,
        train.accuracy_B,
        test.accuracy_B,
        train.accuracy_B - test.accuracy_B,
        train.loss_B,
    )
