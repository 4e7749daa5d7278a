"""Layers of relu and leaky_relu networks in their bends: no training, close to machine precision.

A piecewise linear network bends on hyperplanes. Those of the first layer run straight through the whole input space, so
most lines cross them, with the same normal everywhere; those of deeper layers turn at every hyperplane before them. So
the bends met on many random lines are clustered like students' neurons, with lines in the students' place: a hyperplane
that the lines find wherever they cross it is a first-layer neuron. At any other bend the normal is a combination of the
first layer's weights, gated by who is active there: that gives the neurons' signs, and up to scale the second-layer
neuron's row, as far as it shows there; the partial rows of one neuron are joined. Compare Rolnick and Kording
(arXiv 1910.00744) and Carlini, Jagielski, Mironov (arXiv 2003.04884). What is found is a start only: it is fitted and
verified like students.

Legend: S bends, R relevant input directions, H hidden, K = R + 1 (of the second layer: H + 1).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.bends import Lines
from distrecon.expand_cluster.neurons import LayerClustering, average_linkage, members
from distrecon.expand_cluster.thresholds import CROSSED, LEAST_COMMON, LEAST_LINES, SAME, SAME_IN_TWO
from distrecon.nets.activations import Activation

MOST_BENDS = 16_000  # that are clustered: their V (V - 1) / 2 distances, and a copy of these, take 2 GiB


@dataclass(frozen=True)
class Row:
    """A neuron of the second layer, [weights, bias] up to scale and sign (0 where unknown), and its bends."""

    vector_K: Tensor
    complete: bool
    points_SR: Tensor


def first_layer(lines: Lines) -> tuple[Tensor, LayerClustering]:
    """Hyperplanes [H, K] that run straight through, their signs still open, and the clustering that shows them.

    Of more than MOST_BENDS every n-th bend is clustered; these still come from every line.
    """
    every = max(1, math.ceil(len(lines.line_S) / MOST_BENDS))
    planes_SK, line_S = lines.planes_SK[::every], lines.line_S.numpy()[::every]
    merges = average_linkage(planes_SK, "scaled")
    kept, rows = [], []
    for group in members(merges, SAME):
        signed = planes_SK[group] * torch.sign(planes_SK[group] @ planes_SK[group[0]])[:, None]
        plane_K = torch.nn.functional.normalize(signed.median(0).values, dim=0)
        if len(set(line_S[group].tolist())) >= LEAST_LINES and lines.bent_share(plane_K) >= CROSSED:
            kept.append(group)
            rows.append(plane_K)
    neurons_HK = torch.stack(rows) if rows else planes_SK[:0]
    return neurons_HK, LayerClustering(planes_SK, line_S, merges, SAME, kept, True)


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
    return first_HK, shown_rows(points_SR, row_SH, u_SH, seen_SH, activation)


def shown_rows(points_SR: Tensor, row_SH: Tensor, u_SH: Tensor, seen_SH: Tensor, activation: Activation) -> list[Row]:
    """What bends at points [S, R] show of the next layer's neurons, those that most bends show first: weights [S, H] up
    to their size, where they were seen [S, H], and the pre-activations u [S, H] that they read."""
    offset_S1 = -(row_SH * activation(u_SH)).sum(1, keepdim=True)
    rows_SK = torch.cat([row_SH, offset_S1], dim=1)
    seen_SK = torch.cat([seen_SH, torch.ones_like(seen_SH[:, :1])], dim=1)
    joined = [
        Row(vector_K, bool(seen_SK[group].any(0).all()), points_SR[group])
        for vector_K, group in join_rows(rows_SK, seen_SK)
    ]
    return sorted(joined, key=lambda row: -len(row.points_SR))


def join_rows(rows_SK: Tensor, seen_SK: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Vectors [K] of which every row shows some coordinates, up to scale and sign, each with the rows that show it.

    A row joins a vector when both are parallel in at least LEAST_COMMON coordinates that they share, or very nearly in
    the last and one more.
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
            many_S = common_SK.sum(1) >= LEAST_COMMON
            two_S = (common_SK.sum(1) == 2) & common_SK[:, -1]
            fits_S = free_S & (many_S | two_S) & (own_S * theirs_S > 0)
            same_S = torch.where(many_S, SAME, SAME_IN_TWO)
            fits_S &= own_S * theirs_S - dot_S.square() <= same_S**2 * own_S * theirs_S
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
