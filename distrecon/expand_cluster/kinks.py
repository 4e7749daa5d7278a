"""Layers of relu and leaky_relu networks from where the black box bends: no training, close to machine precision.

A piecewise linear network bends on hyperplanes. Those of the first layer run straight through the whole input space, so
most lines cross them, with the same normal everywhere; those of deeper layers turn at every hyperplane before them. So
the bends met on many random lines are clustered like students' neurons, with lines in the students' place: a hyperplane
that the lines find wherever they cross it is a first-layer neuron. At any other bend the normal is a combination of the
first layer's weights, gated by who is active there: that tells the neurons' signs, and up to scale the second-layer
neuron's row, as far as it shows there; the partial rows of one neuron are joined. Compare Rolnick and Kording
(arXiv 1910.00744) and Carlini, Jagielski, Mironov (arXiv 2003.04884). What is found is a start only: it is fitted and
verified like students.

Legend: L lines, T grid points of a line, S bends, R relevant input directions, H hidden, O outputs, K = R + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.expand_cluster.clustering import LayerClustering, average_linkage, mean_cosine, members
from distrecon.nets.activations import Activation

GRID = 1200  # grid points a line
BESIDE = 0.3  # of a grid step: how far from a bend its two gradients are taken
STEP = 1e-2  # of a grid step: of the gradients' differences
NOISE_MARGIN = 100.0  # differences above this many times the rounding noise are bends
PURE = 1e-6  # ratio of the second to the first singular value of a clean bend's jump
SAME = 1e-5  # distance of unit vectors that are one hyperplane, or one row
LEAST_COMMON = 3  # coordinates that two partial rows must share to be compared
LEAST_LINES = 3  # distinct lines that must find a first-layer hyperplane
STRAIGHT = 0.95  # share of the lines crossing it that must bend there

Ask = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lines:
    """Lines z = start + t direction and where they bend.

    `turns_LT` says whether a line turns at an inner grid point, `flat_LT` whether it is constant there (relu networks
    are, where all of a layer is off); `points_SR`, unit `normals_SR` and `line_S` describe
    the bends that were found cleanly.
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

    def seen(self, plane_K: Tensor) -> float:
        """Share of the lines that turn where they cross a hyperplane, constant places aside; 0 when none crosses it."""
        t_L = -(self.start_LR @ plane_K[:-1] + plane_K[-1]) / (self.direction_LR @ plane_K[:-1])
        step_L = self.times_LT[:, 1] - self.times_LT[:, 0]
        at_L = torch.floor((t_L - self.times_LT[:, 0]) / step_L)
        crossing_L = (at_L >= 1) & (at_L < self.times_LT.shape[1] - 2)
        line_C, at_C = crossing_L.nonzero()[:, 0], at_L[crossing_L].long()
        seen_C = self.turns_LT[line_C, at_C - 1] | self.turns_LT[line_C, at_C]
        seen_C = seen_C[~(self.flat_LT[line_C, at_C - 1] & self.flat_LT[line_C, at_C])]
        return float(seen_C.double().mean()) if len(seen_C) else 0.0


@dataclass(frozen=True)
class Row:
    """A neuron of the second layer, [weights, bias] up to scale and sign (0 where unknown), and its bends."""

    vector_K: Tensor
    complete: bool
    points_SR: Tensor


