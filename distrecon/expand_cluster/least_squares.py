"""Batched Levenberg-Marquardt: many independent nonlinear least-squares problems of one shape, solved side by side.

Notable choices:
- the problem gives its normal equations, so that structure (shared inputs, row chunks) stays its own business;
- every problem has its own damping, a multiple of the identity (Levenberg) with Nielsen's smooth update: scaling by
  the diagonal of J^T J (Marquardt) lets parameters of little influence run away, and redundant networks have many;
- a rejected step tries again with the same J^T J: only the loss is evaluated anew;
- problems that have converged, stalled or turned non-finite leave the batch, so that the rest runs faster.

Legend: N problems, A those still active, P parameters, M residuals.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TRIALS = 8  # damping values tried on one set of normal equations
DAMPING_LIMIT = 1e12
GIVE_UP_AFTER = 12  # iterations of less than `stall` relative decrease


class LeastSquares(Protocol):
    """N problems of P parameters; `loss` is the mean of the squared residuals of each."""

    def loss(self, theta_NP: Tensor) -> Tensor:
        """Loss[N]."""

    def normal_equations(self, theta_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss[N], J^T r / M [N, P] and J^T J / M [N, P, P]."""


@dataclass(frozen=True)
class Solution:
    """theta[N, P], loss[N] and, for each problem, "converged", "stalled", "iterations", "time" or "non-finite"."""

    theta_NP: Tensor
    loss_N: Tensor
    status: list[str]
    iterations: int


def levenberg_marquardt(
    problem: LeastSquares,
    theta_NP: Tensor,
    max_iterations: int = 200,
    tolerance: float = 1e-28,
    damping: float = 1e-3,
    stall: float = 1e-2,
    deadline: float | None = None,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Solution:
    """Minimise the mean squared residual of every problem, starting at theta[N, P] (not changed).

    A problem ends when its loss is at or below `tolerance`, when its damping exceeds 1e12, when its loss fell by less
    than `stall` (relative) over 12 iterations, or after `max_iterations`; `deadline` is a `time.monotonic` value.
    `progress(iteration, loss_N)` sees every iteration. Source: Levenberg 1944; damping update of Nielsen 1999.
    """
    theta, status = theta_NP.clone(), ["iterations"] * theta_NP.shape[0]
    loss = problem.loss(theta)
    damp, growth = torch.full_like(loss, damping), torch.full_like(loss, 2.0)
    reference, age = loss.clone(), torch.zeros_like(loss)
    active, iteration = torch.arange(theta.shape[0]), 0
    for iteration in range(1, max_iterations + 1):
        finite_A, converged_A = torch.isfinite(loss[active]), loss[active] <= tolerance
        stalled_A = (damp[active] > DAMPING_LIMIT) | (age[active] >= GIVE_UP_AFTER)
        ended_A = ~finite_A | converged_A | stalled_A
        if ended_A.any():
            for word, which_A in (("non-finite", ~finite_A), ("converged", converged_A), ("stalled", stalled_A)):
                for i in active[which_A].tolist():
                    status[i] = word
            active = active[~ended_A]
        if not len(active):
            break
        if deadline is not None and time.monotonic() > deadline:
            status = ["time" if i in set(active.tolist()) else s for i, s in enumerate(status)]
            break
        _, gradient, gram = problem.normal_equations(theta[active])
        theta[active], loss[active], damp[active], growth[active] = _step(
            problem, theta[active], loss[active], gradient, gram, damp[active], growth[active]
        )
        improved = loss < (1 - stall) * reference
        reference = torch.where(improved, loss, reference)
        age = torch.where(improved, torch.zeros_like(age), age + 1)
        if progress is not None:
            progress(iteration, loss)
    for i in active.tolist():
        if loss[i] <= tolerance:
            status[i] = "converged"
    return Solution(theta, loss, status, iteration)


def _step(
    problem: LeastSquares,
    theta: Tensor,
    loss: Tensor,
    gradient: Tensor,
    gram: Tensor,
    damp: Tensor,
    growth: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One accepted step of every problem (or none, after TRIALS dampings): new theta, loss, damping and growth."""
    theta, loss, damp, growth = theta.clone(), loss.clone(), damp.clone(), growth.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(dim=1, keepdim=True).clamp(min=1e-300)
    waiting = torch.arange(theta.shape[0])
    for _ in range(TRIALS):
        shift = (damp[waiting, None] * scale[waiting]).expand_as(gradient[waiting])
        matrix = gram[waiting]
        matrix.diagonal(dim1=1, dim2=2).add_(shift)
        factor, info = torch.linalg.cholesky_ex(matrix)
        right = gradient[waiting, :, None]
        step = -torch.cholesky_solve(right, factor)[:, :, 0]
        candidate = theta[waiting] + step
        new = problem.loss(candidate)
        predicted = (step * (shift * step - gradient[waiting])).sum(1)  # of the mean square, by the linear model
        gain = (loss[waiting] - new) / predicted
        good = (info == 0) & torch.isfinite(new) & (new < loss[waiting])
        ok, bad = waiting[good], waiting[~good]
        theta[ok], loss[ok] = candidate[good], new[good]
        damp[ok] = (damp[ok] * (1 - (2 * gain[good] - 1) ** 3).clamp(1 / 5, 2)).clamp(min=1e-15)
        growth[ok] = 2.0
        damp[bad] *= growth[bad]
        growth[bad] *= 2
        waiting = bad
        if not len(waiting):
            break
    return theta, loss, damp, growth
