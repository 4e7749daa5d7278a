"""Derivatives of a black box by central differences, and what those of one hidden layer tell of its neurons.

The Jacobian of y = C f(W z + b) is sum_h f'(u_h) c_h w_h^T, and the derivative of that along a direction d is
sum_h f''(u_h) (w_h . d) c_h w_h^T: sums of rank-one matrices with the same right factors w_h at all points. (Janzamin,
Sedghi, Anandkumar: Beating the perils of non-convexity, arXiv 1506.08473; Fornasier, Vybiral, Daubechies: Robust and
resource efficient identification of shallow neural networks by fewest samples, Information and Inference 2021.)

Legend: S points, R relevant input directions, O outputs, D directions, T points of a stencil.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.coordinates import ROOM, Coordinates
from distrecon.expand_cluster.thresholds import LEAST_NOISE

# f(h), f(-h), f(2h), f(-2h) and f(0), by which power of h they are divided, and the order of the error
FIRST = ((8 / 12, -8 / 12, -1 / 12, 1 / 12, 0.0), 1)
SECOND = ((16 / 12, 16 / 12, -1 / 12, -1 / 12, -30 / 12), 2)
ERROR = 4  # power of h
MULTIPLES = (1.0, -1.0, 2.0, -2.0)
AT_ONCE = 20_000  # queries

Ask = Callable[[Tensor], Tensor]


class Derivatives:
    """Of a black box at points z[S, R] of some coordinates, by five-point differences."""

    def __init__(self, box: BlackBox, coordinates: Coordinates, count: int, generator: torch.Generator) -> None:
        self.box, self.back_IR = box, coordinates.back_IR
        self.x_SI = box.place(coordinates.draw(count, generator), ROOM)
        self.z_SR = self.x_SI @ coordinates.to_RI.T
        self.center_SO = box(self.x_SI)
        self.noise = max(box.noise / max(float(self.center_SO.std()), 1e-300), LEAST_NOISE)

    def cost(self, order: int, directions: int) -> int:
        """Queries that derivatives of this order take, along so many directions where it is the second."""
        rank = self.back_IR.shape[1]
        lines = rank if order == 1 else directions * rank + directions + rank
        return len(self.x_SI) * len(MULTIPLES) * lines

    def jacobians(self) -> Tensor:
        """d outputs / d z, [S, O, R]: 4 R queries a point."""
        return self._along(torch.eye(self.back_IR.shape[1], dtype=torch.float64), FIRST).transpose(1, 2)

    def along(self, directions_DR: Tensor) -> Tensor:
        """The Jacobian's derivatives along directions, [S, O D, R], by polarisation of second derivatives."""
        axes_RR = torch.eye(self.back_IR.shape[1], dtype=torch.float64)
        mixed = (directions_DR[:, None] + axes_RR).flatten(0, 1)
        second = [self._along(rows, SECOND) for rows in (mixed, directions_DR, axes_RR)]
        mixed_SDRO = second[0].unflatten(1, (len(directions_DR), -1)) - second[1][:, :, None] - second[2][:, None]
        return mixed_SDRO.permute(0, 3, 1, 2).flatten(1, 2) / 2

    def _along(self, directions_DR: Tensor, stencil: tuple[tuple[float, ...], int]) -> Tensor:
        """Directional derivatives of the stencil's order, [S, D, O]."""
        weights, order = stencil
        step = self.noise ** (1 / (order + ERROR))
        moves_TDI = step * torch.tensor(MULTIPLES).double()[:, None, None] * (directions_DR @ self.back_IR.T)
        found = []
        points = max(1, AT_ONCE // (len(MULTIPLES) * len(directions_DR)))
        for x_SI, center_SO in zip(self.x_SI.split(points), self.center_SO.split(points), strict=True):
            y_STDO = self.box((x_SI[:, None, None] + moves_TDI).flatten(0, 2)).unflatten(
                0, (len(x_SI), *moves_TDI.shape[:2])
            )
            sum_SDO = torch.einsum("t,stdo->sdo", torch.tensor(weights[:4], dtype=torch.float64), y_STDO)
            found.append((sum_SDO + weights[4] * center_SO[:, None]) / step**order)
        return torch.cat(found)


def jacobians(ask: Ask, z_SR: Tensor, step_S: Tensor) -> Tensor:
    """d y / d z of a function of z[Q, R], [S, O, R], by five-point differences of these steps: 4 R queries a point."""
    rank = z_SR.shape[1]
    moves_DR = torch.cat([multiple * torch.eye(rank, dtype=torch.float64) for multiple in MULTIPLES])
    points, parts = max(1, AT_ONCE // len(moves_DR)), []
    for z_PR, step_P in zip(z_SR.split(points), step_S.split(points), strict=True):
        moved_PDR = z_PR[:, None] + step_P[:, None, None] * moves_DR
        y_PTRO = ask(moved_PDR.flatten(0, 1)).unflatten(0, (len(z_PR), len(MULTIPLES), rank))
        weights_T = torch.tensor(FIRST[0][:4], dtype=torch.float64)
        parts.append(torch.einsum("t,ptro->por", weights_T, y_PTRO) / step_P[:, None, None])
    return torch.cat(parts)
