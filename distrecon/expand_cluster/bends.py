"""Where a piecewise linear black box bends: points and normals of its kinks, met on lines, to about 1e-10.

Lines are scanned on a grid. Where two straight pieces meet, one more query confirms the meeting point and the gradients
on both sides give the hyperplane's normal. Compare Carlini, Jagielski, Mironov (arXiv 2003.04884).

Legend: L lines, T grid points of a line, S bends, R relevant input directions, O outputs, K = R + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.expand_cluster.thresholds import BEND_MARGIN, MEETING_MARGIN, PURE

GRID = 1200  # grid points a line
BESIDE = 0.3  # of a grid step: how far from a bend its two gradients are taken
STEP = 1e-2  # of a grid step: of the gradients' differences
AT_ONCE = 4_000_000  # numbers of the queries round bends that are made at a time

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lines:
    """Lines z = start + t direction and where they bend.

    `turns_LT` says whether a line turns at an inner grid point, `flat_LT` whether it is constant there (relu networks
    are, where all of a layer is off); `points_SR`, unit `normals_SR` and `line_S` describe the clean bends.
    """

    start_LR: Tensor
    direction_LR: Tensor
    times_LT: Tensor
    turns_LT: Tensor
    flat_LT: Tensor
    points_SR: Tensor
    normals_SR: Tensor
    line_S: Tensor

    @staticmethod
    def join(parts: list["Lines"]) -> "Lines":
        """All lines of several scans."""
        counts = np.cumsum([0] + [len(part.start_LR) for part in parts])
        return Lines(
            torch.cat([part.start_LR for part in parts]),
            torch.cat([part.direction_LR for part in parts]),
            torch.cat([part.times_LT for part in parts]),
            torch.cat([part.turns_LT for part in parts]),
            torch.cat([part.flat_LT for part in parts]),
            torch.cat([part.points_SR for part in parts]),
            torch.cat([part.normals_SR for part in parts]),
            torch.cat([part.line_S + int(count) for part, count in zip(parts, counts[:-1], strict=True)]),
        )

    @property
    def planes_SK(self) -> Tensor:
        """[normal, offset] of the hyperplane through every bend, of unit length."""
        offset_S1 = -(self.points_SR * self.normals_SR).sum(1, keepdim=True)
        return torch.nn.functional.normalize(torch.cat([self.normals_SR, offset_S1], dim=1), dim=1)

    def bent_share(self, plane_K: Tensor) -> float:
        """Share of the lines that bend where they cross a hyperplane and are not constant; 0 when none crosses it."""
        t_L = -(self.start_LR @ plane_K[:-1] + plane_K[-1]) / (self.direction_LR @ plane_K[:-1])
        step_L = self.times_LT[:, 1] - self.times_LT[:, 0]
        at_L = torch.floor((t_L - self.times_LT[:, 0]) / step_L)
        crossing_L = (at_L >= 1) & (at_L < self.times_LT.shape[1] - 2)
        line_C, at_C = crossing_L.nonzero()[:, 0], at_L[crossing_L].long()
        bent_C = self.turns_LT[line_C, at_C - 1] | self.turns_LT[line_C, at_C]
        bent_C = bent_C[~(self.flat_LT[line_C, at_C - 1] & self.flat_LT[line_C, at_C])]
        return float(bent_C.double().mean()) if len(bent_C) else 0.0


def random_lines(rank: int, reach: float, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two ends [L, R] of random lines of half length `reach` through the probes' centre."""
    middle_LR = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    direction_LR = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    half_LR = reach * torch.nn.functional.normalize(direction_LR, dim=1)
    return middle_LR - half_LR, middle_LR + half_LR


