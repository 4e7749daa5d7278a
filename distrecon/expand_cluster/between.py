"""Layers between the first and the last of relu and leaky_relu networks, from the same bends as these.

With the layers before it known and signed, a layer shows as the second one does (hyperplanes.py): the normal at a bend
is a combination of the derivatives of the last known pre-activations, gated by who is active there. Those of a deeper
layer change wherever a neuron of this layer switches, so what belongs to this layer is told by its surface: lines bend
wherever they cross it. A neuron's sign does not show at its own bends, but at those of deeper layers, whose normals are
combinations of active neurons' derivatives alone.

Legend: S bends, L lines, T grid points of a line, R relevant input directions, H hidden (of the last known layer),
K = H + 1, N neurons of the layer looked for.
"""

import torch
from torch import Tensor

from distrecon.expand_cluster.bends import Lines
from distrecon.expand_cluster.hyperplanes import Row, shown_rows
from distrecon.expand_cluster.thresholds import CROSSED, LEAST_LINES, SAME
from distrecon.nets.activations import Activation

STARTS, WITNESSES = 8, 300  # of the search for signs, and the bends that it looks at


def passed(layers: list[Tensor], z_SR: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Pre-activations u[S, H] of the last of some layers [H, K], and their derivatives [S, H, R], at points z."""
    first_HK, *others = layers
    u_SH = z_SR @ first_HK[:, :-1].T + first_HK[:, -1]
    derivative_SHR = first_HK[:, :-1].expand(len(z_SR), -1, -1)
    for layer_HK in others:
        derivative_SHR = layer_HK[:, :-1] @ (activation.derivative(u_SH)[:, :, None] * derivative_SHR)
        u_SH = activation(u_SH) @ layer_HK[:, :-1].T + layer_HK[:, -1]
    return u_SH, derivative_SHR


def rows_behind(lines: Lines, layers: list[Tensor], activation: Activation) -> list[Row]:
    """What the bends show of the neurons behind some layers, those that most bends show first."""
    points_SR, normals_SR = _elsewhere(lines, layers, activation)
    u_SH, derivative_SHR = passed(layers, points_SR, activation)
    slope_SH = activation.derivative(u_SH)
    active_SHR = slope_SH[:, :, None] * derivative_SHR
    row_SH, told_S = _combinations(active_SHR, normals_SR)
    points_SR, row_SH, u_SH, seen_SH = points_SR[told_S], row_SH[told_S], u_SH[told_S], slope_SH[told_S] > 0
    return shown_rows(points_SR, row_SH, u_SH, seen_SH, activation)


def layer_behind(
    lines: Lines, layers: list[Tensor], activation: Activation, generator: torch.Generator
) -> Tensor | None:
    """The neurons [N, K] of the layer behind some layers, with their signs; None where no neuron shows as a whole."""
    rows = [row for row in rows_behind(lines, layers, activation) if row.complete and len(row.points_SR) >= LEAST_LINES]
    if not rows:
        return None
    candidates_NK = torch.stack([row.vector_K for row in rows])
    neurons_NK = candidates_NK[_bent_share(lines, layers, candidates_NK, activation) >= CROSSED]
    if not len(neurons_NK):
        return None
    return neurons_NK * neurons_signs(lines, layers, neurons_NK, activation, generator)[:, None]


def _elsewhere(lines: Lines, layers: list[Tensor], activation: Activation) -> tuple[Tensor, Tensor]:
    """Points and normals [S, R] of the bends that are none of these layers'."""
    other_S = torch.ones(len(lines.points_SR), dtype=torch.bool)
    for known in range(1, len(layers) + 1):
        u_SH, derivative_SHR = passed(layers[:known], lines.points_SR, activation)
        size_SH = derivative_SHR.norm(dim=2) * (1 + lines.points_SR.norm(dim=1, keepdim=True))
        other_S &= (u_SH.abs() > SAME * size_SH).all(1)
    return lines.points_SR[other_S], lines.normals_SR[other_S]


def _combinations(parts_SHR: Tensor, normals_SR: Tensor) -> tuple[Tensor, Tensor]:
    """m[S, H] with normal = m parts, 0 for parts that are 0; and where there is one alone, [S]."""
    m_SH = (torch.linalg.pinv(parts_SHR.transpose(1, 2), rtol=SAME) @ normals_SR[:, :, None])[:, :, 0]
    rest_S = ((m_SH[:, None] @ parts_SHR)[:, 0] - normals_SR).norm(dim=1)
    values_SH = torch.linalg.svdvals(parts_SHR)
    rank_S = (values_SH > SAME * values_SH[:, :1]).sum(1)
    return m_SH, (rest_S < SAME) & (rank_S == (parts_SHR != 0).any(2).sum(1)) & (rank_S > 0)


def _bent_share(lines: Lines, layers: list[Tensor], neurons_NK: Tensor, activation: Activation) -> Tensor:
    """Share [N] of the places where lines cross a neuron's surface, and are not constant, at which they bend."""
    bent_LT = lines.turns_LT[:, :-1] | lines.turns_LT[:, 1:]  # between inner grid points
    seen_LT = ~(lines.flat_LT[:, :-1] & lines.flat_LT[:, 1:])
    crossed_N, bent_N = torch.zeros(2, len(neurons_NK), dtype=torch.float64)
    for line in range(len(lines.start_LR)):
        z_TR = lines.start_LR[line] + lines.times_LT[line, 1:-1, None] * lines.direction_LR[line]
        u_TH, _ = passed(layers, z_TR, activation)
        side_TN = activation(u_TH) @ neurons_NK[:, :-1].T + neurons_NK[:, -1] > 0
        crossed_TN = (side_TN[1:] != side_TN[:-1]) & seen_LT[line, :, None]
        crossed_N += crossed_TN.sum(0)
        bent_N += (crossed_TN & bent_LT[line, :, None]).sum(0)
    return bent_N / crossed_N.clamp(min=1)


def neurons_signs(
    lines: Lines, layers: list[Tensor], neurons_NK: Tensor, activation: Activation, generator: torch.Generator
) -> Tensor:
    """Signs [N] for which deeper normals are combinations of active neurons' derivatives, at most bends.

    One sign after the other is turned while that helps, from several starts.
    """
    points_SR, normals_SR = _elsewhere(lines, [*layers, neurons_NK], activation)
    chosen = torch.randperm(len(points_SR), generator=generator)[:WITNESSES]
    points_SR, normals_SR = points_SR[chosen], normals_SR[chosen]
    u_SN, derivative_SNR = passed([*layers, neurons_NK], points_SR, activation)

    def contradicted(sign_N: Tensor) -> int:
        parts_SNR = activation.derivative(u_SN * sign_N)[:, :, None] * derivative_SNR
        m_SN = (torch.linalg.pinv(parts_SNR.transpose(1, 2), rtol=SAME) @ normals_SR[:, :, None])[:, :, 0]
        return int((((m_SN[:, None] @ parts_SNR)[:, 0] - normals_SR).norm(dim=1) > SAME).sum())

    best_N, fewest = torch.ones(len(neurons_NK)).double(), len(normals_SR) + 1
    for _ in range(STARTS):
        sign_N = torch.randint(2, (len(neurons_NK),), generator=generator).double() * 2 - 1
        count, better = contradicted(sign_N), True
        while better:
            better = False
            for i in range(len(sign_N)):
                turned_N = sign_N.clone()
                turned_N[i] *= -1
                if (less := contradicted(turned_N)) < count:
                    sign_N, count, better = turned_N, less, True
        if count < fewest:
            best_N, fewest = sign_N, count
    return best_N
