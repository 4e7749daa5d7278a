"""The generic solver against scipy, on problems that have nothing to do with networks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares

from distrecon.expand_cluster.least_squares import levenberg_marquardt

TIMES = torch.linspace(0, 3, 40, dtype=torch.float64)
NOISE = 0.01 * torch.sin(37 * TIMES)


@dataclass(frozen=True)
class Residuals:
    """A LeastSquares problem from a function theta[P] -> residuals[M], differentiated by torch.func."""

    function: Callable[[torch.Tensor], torch.Tensor]

    def loss(self, theta_NP: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(self.function)(theta_NP).square().mean(1)

    def normal_equations(self, theta_NP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        residuals = torch.func.vmap(self.function)(theta_NP)
        jacobian = torch.func.vmap(torch.func.jacfwd(self.function))(theta_NP)
        transposed, size = jacobian.transpose(1, 2), residuals.shape[1]
        gradient = torch.bmm(transposed, residuals[:, :, None])[:, :, 0] / size
        return residuals.square().mean(1), gradient, torch.bmm(transposed, jacobian) / size


def decay(theta_P: torch.Tensor) -> torch.Tensor:
    return theta_P[0] * torch.exp(-theta_P[1] * TIMES) + theta_P[2] - (2 * torch.exp(-1.5 * TIMES) + 0.3 + NOISE)


def rosenbrock(theta_P: torch.Tensor) -> torch.Tensor:
    return torch.stack([10 * (theta_P[1] - theta_P[0] ** 2), 1 - theta_P[0]])


def test_agrees_with_scipy_on_a_noisy_fit(generator):
    starts = torch.rand(6, 3, generator=generator, dtype=torch.float64) + 0.5
    ours = levenberg_marquardt(Residuals(decay), starts, 200)
    for start, theta, loss in zip(starts, ours.theta_NP, ours.loss_N, strict=True):
        theirs = least_squares(lambda p: decay(torch.from_numpy(p)).numpy(), start.numpy(), method="lm", xtol=1e-14)
        np.testing.assert_allclose(theta.numpy(), theirs.x, rtol=1e-6)
        np.testing.assert_allclose(loss.item(), 2 * theirs.cost / len(TIMES), rtol=1e-9)


def test_reaches_machine_precision_where_the_residual_vanishes():
    starts = torch.tensor([[-1.2, 1.0], [3.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    solution = levenberg_marquardt(Residuals(rosenbrock), starts, 200, tolerance=1e-28)
    assert solution.status == ["converged"] * 3
    torch.testing.assert_close(solution.theta_NP, torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_problems_do_not_influence_each_other():
    starts = torch.tensor([[-1.2, 1.0], [3.0, -2.0]], dtype=torch.float64)
    together = levenberg_marquardt(Residuals(rosenbrock), starts, 12)
    for i in range(2):
        alone = levenberg_marquardt(Residuals(rosenbrock), starts[i : i + 1], 12)
        torch.testing.assert_close(alone.theta_NP[0], together.theta_NP[i], rtol=1e-12, atol=1e-14)


def test_the_loss_never_rises_and_the_start_is_not_changed():
    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    losses = [float(Residuals(rosenbrock).loss(start))]
    levenberg_marquardt(Residuals(rosenbrock), start, 50, progress=lambda _, loss_N: losses.append(float(loss_N)))
    assert losses == sorted(losses, reverse=True)
    assert start.tolist() == [[-1.2, 1.0]]


def test_a_problem_that_is_not_finite_is_named_and_leaves_the_others_alone():
    starts = torch.tensor([[float("nan"), 1.0], [-1.2, 1.0]], dtype=torch.float64)
    solution = levenberg_marquardt(Residuals(rosenbrock), starts, 200)
    assert solution.status == ["non-finite", "converged"]


def test_a_stalled_problem_stops_early():
    solution = levenberg_marquardt(Residuals(lambda p: p.square().sum()[None] + 1), torch.ones(1, 2).double(), 500)
    assert solution.status == ["stalled"]
    assert solution.iterations < 100
