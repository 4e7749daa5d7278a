"""Outgoing weights of given neurons by least squares: what is missing, what is redundant.

One hidden layer seen from its input z: y = C [f(V [z, 1]), (z with a skip), 1]. A missing neuron is fatal and an extra
one is not, so neurons are added generously before the exact fit and dropped one by one after it.

Legend: Q queries, R layer inputs, H hidden, K = R + 1 coordinates of a neuron [weights, bias], O outputs, F features.
"""

import torch
from torch import Tensor

from distrecon.expand_cluster.thresholds import COPY, SINGULAR
from distrecon.nets.activations import Activation


def features(neurons_HK: Tensor, z_QR: Tensor, activation: Activation, skip: bool) -> Tensor:
    """[f(V [z, 1]), (z), 1] as [Q, F]; the first H columns are the hidden activations."""
    hidden_QH = activation(z_QR @ neurons_HK[:, :-1].T + neurons_HK[:, -1])
    ones_Q1 = z_QR.new_ones(len(z_QR), 1)
    return torch.cat([hidden_QH, z_QR, ones_Q1] if skip else [hidden_QH, ones_Q1], dim=1)


def solve_outgoing(features_QF: Tensor, y_QO: Tensor) -> tuple[Tensor, float]:
    """Least-squares coefficients [F, O] (minimal norm where columns coincide) and the mean squared error left."""
    scale_F = features_QF.norm(dim=0).clamp(min=1e-300)
    solution_FO = torch.linalg.lstsq(features_QF / scale_F, y_QO, driver="gelsd").solution
    error = (features_QF / scale_F) @ solution_FO - y_QO
    return solution_FO / scale_F[:, None], float(error.square().mean())


def pursue(
    neurons_HK: Tensor,
    pool_HK: Tensor,
    z_QR: Tensor,
    y_QO: Tensor,
    activation: Activation,
    skip: bool,
    target: float,
) -> Tensor:
    """`neurons` plus those of the pool, best first, until the mean squared error is at most `target`.

    Orthogonal matching pursuit: each time the pool's neuron most correlated with the residual, after projection.
    """
    base_QF = features(neurons_HK, z_QR, activation, skip)
    pool_QH = activation(z_QR @ pool_HK[:, :-1].T + pool_HK[:, -1])
    basis_QF, _ = torch.linalg.qr(base_QF)
    rest_QO = y_QO - basis_QF @ (basis_QF.T @ y_QO)
    rest_QO = rest_QO - basis_QF @ (basis_QF.T @ rest_QO)
    norms_H = pool_QH.norm(dim=0).clamp(min=1e-300)
    free_QH = pool_QH - basis_QF @ (basis_QF.T @ pool_QH)
    taken: list[int] = []
    while rest_QO.square().mean() > target and len(taken) < len(pool_HK):
        sizes_H = free_QH.norm(dim=0)
        usable_H = sizes_H > COPY * norms_H  # a copy of what is there already explains nothing
        usable_H[taken] = False
        if not usable_H.any():
            break
        scores_H = (free_QH.T @ rest_QO).norm(dim=1) / sizes_H.clamp(min=1e-300)
        best = int(torch.where(usable_H, scores_H, -1.0).argmax())
        direction_Q = free_QH[:, best] / sizes_H[best]
        rest_QO = rest_QO - direction_Q[:, None] * (direction_Q @ rest_QO)
        free_QH = free_QH - direction_Q[:, None] * (direction_Q @ free_QH)
        taken.append(best)
    return torch.cat([neurons_HK, pool_HK[taken]])


def drop_costs(features_QF: Tensor, coefficients_FO: Tensor, hidden: int) -> Tensor:
    """Rise of the mean squared error when each hidden neuron is dropped and the rest solved again, [H].

    For least squares that is |c_h|^2 / (G^-1)_hh over Q O, G the features' Gram matrix; through the singular values,
    so that coinciding neurons (G singular) cost nothing.
    """
    scale_F = features_QF.norm(dim=0).clamp(min=1e-300)
    _, values_F, right_FF = torch.linalg.svd(features_QF / scale_F, full_matrices=False)
    inverse_F = (right_FF / values_F.clamp(min=SINGULAR * float(values_F[0]))[:, None]).square().sum(0)
    power_F = (coefficients_FO * scale_F[:, None]).square().sum(1)
    return (power_F / inverse_F)[:hidden] / (len(features_QF) * coefficients_FO.shape[1])
