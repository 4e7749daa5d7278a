"""Training data for students, and exact fits of dense networks to it.

Legend: N students, Q queries, I inputs, R relevant input directions, O outputs, P parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.least_squares import Solution, levenberg_marquardt
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.teachers import Weights

TOLERANCE = 1e-29  # of the relative loss: rounding of float64 sits at about 1e-31


@dataclass(frozen=True)
class Probed:
    """Queries, their relevant coordinates, and answers standardised by one mean per output and one common scale."""

    x_QI: Tensor
    z_QR: Tensor
    y_QO: Tensor
    mean_O: Tensor
    scale: float

    @staticmethod
    def of(x_QI: Tensor, z_QR: Tensor, answers_QO: Tensor) -> "Probed":
        """Standardise the answers."""
        mean_O = answers_QO.mean(0)
        scale = float((answers_QO - mean_O).square().mean().sqrt())
        return Probed(x_QI, z_QR, (answers_QO - mean_O) / scale, mean_O, scale)

    def rows(self, count: int) -> "Probed":
        """The first `count` queries; they are in random order."""
        return Probed(self.x_QI[:count], self.z_QR[:count], self.y_QO[:count], self.mean_O, self.scale)


@dataclass(frozen=True)
class Committee:
    """Students whose disagreement tells where the answers are not determined yet.

    Query by committee (Seung, Opper and Sompolinsky, COLT 1992); compare arXiv 2511.20312.
    """

    net: DenseNet
    theta_NP: Tensor
    to_RI: Tensor

    def disagreement(self, x_QI: Tensor) -> Tensor:
        """[Q]: variance of the students' answers, relative to their size, so that large ones do not win by size."""
        y_NQO = self.net(self.theta_NP, x_QI @ self.to_RI.T)
        return y_NQO.var(0).sum(1) / (1 + y_NQO.mean(0).square().sum(1))


@dataclass(frozen=True)
class NetworkFit:
    """The least-squares problem of a group of dense networks on shared queries (see least_squares.LeastSquares)."""

    net: DenseNet
    x_QI: Tensor
    y_QO: Tensor

    def loss(self, theta_NP: Tensor) -> Tensor:
        return self.net.loss(theta_NP, self.x_QI, self.y_QO)

    def normal_equations(self, theta_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.net.normal_equations(theta_NP, self.x_QI, self.y_QO)


def fit(
    net: DenseNet,
    theta_NP: Tensor,
    x_QI: Tensor,
    y_QO: Tensor,
    iterations: int,
    tolerance: float = TOLERANCE,
    deadline: float | None = None,
) -> Solution:
    """Levenberg-Marquardt on every network of the group, from theta[N, P]."""
    return levenberg_marquardt(NetworkFit(net, x_QI, y_QO), theta_NP, iterations, tolerance, deadline=deadline)


def rows_needed(net: DenseNet, rows: int) -> int:
    """Queries for one fit: at least three equations for every unknown."""
    return max(rows, 3 * net.num_parameters // net.sizes[-1] + 1)


def to_weights(net: DenseNet, theta_P: Tensor, data: Probed, to_RI: Tensor | None) -> Weights:
    """[(W, b), ...] of a network without skip: back to inputs (through to_RI, if given) and the answers' own scale."""
    layers = [(m[0, :, :-1], m[0, :, -1]) for m in net.matrices(theta_P[None])]
    if to_RI is not None:
        layers[0] = (layers[0][0] @ to_RI, layers[0][1])
    last_w, last_b = layers[-1]
    layers[-1] = (last_w * data.scale, last_b * data.scale + data.mean_O)
    return [(w.clone(), b.clone()) for w, b in layers]


def from_weights(weights: Weights, data: Probed) -> Tensor:
    """theta[1, P] of [(W, b), ...] for standardised answers: the inverse of `to_weights` without coordinates."""
    last_w, last_b = weights[-1]
    layers = [*weights[:-1], (last_w / data.scale, (last_b - data.mean_O) / data.scale)]
    return DenseNet.flatten([torch.cat([w, b[:, None]], dim=1)[None] for w, b in layers])