def random_lines(rank: int, reach: float, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The two ends [L, R] of random lines of half length `reach` through the probes' centre."""
    middle_LR = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    direction_LR = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    half_LR = reach * torch.nn.functional.normalize(direction_LR, dim=1)
    return middle_LR - half_LR, middle_LR + half_LR


def scan(ask: Ask, from_LR: Tensor, to_LR: Tensor, noise: float) -> Lines:
    """Bends of `ask` (z[..., R] -> y[..., O]) on the lines between two ends each.

    Only bends with straight pieces on both sides on the grid are kept: the pieces meet in one point, which one query
    confirms. The normal is the right singular vector of the gradients' jump, which has rank one at a clean bend. Takes
    GRID queries a line and about 4 R a bend.
    """
    length_L1 = (to_LR - from_LR).norm(dim=1, keepdim=True)
    direction_LR = (to_LR - from_LR) / length_L1
    times_LT = length_L1 * torch.linspace(0, 1, GRID, dtype=torch.float64)
    step_L = times_LT[:, 1]
    y_LTO = ask(from_LR[:, None] + times_LT[..., None] * direction_LR[:, None])
    noise_L = (1e-16 * y_LTO.abs().amax(dim=(1, 2))).clamp(min=noise)
    slopes_LTO = torch.diff(y_LTO, dim=1) / step_L[:, None, None]
    turns_LT = torch.diff(slopes_LTO, dim=1).abs().amax(2) > NOISE_MARGIN * (noise_L / step_L)[:, None]
    flat_LT = (
        torch.maximum(slopes_LTO[:, :-1].abs(), slopes_LTO[:, 1:].abs()).amax(2) * step_L[:, None] <= noise_L[:, None]
    )
    # interval i + 2, between grid points i + 2 and i + 3, bends while its neighbours are straight and differ in slope
    alone_LT = ~turns_LT[:, :-3] & turns_LT[:, 1:-2] & turns_LT[:, 2:-1] & ~turns_LT[:, 3:]
    alone_LT &= (slopes_LTO[:, 3:-1] - slopes_LTO[:, 1:-3]).abs().amax(2) > NOISE_MARGIN * (noise_L / step_L)[:, None]
    line_S, at_S = alone_LT.nonzero().T
    at_S = at_S + 2
    noise_S, step_S1 = noise_L[line_S], step_L[line_S, None]
    before_SO, after_SO = slopes_LTO[line_S, at_S - 1], slopes_LTO[line_S, at_S + 1]
    y_SO, next_SO = y_LTO[line_S, at_S], y_LTO[line_S, at_S + 1]
    jump_SO = before_SO - after_SO  # y + before t = next + after (t - step), by least squares over the outputs
    t_S = ((next_SO - y_SO - after_SO * step_S1) * jump_SO).sum(1) / jump_SO.square().sum(1)
    points_SR = from_LR[line_S] + (times_LT[line_S, at_S] + t_S)[:, None] * direction_LR[line_S]
    miss_S = (ask(points_SR) - y_SO - before_SO * t_S[:, None]).abs().amax(1)
    beside_SR = BESIDE * step_S1 * direction_LR[line_S]
    left_SOR, straight_S = _gradients(ask, points_SR - beside_SR, STEP * step_S1, noise_S)
    right_SOR, too_S = _gradients(ask, points_SR + beside_SR, STEP * step_S1, noise_S)
    _, values, vectors = torch.linalg.svd(right_SOR - left_SOR, full_matrices=False)
    clean_S = straight_S & too_S & (miss_S <= 10 * NOISE_MARGIN * noise_S)
    if values.shape[1] > 1:
        clean_S &= values[:, 1] < PURE * values[:, 0]
    found = (points_SR[clean_S], vectors[clean_S, 0], line_S[clean_S])
    return Lines(from_LR, direction_LR, times_LT, turns_LT, flat_LT, *found)


def _gradients(ask: Ask, z_SR: Tensor, step_S1: Tensor, noise_S: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [S, O, R] by central differences, and whether the black box is straight there."""
    moves_SRR = step_S1[:, None] * torch.eye(z_SR.shape[1], dtype=torch.float64)
    center_S1O, up, down = ask(z_SR)[:, None], ask(z_SR[:, None] + moves_SRR), ask(z_SR[:, None] - moves_SRR)
    straight_S = (up + down - 2 * center_S1O).abs().amax(dim=(1, 2)) <= NOISE_MARGIN * noise_S
    return ((up - down) / (2 * step_S1[:, None])).transpose(1, 2), straight_S


def first_layer(lines: Lines) -> tuple[Tensor, LayerClustering]:
    """Hyperplanes [H, K] that run straight through, their signs still open, and the clustering that shows them."""
    planes_SK, line_S = lines.planes_SK, lines.line_S.numpy()
    merges = average_linkage(planes_SK, "scaled")
    kept, rows, alignment = [], [], []
    for group in members(merges, SAME):
        signed = planes_SK[group] * torch.sign(planes_SK[group] @ planes_SK[group[0]])[:, None]
        plane_K = torch.nn.functional.normalize(signed.median(0).values, dim=0)
        if len(set(line_S[group].tolist())) >= LEAST_LINES and lines.seen(plane_K) >= STRAIGHT:
            kept.append(group)
            rows.append(plane_K)
            alignment.append(mean_cosine(signed.sum(0).numpy(), len(group)))
    neurons_HK = torch.stack(rows) if rows else planes_SK[:0]
    numbers = np.arange(len(line_S))
    return neurons_HK, LayerClustering(planes_SK, line_S, numbers, merges, SAME, kept, alignment, 0.0, True)


def second_layer(lines: Lines, first_HK: Tensor, activation: Activation) -> tuple[Tensor, list[Row]]:
    """The first layer [H, K] with its signs, and the second layer's rows, those that most bends show first.

    Needs linearly independent first-layer weights: the normals at bends that are not the first layer's are combinations
    `m` of them, with m_h = a_h f'(u_h).
    """
    unit_SK = lines.planes_SK
    own_SH = 1 - (unit_SK @ torch.nn.functional.normalize(first_HK, dim=1).T).abs()
    rest_S = own_SH.min(1).values > 10 * SAME**2
    points_SR, normals_SR = lines.points_SR[rest_S], lines.normals_SR[rest_S]
    weights_HR = first_HK[:, :-1]
    m_SH = normals_SR @ torch.linalg.pinv(weights_HR)
    u_SH = points_SR @ weights_HR.T + first_HK[:, -1]
    flips_H = (m_SH.square() * (u_SH < 0)).sum(0) > (m_SH.square() * (u_SH > 0)).sum(0)
    sign_H = torch.where(flips_H, -1.0, 1.0).double()
    first_HK, m_SH, u_SH = first_HK * sign_H[:, None], m_SH * sign_H, u_SH * sign_H
    slope_SH = activation.derivative(u_SH)
    seen_SH = slope_SH > 0
    row_SH = torch.where(seen_SH, m_SH / slope_SH.clamp(min=1e-300), 0.0)
    offset_S1 = -(row_SH * activation(u_SH)).sum(1, keepdim=True)
    rows_SK = torch.cat([row_SH, offset_S1], dim=1)
    seen_SK = torch.cat([seen_SH, torch.ones_like(seen_SH[:, :1])], dim=1)
    joined = [
        Row(vector_K, bool(seen_SK[group].any(0).all()), points_SR[group])
        for vector_K, group in join_rows(rows_SK, seen_SK)
    ]
    return first_HK, sorted(joined, key=lambda row: -len(row.points_SR))


def join_rows(rows_SK: Tensor, seen_SK: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Vectors [K] of which every row shows some coordinates, up to scale and sign, each with the rows that show it.

    A row joins a vector when both are parallel in at least LEAST_COMMON coordinates that they share.
    """
    rows_SK = torch.nn.functional.normalize(rows_SK, dim=1)
    found, free_S = [], torch.ones(len(rows_SK), dtype=torch.bool)
    for seed in seen_SK.sum(1).argsort(descending=True, stable=True).tolist():
        if not free_S[seed]:
            continue
        vector_K, known_K, group = rows_SK[seed].clone(), seen_SK[seed].clone(), [seed]
        free_S[seed] = False
        while True:
            common_SK = seen_SK & known_K
            dot_S = (rows_SK * common_SK * vector_K).sum(1)
            own_S = (rows_SK * common_SK).square().sum(1)
            theirs_S = (vector_K * common_SK).square().sum(1)
            fits_S = free_S & (common_SK.sum(1) >= LEAST_COMMON)
            fits_S &= own_S * theirs_S - dot_S.square() <= SAME**2 * own_S * theirs_S
            if not fits_S.any():
                break
            for i in fits_S.nonzero()[:, 0].tolist():
                fresh_K = seen_SK[i] & ~known_K
                vector_K[fresh_K] = rows_SK[i][fresh_K] * dot_S[i] / own_S[i]
                known_K |= seen_SK[i]
            group += fits_S.nonzero()[:, 0].tolist()
            free_S &= ~fits_S
        found.append((torch.nn.functional.normalize(vector_K, dim=0), group))
    return found