def scan(answer: Answer, from_LR: Tensor, to_LR: Tensor, noise: float) -> Lines:
    """Bends of `answer` (z[..., R] -> y[..., O]) on the lines between two ends each.

    Only bends with straight pieces on both sides on the grid are kept: the pieces meet in one point, which one query
    confirms. The normal is the right singular vector of the gradients' jump, which has rank one at a clean bend. Takes
    GRID queries a line and about 4 R a bend.
    """
    length_L1 = (to_LR - from_LR).norm(dim=1, keepdim=True)
    direction_LR = (to_LR - from_LR) / length_L1
    times_LT = length_L1 * torch.linspace(0, 1, GRID, dtype=torch.float64)
    step_L = times_LT[:, 1]
    y_LTO = answer(from_LR[:, None] + times_LT[..., None] * direction_LR[:, None])
    noise_L = (1e-16 * y_LTO.abs().amax(dim=(1, 2))).clamp(min=noise)
    slopes_LTO = torch.diff(y_LTO, dim=1) / step_L[:, None, None]
    turns_LT = torch.diff(slopes_LTO, dim=1).abs().amax(2) > BEND_MARGIN * (noise_L / step_L)[:, None]
    flat_LT = (
        torch.maximum(slopes_LTO[:, :-1].abs(), slopes_LTO[:, 1:].abs()).amax(2) * step_L[:, None] <= noise_L[:, None]
    )
    # interval i + 2, between grid points i + 2 and i + 3, bends while its neighbours are straight and differ in slope
    alone_LT = ~turns_LT[:, :-3] & turns_LT[:, 1:-2] & turns_LT[:, 2:-1] & ~turns_LT[:, 3:]
    alone_LT &= (slopes_LTO[:, 3:-1] - slopes_LTO[:, 1:-3]).abs().amax(2) > BEND_MARGIN * (noise_L / step_L)[:, None]
    line_S, at_S = alone_LT.nonzero().T
    at_S = at_S + 2
    noise_S, step_S1 = noise_L[line_S], step_L[line_S, None]
    before_SO, after_SO = slopes_LTO[line_S, at_S - 1], slopes_LTO[line_S, at_S + 1]
    y_SO, next_SO = y_LTO[line_S, at_S], y_LTO[line_S, at_S + 1]
    jump_SO = before_SO - after_SO  # y + before t = next + after (t - step), by least squares over the outputs
    t_S = ((next_SO - y_SO - after_SO * step_S1) * jump_SO).sum(1) / jump_SO.square().sum(1)
    points_SR = from_LR[line_S] + (times_LT[line_S, at_S] + t_S)[:, None] * direction_LR[line_S]
    miss_S = (answer(points_SR) - y_SO - before_SO * t_S[:, None]).abs().amax(1)
    beside_SR = BESIDE * step_S1 * direction_LR[line_S]
    left_SOR, straight_S = _gradients(answer, points_SR - beside_SR, STEP * step_S1, noise_S)
    right_SOR, too_S = _gradients(answer, points_SR + beside_SR, STEP * step_S1, noise_S)
    _, values, vectors = torch.linalg.svd(right_SOR - left_SOR, full_matrices=False)
    clean_S = straight_S & too_S & (miss_S <= MEETING_MARGIN * noise_S)
    if values.shape[1] > 1:
        clean_S &= values[:, 1] < PURE * values[:, 0]
    found = (points_SR[clean_S], vectors[clean_S, 0], line_S[clean_S])
    return Lines(from_LR, direction_LR, times_LT, turns_LT, flat_LT, *found)


def _gradients(answer: Answer, z_SR: Tensor, step_S1: Tensor, noise_S: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [S, O, R] by central differences, and whether the black box is straight there."""
    most = max(1, AT_ONCE // z_SR.shape[1] ** 2)
    parts = [
        _central_differences(answer, *part)
        for part in zip(z_SR.split(most), step_S1.split(most), noise_S.split(most), strict=True)
    ]
    return torch.cat([gradients for gradients, _ in parts]), torch.cat([straight for _, straight in parts])


def _central_differences(answer: Answer, z_SR: Tensor, step_S1: Tensor, noise_S: Tensor) -> tuple[Tensor, Tensor]:
    moves_SRR = step_S1[:, None] * torch.eye(z_SR.shape[1], dtype=torch.float64)
    center_S1O, up, down = answer(z_SR)[:, None], answer(z_SR[:, None] + moves_SRR), answer(z_SR[:, None] - moves_SRR)
    straight_S = (up + down - 2 * center_S1O).abs().amax(dim=(1, 2)) <= BEND_MARGIN * noise_S
    return ((up - down) / (2 * step_S1[:, None])).transpose(1, 2), straight_S
