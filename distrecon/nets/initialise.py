"""Random weights for B models, each from its own seed, so that grouping never changes a model."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from distrecon.errors import UserError, nearest
from distrecon.nets.architectures import Architecture, ModuleArchitecture

BIAS = 0.01  # as in the published zoos


def _weight(kind: str, shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    if kind.endswith("uniform"):
        bound = (6 / fan_in) ** 0.5 if kind.startswith("kaiming") else fan_in**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = (2 / fan_in) ** 0.5 if kind.startswith("kaiming") else fan_in**-0.5
    return torch.empty(shape).normal_(0, std, generator=generator)


OWN = "module"  # as the module makes its weights itself
INITIALISATIONS = ("uniform", "normal", "kaiming_uniform", "kaiming_normal")


def initialise(
    arch: Architecture, kinds: Sequence[str], seeds: Sequence[int], scales: Sequence[float] | None = None
) -> Tensor:
    """theta[B, P]: `uniform` in +-1/sqrt(fan_in), `normal` with that deviation, Kaiming with ReLU's gain; biases .01.

    `scales` multiplies the weights of each model. Of a module the weights and biases of convolutions and linear layers
    are drawn so, the rest is as the module makes it; `module` leaves those as the module makes them, too.
    """
    models = []
    for i, (kind, seed) in enumerate(zip(kinds, seeds, strict=True)):
        if kind not in INITIALISATIONS and not (kind == OWN and isinstance(arch, ModuleArchitecture)):
            raise UserError(f"unknown initialisation {kind!r}{nearest(kind, INITIALISATIONS)}")
        scale = scales[i] if scales is not None else 1.0
        models.append(_model(arch, kind, seed, scale))
    return torch.stack(models)


def _model(arch: Architecture, kind: str, seed: int, scale: float) -> Tensor:
    """theta[P] of one model."""
    generator = torch.Generator().manual_seed(seed)
    made = _fresh(arch, seed) if isinstance(arch, ModuleArchitecture) else {}
    parts = []
    for entry in arch.table.entries:
        if entry.role == "weight":
            drawn = made[entry.name] if kind == OWN else _weight(kind, entry.shape, prod(entry.shape[1:]), generator)
            parts.append(scale * drawn.flatten())
        elif entry.role == "bias" and kind != OWN:
            parts.append(torch.full((entry.size,), BIAS))
        else:
            parts.append(made[entry.name].flatten())
    return torch.cat(parts)


def _fresh(arch: ModuleArchitecture, seed: int) -> dict[str, Tensor]:
    """The state dict of a new module."""
    if arch.make is None:
        raise UserError(f"{arch.name}: new models need its module's factory")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: tensor.detach().float() for name, tensor in arch.make().state_dict().items()}
