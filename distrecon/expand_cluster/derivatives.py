"""Derivatives of a black box by central differences, and what those of one hidden layer tell of its neurons.

The Jacobian of y = C f(W z + b) is sum_h f'(u_h) c_h w_h^T, and the derivative of that along a direction d is
sum_h f''(u_h) (w_h . d) c_h w_h^T: sums of rank-one matrices with the same right factors w_h at all points. (Janzamin,
Sedghi, Anandkumar: Beating the perils of non-convexity, arXiv 1506.08473; Fornasier, Vybiral, Daubechies: Robust and
resource efficient identification of shallow neural networks by fewest samples, Information and Inference 2021.)
So are third derivatives, sum_h f'''(u_h) c_h w_h x w_h x w_h, unfolded so that w_h is the right factor: of one output
they have room for more terms than the R (R + 1) / 2 of second ones.

Legend: S points, R relevant input directions, O outputs, D directions, T points of a stencil, E distinct entries of a
symmetric third derivative.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.coordinates import ROOM, Coordinates
from distrecon.expand_cluster.thresholds import LEAST_NOISE

LINES = 1.5  # x the distinct third derivatives: so many random lines give them by well-conditioned least squares
AT_ONCE = 20_000  # queries
FEW, LONGER = 4, 2.0  # points at which a step is chosen, and how much longer another one is

Ask = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stencil:
    """Central difference of an order: sum of weights[T] f(multiples[T] h) + center f(0), over h^order.

    Its error grows like h^error, and that of the answers' rounding like h^-order.
    """

    order: int
    error: int
    multiples: tuple[float, ...]
    weights: tuple[float, ...]
    center: float = 0.0

    def step(self, noise: float) -> float:
        """h at which both are alike, if the derivative of the error is of the function's own size."""
        return noise ** (1 / (self.order + self.error))


FIRST = Stencil(1, 4, (1, -1, 2, -2), (8 / 12, -8 / 12, -1 / 12, 1 / 12))
SECOND = Stencil(2, 4, (1, -1, 2, -2), (16 / 12, 16 / 12, -1 / 12, -1 / 12), -30 / 12)
THIRD = Stencil(
    3,
    6,
    (1, -1, 2, -2, 3, -3, 4, -4),
    (-61 / 30, 61 / 30, 169 / 120, -169 / 120, -3 / 10, 3 / 10, 7 / 240, -7 / 240),
)


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
        lines = (rank, directions * rank + directions + rank, _lines(rank))[order - 1]
        return len(self.x_SI) * len((FIRST, SECOND, THIRD)[order - 1].multiples) * lines

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

    def thirds(self, generator: torch.Generator) -> Tensor:
        """d^3 y / d z_i d z_j d z_k for i <= j <= k, [S, O, E] in the order of `triples`.

        By least squares from the derivatives along random lines, each of which is a cubic form of its direction.
        """
        rank = self.back_IR.shape[1]
        directions_DR = torch.randn(_lines(rank), rank, generator=generator, dtype=torch.float64)
        directions_DR = torch.nn.functional.normalize(directions_DR, dim=1)
        triples_E3 = triples(rank)
        places_E = (triples_E3.diff(dim=1) != 0).sum(1)  # of equal indices 1 place in the full tensor, else 3 or 6
        form_DE = directions_DR[:, triples_E3].prod(2) * torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)[places_E]
        along_DX = self._along(directions_DR, THIRD, self._step(directions_DR, THIRD)).transpose(0, 1).flatten(1)
        return torch.linalg.lstsq(form_DE, along_DX).solution.T.unflatten(0, (len(self.x_SI), -1))

    def _step(self, directions_DR: Tensor, stencil: Stencil) -> float:
        """The step at which rounding and the stencil's error are alike, by its error at a longer step at some points.

        Ninth derivatives are larger than third ones by very different factors.
        """
        first = stencil.step(self.noise)
        few_DR = directions_DR[: 2 * directions_DR.shape[1]]
        here, longer = (self._along(few_DR, stencil, step, FEW) for step in (first, LONGER * first))
        error = float((longer - here).square().mean().sqrt())
        weight = torch.tensor(stencil.weights, dtype=torch.float64).norm()
        rounding = self.noise * float(self.center_SO.std() * weight) / first**stencil.order
        alike = first * (rounding / max(error, 1e-300) * LONGER**stencil.error) ** (1 / (stencil.order + stencil.error))
        return min(max(alike, first / LONGER), LONGER * first)

    def _along(
        self, directions_DR: Tensor, stencil: Stencil, step: float | None = None, few: int | None = None
    ) -> Tensor:
        """Directional derivatives of the stencil's order, [S, D, O]; at the first `few` points, if that is said."""
        step, multiples_T = step or stencil.step(self.noise), torch.tensor(stencil.multiples, dtype=torch.float64)
        weights_T = torch.tensor(stencil.weights, dtype=torch.float64)
        moves_TDI = step * multiples_T[:, None, None] * (directions_DR @ self.back_IR.T)
        found = []
        points = max(1, AT_ONCE // (len(multiples_T) * len(directions_DR)))
        for x_SI, center_SO in zip(self.x_SI[:few].split(points), self.center_SO[:few].split(points), strict=True):
            y_STDO = self.box((x_SI[:, None, None] + moves_TDI).flatten(0, 2)).unflatten(
                0, (len(x_SI), *moves_TDI.shape[:2])
            )
            sum_SDO = torch.einsum("t,stdo->sdo", weights_T, y_STDO)
            found.append((sum_SDO + stencil.center * center_SO[:, None]) / step**stencil.order)
        return torch.cat(found)


def triples(rank: int) -> Tensor:
    """All i <= j <= k below the rank, [E, 3]."""
    return torch.combinations(torch.arange(rank), 3, with_replacement=True)


def unfolded(thirds_SOE: Tensor, rank: int) -> Tensor:
    """Third derivatives as matrices [S, O P, R] with a row for each of the P pairs i <= j."""
    triples_E3 = triples(rank)
    place_RRR = torch.empty(rank, rank, rank, dtype=torch.long)
    for order in itertools.permutations(range(3)):
        i_E, j_E, k_E = triples_E3[:, order].unbind(1)
        place_RRR[i_E, j_E, k_E] = torch.arange(len(triples_E3))
    first_P, second_P = torch.triu_indices(rank, rank)
    return thirds_SOE[:, :, place_RRR[first_P, second_P]].flatten(1, 2)


def _lines(rank: int) -> int:
    return math.ceil(LINES * math.comb(rank + 2, 3))


def jacobians(ask: Ask, z_SR: Tensor, step_S: Tensor) -> Tensor:
    """d y / d z of a function of z[Q, R], [S, O, R], by five-point differences of these steps: 4 R queries a point."""
    rank = z_SR.shape[1]
    moves_DR = torch.cat([multiple * torch.eye(rank, dtype=torch.float64) for multiple in FIRST.multiples])
    points, parts = max(1, AT_ONCE // len(moves_DR)), []
    for z_PR, step_P in zip(z_SR.split(points), step_S.split(points), strict=True):
        moved_PDR = z_PR[:, None] + step_P[:, None, None] * moves_DR
        y_PTRO = ask(moved_PDR.flatten(0, 1)).unflatten(0, (len(z_PR), len(FIRST.multiples), rank))
        weights_T = torch.tensor(FIRST.weights, dtype=torch.float64)
        parts.append(torch.einsum("t,ptro->por", weights_T, y_PTRO) / step_P[:, None, None])
    return torch.cat(parts)
