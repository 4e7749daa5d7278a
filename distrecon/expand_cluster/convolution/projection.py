"""Fits of convolutional networks: the hidden layers by Gauss-Newton steps, the readout eliminated by least squares.

Variable projection (Golub and Pereyra, SIAM J. Numer. Anal. 1973) with Kaufman's Jacobian (BIT 1975): the residual is
what the features leave of the answers, and its Jacobian is that of the hidden layers, with the readout as it is,
projected outside the features. Where a black box is of the network's kind the residual ends at rounding, and the steps
converge quadratically.

Legend: Q queries, I inputs, O outputs, F columns of the design (features, the inputs as a linear path, one), P
parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.convolution.network import ConvNet
from distrecon.expand_cluster.least_squares import Solution, levenberg_marquardt

DEPENDENT = 1e-10  # of a column's norm: what is left of it beside those before, if it is a copy of them
NEAR, DAMPING, NEAR_DAMPING = 1e-9, 1e-3, 1e-11  # relative loss of a start that is nearly exact; first dampings
AT_ONCE = 6_000_000  # numbers of the Jacobian that are made at a time


@dataclass(frozen=True)
class Readout:
    """The least-squares readout of a design: an orthonormal basis [Q, R] of its columns, coefficients [F, O], what is
    left of the answers [Q, O]."""

    basis_QR: Tensor
    coefficients_FO: Tensor
    rest_QO: Tensor

    @staticmethod
    def of(design_QF: Tensor, y_QO: Tensor) -> "Readout":
        """Columns that the ones before them explain get no weight."""
        scale_F = design_QF.norm(dim=0).clamp(min=1e-300)
        unit_QF = design_QF / scale_F
        kept_F = torch.ones(len(scale_F), dtype=torch.bool)
        basis_QR, upper_RR = torch.linalg.qr(unit_QF)
        kept_F = upper_RR.diagonal().abs() > DEPENDENT
        if not kept_F.all():
            basis_QR, upper_RR = torch.linalg.qr(unit_QF[:, kept_F])
        rest_QO = y_QO - basis_QR @ (basis_QR.T @ y_QO)
        rest_QO = rest_QO - basis_QR @ (basis_QR.T @ rest_QO)
        solved_RO = torch.linalg.solve_triangular(upper_RR, basis_QR.T @ y_QO, upper=True)
        coefficients_FO = y_QO.new_zeros(len(scale_F), y_QO.shape[1])
        coefficients_FO[kept_F] = solved_RO / scale_F[kept_F, None]
        return Readout(basis_QR, coefficients_FO, rest_QO)


@dataclass(frozen=True)
class Projected:
    """The least-squares problem (see least_squares.LeastSquares) of the hidden layers' parameters alone.

    `skip` adds the inputs to the features: a linear path from them to the outputs, where sign flips leave such a term.
    `free_P` are the parameters that may move (all, if None).
    """

    net: ConvNet
    x_QI: Tensor
    y_QO: Tensor
    skip: bool = False
    free_P: Tensor | None = None

    def design(self, features_QF: Tensor) -> Tensor:
        ones_Q1 = features_QF.new_ones(len(features_QF), 1)
        return torch.cat([features_QF, self.x_QI, ones_Q1] if self.skip else [features_QF, ones_Q1], dim=1)

    def readout(self, theta_P: Tensor) -> Readout:
        return Readout.of(self.design(self.net.features(theta_P, self.x_QI)), self.y_QO)

    def loss(self, theta_NP: Tensor) -> Tensor:
        return torch.stack([self._loss(theta_P) for theta_P in theta_NP])

    def _loss(self, theta_P: Tensor) -> Tensor:
        if not torch.isfinite(theta_P).all():
            return theta_P.new_tensor(torch.inf)
        return self.readout(theta_P).rest_QO.square().mean()

    def normal_equations(self, theta_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = [self._normal_equations(theta_P) for theta_P in theta_NP]
        losses, gradients, grams = (torch.stack(parts) for parts in zip(*found, strict=True))
        return losses, gradients, grams

    def _normal_equations(self, theta_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        passed = self.net.trace(theta_P, self.x_QI)
        solved = Readout.of(self.design(passed[-1].after.flatten(1)), self.y_QO)
        readout_OF = solved.coefficients_FO[: self.net.num_features].T
        size, outputs = self.net.num_parameters, self.y_QO.shape[1]
        gradient_P, gram_PP = theta_P.new_zeros(size), theta_P.new_zeros(size, size)
        seen_ROP = theta_P.new_zeros(solved.basis_QR.shape[1], outputs * size)
        rows = max(16, AT_ONCE // (size * outputs))
        for start in range(0, len(self.x_QI), rows):
            part = slice(start, start + rows)
            some = [here[part] for here in passed]
            jacobian_QOP = self.net.jacobian(theta_P, some, readout_OF)
            flat_NP = jacobian_QOP.flatten(0, 1)
            gradient_P -= solved.rest_QO[part].flatten() @ flat_NP
            gram_PP.addmm_(flat_NP.T, flat_NP)
            seen_ROP.addmm_(solved.basis_QR[part].T, jacobian_QOP.flatten(1))
        seen_NP = seen_ROP.view(-1, size)
        gram_PP.addmm_(seen_NP.T, seen_NP, alpha=-1)
        count = self.y_QO.numel()
        if self.free_P is not None:
            gradient_P, fixed_P = gradient_P * self.free_P, ~self.free_P
            gram_PP[fixed_P], gram_PP[:, fixed_P] = 0.0, 0.0
            gram_PP[fixed_P, fixed_P] = count * 1.0
        return solved.rest_QO.square().mean(), gradient_P / count, gram_PP / count

    def fit(self, theta_P: Tensor, iterations: int, tolerance: float, deadline: float | None = None) -> Solution:
        """Levenberg-Marquardt from theta, hardly damped at first where the start is nearly exact."""
        damping = NEAR_DAMPING if float(self._loss(theta_P)) < NEAR else DAMPING
        return levenberg_marquardt(self, theta_P[None], iterations, tolerance, damping, deadline=deadline)


def held_out(problem: Projected, theta_P: Tensor, x_QI: Tensor, y_QO: Tensor) -> float:
    """Mean squared error on other queries, with the readout that the problem's own give."""
    coefficients_FO = problem.readout(theta_P).coefficients_FO
    other = Projected(problem.net, x_QI, y_QO, problem.skip)
    return float((other.design(problem.net.features(theta_P, x_QI)) @ coefficients_FO - y_QO).square().mean())
