"""Random weights for B models, each from its own seed, so that grouping never changes a model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distrecon.errors import UserError, nearest
from distrecon.nets.architectures import Architecture

BIAS = 0.01  # as in the published zoos


def _weight(kind: str, shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    if kind.endswith("uniform"):
        bound = (6 / fan_in) ** 0.5 if kind.startswith("kaiming") else fan_in**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = (2 / fan_in) ** 0.5 if kind.startswith("kaiming") else fan_in**-0.5
    return torch.empty(shape).normal_(0, std, generator=generator)


INITIALISATIONS = ("uniform", "normal", "kaiming_uniform", "kaiming_normal")


def initialise(
    arch: Architecture, kinds: Sequence[str], seeds: Sequence[int], scales: Sequence[float] | None = None
) -> Tensor:
    """theta[B, P]: `uniform` in +-1/sqrt(fan_in), `normal` with that deviation, Kaiming with ReLU's gain; biases .01.

    `scales` multiplies the weights of each model.
    """
    models = []
    for i, (kind, seed) in enumerate(zip(kinds, seeds, strict=True)):
        if kind not in INITIALISATIONS:
            raise UserError(f"unknown initialisation {kind!r}{nearest(kind, INITIALISATIONS)}")
        generator = torch.Generator().manual_seed(seed)
        scale = scales[i] if scales is not None else 1.0
        parts = []
        for layer in arch.layers:
            parts.append(scale * _weight(kind, layer.weight_shape, layer.fan_in, generator).flatten())
            parts.append(torch.full((layer.out_features,), BIAS))
        models.append(torch.cat(parts))
    return torch.stack(models)
