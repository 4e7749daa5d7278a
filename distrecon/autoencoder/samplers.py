"""Samplers of latents: each draws new latents from those of good models.

- joint_kde: a good model's latent plus noise from one kernel over the whole latent, whose covariance is that of the
  good latents; at bandwidth 1 the noise is as long as the median distance from a good latent to its nearest neighbour.
- isotropic_kde: the same with noise of equal size in all directions; for the Fisher coders, whose latents are measured
  in the behavioural metric here, it moves weights most where the outputs change least.
- flat_kde (ours): the same with noise shaped by the coder, in directions that move the weights much and the outputs
  little; where the coder knows of none (the transformer) it is isotropic.
- dimension_kde: every dimension from its own kernel density, independently (Schürholt et al., NeurIPS 2022); it breaks
  the dependence between dimensions, and most of its samples are useless.
- gaussian: the good latents' mean and covariance, of a rank below their number; `bandwidth` multiplies the deviation.
- interpolation: between two good latents, the share of the second uniform up to bandwidth / 2.
- flow_matching: the ends of a flow that all training models' latents and accuracies teach, at the accuracies of good
  models (`flow.py`); `bandwidth` multiplies the deviation of the noise that it carries.

Legend: N good models, A all models, M samples, F latent numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distrecon.autoencoder import flow
from distrecon.errors import UserError, nearest

Sampler = Callable[[Tensor, int, float, torch.Generator], Tensor]
Shape = Callable[[Tensor], Tensor]  # of white noise [M, F]


def _covariance_noise(good_NF: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[M, F] with the covariance of the good latents."""
    mix_MN = torch.randn(count, len(good_NF), generator=generator).to(good_NF)
    return mix_MN @ (good_NF - good_NF.mean(0)) / (len(good_NF) - 1) ** 0.5


def _picked(good_NF: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(good_NF), (count,), generator=generator).to(good_NF.device)


def nearest_distance(good_NF: Tensor) -> Tensor:
    """Median over the good latents of the distance to the nearest other."""
    distance_NN = torch.cdist(good_NF, good_NF)
    distance_NN.fill_diagonal_(float("inf"))
    return distance_NN.amin(1).median()


def _joint_kde(good_NF: Tensor, count: int, bandwidth: float, generator: torch.Generator) -> Tensor:
    noise_MF = _covariance_noise(good_NF, count, generator)
    length = noise_MF.norm(dim=1).mean().clamp_min(1e-12)
    centres_MF = good_NF[_picked(good_NF, count, generator)]
    return centres_MF + noise_MF * (bandwidth * nearest_distance(good_NF) / length)


def _isotropic_kde(
    good_NF: Tensor, count: int, bandwidth: float, generator: torch.Generator, shape: Shape = lambda noise: noise
) -> Tensor:
    noise_MF = shape(torch.randn(count, good_NF.shape[1], generator=generator).to(good_NF))
    centres_MF = good_NF[_picked(good_NF, count, generator)]
    return centres_MF + noise_MF * (bandwidth * nearest_distance(good_NF) / noise_MF.norm(dim=1).mean())


def _dimension_kde(good_NF: Tensor, count: int, bandwidth: float, generator: torch.Generator) -> Tensor:
    pick_MF = torch.randint(len(good_NF), (count, good_NF.shape[1]), generator=generator).to(good_NF.device)
    width_F = bandwidth * good_NF.std(0) * len(good_NF) ** -0.2  # Scott's rule in one dimension
    return good_NF.gather(0, pick_MF) + width_F * torch.randn(count, good_NF.shape[1], generator=generator).to(good_NF)


def _gaussian(good_NF: Tensor, count: int, bandwidth: float, generator: torch.Generator) -> Tensor:
    return good_NF.mean(0) + bandwidth * _covariance_noise(good_NF, count, generator)


def _interpolation(good_NF: Tensor, count: int, bandwidth: float, generator: torch.Generator) -> Tensor:
    first_M = _picked(good_NF, count, generator)
    step_M = torch.randint(1, len(good_NF), (count,), generator=generator).to(good_NF.device)
    share_M1 = 0.5 * bandwidth * torch.rand(count, 1, generator=generator).to(good_NF)
    return torch.lerp(good_NF[first_M], good_NF[(first_M + step_M) % len(good_NF)], share_M1)


@dataclass(frozen=True)
class Known:
    """What there is to learn from beside the good models: all training models' latents [A, ...] and accuracies."""

    z: Tensor
    accuracy_A: Tensor
    good_N: Tensor  # which of them are the good ones


def _flow_matching(
    good_NF: Tensor, count: int, bandwidth: float, generator: torch.Generator, known: Known | None = None
) -> Tensor:
    if known is None:  # good models of nobody knows what accuracy
        known = Known(good_NF, good_NF.new_zeros(len(good_NF)), torch.arange(len(good_NF)))
    wanted_M = known.accuracy_A[known.good_N][_picked(good_NF, count, generator).cpu()]
    return flow.flow_matching(known.z.flatten(1), known.accuracy_A, wanted_M, bandwidth, generator)


SAMPLERS: dict[str, Sampler] = {
    "joint_kde": _joint_kde,
    "isotropic_kde": _isotropic_kde,
    "flat_kde": _isotropic_kde,
    "dimension_kde": _dimension_kde,
    "gaussian": _gaussian,
    "interpolation": _interpolation,
    "flow_matching": _flow_matching,
}


def sample(
    name: str,
    good: Tensor,
    count: int,
    bandwidth: float = 1.0,
    seed: int = 0,
    shape: Shape | None = None,
    known: Known | None = None,
) -> Tensor:
    """`count` latents of the shape of `good` [N, ...].

    `shape` is what flat_kde does to white noise [M, F], `known` what flow_matching learns from.

    Raises UserError for an unknown sampler or fewer than 3 good models.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}{nearest(name, SAMPLERS)}")
    if len(good) < 3:
        raise UserError(
            f"a sampler needs at least 3 good models, not {len(good)}: raise tasks.good or take a larger zoo"
        )
    draw = SAMPLERS[name]
    if name == "flat_kde" and shape is not None:
        draw = partial(_isotropic_kde, shape=shape)
    if name == "flow_matching":
        draw = partial(_flow_matching, known=known)
    drawn_MF = draw(good.flatten(1), count, bandwidth, torch.Generator().manual_seed(seed))
    return drawn_MF.view(count, *good.shape[1:])
