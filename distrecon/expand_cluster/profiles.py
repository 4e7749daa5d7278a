"""A neuron's slope and bias from its response: the three unknowns of size f^(k)(alpha t + beta), by least squares.

Legend: S points, N starts, G starts on a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.least_squares import levenberg_marquardt
from distrecon.nets.activations import Activation

Function = Callable[[Tensor], Tensor]
SLOPES = tuple(10.0 ** (k / 5) for k in range(-8, 11))  # of the starts, over the standard deviation of t
CENTRES = 61  # of the starts, over the range of t and beyond it, as far as activations bend:
BENDS = 6.0  # |u| up to which they do
STARTS = 10  # of so many slopes the best centre is followed
LOOKED_AT = 300  # points, to choose these
ITERATIONS, CONVERGED = 100, 1e-28


def derivative(activation: Activation, order: int) -> Function:
    """f^(order), order at least 1; the higher ones by automatic differentiation."""
    if order == 1:
        return activation.derivative
    lower = derivative(activation, order - 1)

    def differentiated(u: Tensor) -> Tensor:
        with torch.enable_grad():
            u = u if u.requires_grad else u.detach().requires_grad_()
            (slope,) = torch.autograd.grad(lower(u).sum(), u, create_graph=True)
        return slope

    return differentiated


@dataclass(frozen=True)
class ProfileFit:
    """Least-squares problems of the unknowns [size, alpha, beta] (see least_squares.LeastSquares)."""

    function: Function
    slope: Function
    t_S: Tensor
    values_S: Tensor

    def loss(self, theta_NP: Tensor) -> Tensor:
        size_N1, alpha_N1, beta_N1 = theta_NP.split(1, dim=1)
        return (size_N1 * self.function(alpha_N1 * self.t_S + beta_N1) - self.values_S).detach().square().mean(1)

    def normal_equations(self, theta_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size_N1, alpha_N1, beta_N1 = theta_NP.split(1, dim=1)
        u_NS = alpha_N1 * self.t_S + beta_N1
        value_NS, slope_NS = self.function(u_NS).detach(), size_N1 * self.slope(u_NS).detach()
        jacobian_NSP = torch.stack([value_NS, slope_NS * self.t_S, slope_NS], dim=2)
        rest_NS = size_N1 * value_NS - self.values_S
        gradient_NP = (rest_NS[:, None] @ jacobian_NSP)[:, 0] / len(self.t_S)
        gram_NPP = jacobian_NSP.transpose(1, 2) @ jacobian_NSP / len(self.t_S)
        return rest_NS.square().mean(1), gradient_NP, gram_NPP


def fit_profile(activation: Activation, order: int, t_S: Tensor, values_S: Tensor) -> tuple[float, float, float]:
    """(alpha, beta, relative loss) of values = size f^(order)(alpha t + beta), the best of several starts.

    The size, which may have either sign, is what outgoing weights make of it.
    """
    function, slope = derivative(activation, order), derivative(activation, order + 1)
    unit = float(t_S.std())
    scale = float(values_S.square().mean().sqrt())
    fit = ProfileFit(function, slope, t_S / unit, values_S / scale)
    theta_NP = levenberg_marquardt(fit, _starts(fit), ITERATIONS, CONVERGED).theta_NP
    loss_N = fit.loss(theta_NP).nan_to_num(torch.inf)
    best = int(loss_N.argmin())
    return float(theta_NP[best, 1]) / unit, float(theta_NP[best, 2]), float(loss_N[best])


def _starts(fit: ProfileFit) -> Tensor:
    """[N, 3]: slopes of either sign and centres on a grid, with the sizes that fit best."""
    t_S, values_S = fit.t_S[:LOOKED_AT], fit.values_S[:LOOKED_AT]
    alpha_A = torch.tensor([sign * slope for slope in SLOPES for sign in (1.0, -1.0)], dtype=torch.float64)
    share_C = torch.linspace(0, 1, CENTRES, dtype=torch.float64)
    low_A, high_A = t_S.min() - BENDS / alpha_A.abs(), t_S.max() + BENDS / alpha_A.abs()
    centre_G = (low_A[:, None] + (high_A - low_A)[:, None] * share_C).flatten()
    alpha_G = alpha_A.repeat_interleave(CENTRES)
    profile_GS = fit.function(alpha_G[:, None] * (t_S - centre_G[:, None])).detach()
    power_G = profile_GS.square().sum(1).clamp(min=1e-300)
    product_G = profile_GS @ values_S
    gain_AC = (product_G.square() / power_G).unflatten(0, (len(alpha_A), CENTRES))
    slopes_N = gain_AC.amax(1).topk(STARTS).indices
    best_N = slopes_N * CENTRES + gain_AC[slopes_N].argmax(1)
    alpha_N = alpha_G[best_N]
    return torch.stack([product_G[best_N] / power_G[best_N], alpha_N, -alpha_N * centre_G[best_N]], dim=1)
