"""Flow matching on latents: a velocity field, conditioned on accuracy, that carries normal noise to latents of models.

Conditional flow matching (Lipman et al., ICLR 2023, arXiv 2210.02747) on straight paths: with x_0 normal and x_1 a
latent, x_t = (1 - t) x_0 + t x_1, and v(x_t, t, c) is fitted to x_1 - x_0 by least squares, c the model's accuracy. A
sample is the end at t = 1 of dx/dt = v(x, t, c), by Heun's method.

Latents have more numbers than there are models. The flow lives in the span of the models' latents: their coordinates in
its principal directions, divided by the root of their mean variance, so that neither the span nor the ratios of the
variances change.

Legend: N models, M samples, F latent numbers, K directions of the span, B rows of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

Field = Callable[[Tensor, Tensor, Tensor], Tensor]  # velocity [B, K] at x[B, K], times [B], conditions [B]

WIDTH, STEPS, BATCH, LR = 256, 1000, 256, 1e-3
FREQUENCIES = 4  # of the sines and cosines by which the field knows the time
INTEGRATION_STEPS = 30
SMALLEST_VARIANCE = 1e-6  # of a direction, relative to the largest


@dataclass(frozen=True)
class Span:
    """Coordinates in the span of some latents."""

    mean_F: Tensor
    basis_KF: Tensor  # orthonormal
    scale: Tensor  # root mean variance of the coordinates

    @staticmethod
    def of(z_NF: Tensor) -> "Span":
        mean_F = z_NF.mean(0)
        _, singular_K, basis_KF = torch.linalg.svd(z_NF - mean_F, full_matrices=False)
        kept_K = singular_K.square() > SMALLEST_VARIANCE * singular_K[0].square()
        rms = (singular_K[kept_K].square().mean() / len(z_NF)).sqrt() if kept_K.any() else singular_K.new_ones(())
        return Span(mean_F, basis_KF[kept_K], rms)

    def coordinates(self, z_NF: Tensor) -> Tensor:
        return (z_NF - self.mean_F) @ self.basis_KF.T / self.scale

    def latents(self, x_NK: Tensor) -> Tensor:
        return x_NK * self.scale @ self.basis_KF + self.mean_F


class Velocity(nn.Module):
    """A small MLP that reads the place, the time and the condition."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 2 * FREQUENCIES + 1, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, size),
        )  # fmt: skip

    def forward(self, x_BK: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        angle_BW = t_B[:, None] * torch.pi * torch.arange(1, FREQUENCIES + 1).to(t_B)
        return self.layers(torch.cat([x_BK, angle_BW.sin(), angle_BW.cos(), condition_B[:, None]], dim=1))


def path(start_BK: Tensor, end_BK: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """The places at times t of straight paths, and their velocities."""
    return torch.lerp(start_BK, end_BK, t_B[:, None]), end_BK - start_BK


def fitted(x_NK: Tensor, condition_N: Tensor, steps: int, generator: torch.Generator) -> Field:
    """The velocity field of models' coordinates and conditions, after `steps` steps of Adam, cosine to zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        field = Velocity(x_NK.shape[1]).to(x_NK)
    optimizer = torch.optim.Adam(field.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            row_B = torch.randint(len(x_NK), (BATCH,), generator=generator)
            start_BK = torch.randn(BATCH, x_NK.shape[1], generator=generator).to(x_NK)
            t_B = torch.rand(BATCH, generator=generator).to(x_NK)
            place_BK, velocity_BK = path(start_BK, x_NK[row_B], t_B)
            optimizer.zero_grad(set_to_none=True)
            (field(place_BK, t_B, condition_N[row_B]) - velocity_BK).square().mean().backward()
            optimizer.step()
            schedule.step()
    return cast(Field, field)


@torch.no_grad()
def carried(field: Field, x_BK: Tensor, condition_B: Tensor, steps: int = INTEGRATION_STEPS) -> Tensor:
    """Where the field carries places from t = 0 to 1."""
    for i in range(steps):
        now_B, then_B = (torch.full_like(condition_B, (i + k) / steps) for k in (0, 1))
        first_BK = field(x_BK, now_B, condition_B)
        second_BK = field(x_BK + first_BK / steps, then_B, condition_B)
        x_BK = x_BK + (first_BK + second_BK) / (2 * steps)
    return x_BK


def flow_matching(
    z_NF: Tensor, accuracy_N: Tensor, wanted_M: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """Latents [M, F] of models of the wanted accuracies, from all known models' latents and accuracies.

    `temperature` multiplies the deviation of the noise that is carried: at 1 samples are distributed as the models.
    """
    span, deviation = Span.of(z_NF), accuracy_N.std().clamp_min(1e-6)
    known_N, condition_M = ((a - accuracy_N.mean()) / deviation for a in (accuracy_N, wanted_M))
    field = fitted(span.coordinates(z_NF), known_N.to(z_NF), STEPS, generator)
    start_MK = temperature * torch.randn(len(wanted_M), len(span.basis_KF), generator=generator).to(z_NF)
    return span.latents(carried(field, start_MK, condition_M.to(z_NF)))
