"""Kinks as the weights of units: which position explains one, which are one unit's, and a layer of them.

Legend: S kinks, I inputs, O outputs, C channels, K numbers that a channel reads, L positions, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from distrecon.expand_cluster.convolution.hypothesis import Hypothesis, Stage
from distrecon.expand_cluster.convolution.network import ConvNet

READ = 1e-6  # relative residual of a normal as a position's weights
RIDGE = 1e-9  # of a Gram matrix's trace, where positions are compared
EXPLAINED = 0.99  # of a normal squared, at positions that are looked at closely
STEEP = 1e-4  # of the largest singular value of what a position reads: smaller ones leave weights undetermined
SAME_ROW = 1e-7  # 1 - cosine of two rows of one channel, over the weights they share
SHARED = 5  # weights that two rows must share
KNOWN = 0.5  # share of a channel's weights that must be seen


@dataclass(frozen=True)
class Kinks:
    """Points x[S, I] of kinks of layers behind the known ones, their unit normals [S, I], and by how much the outputs'
    slope along the normal grows there [S, O]."""

    x_SI: Tensor
    normal_SI: Tensor
    jump_SO: Tensor


@dataclass(frozen=True)
class Layer:
    """[weights, bias] of the channels of a layer, up to sign and size, [C, K + 1], which of the weights were seen
    [C, K] (the others are 0), points at which each bends, and what each adds to the outputs at every position if it is
    of the last hidden layer [C, L, O] (NaN where that was not seen)."""

    matrix_CK: Tensor
    seen_CK: Tensor
    bends_CSI: list[Tensor]
    outgoing_CLO: Tensor


def read_jacobians(
    net: ConvNet, theta_P: Tensor, hypothesis: Hypothesis, x_SI: Tensor, linear: bool = False
) -> tuple[Tensor, Tensor]:
    """What the next layer reads at its positions, [S, K, L], and the derivatives of that, [S, I, K, L].

    `linear`: as if the last known layer had no activation.
    """
    stage, passed = hypothesis.stages[len(net.widths)], net.trace(theta_P, x_SI)
    if linear:
        last = passed[-1]
        plain = last.before_QCL.unflatten(2, net.hypothesis.stages[-1].before)
        passed[-1] = replace(last, before_QCL=torch.ones_like(last.before_QCL), after=plain)
    eye_FF = torch.eye(net.num_features, dtype=torch.float64)
    jacobian_SFI = torch.cat(
        [net.input_jacobian(theta_P, [p[i : i + 1] for p in passed], eye_FF) for i in range(len(x_SI))]
    )
    maps = jacobian_SFI.transpose(1, 2).flatten(0, 1).unflatten(1, passed[-1].after.shape[1:])
    unfolded = F.unfold(maps, stage.kernel, padding=stage.padding, stride=stage.stride)
    read_SKL = F.unfold(passed[-1].after, stage.kernel, padding=stage.padding, stride=stage.stride)
    return read_SKL, unfolded.unflatten(0, (len(x_SI), -1))


class Rows:
    """Kinks as weights of units: unit rows [K] with the mask of what was active, points, and biases."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.rows: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.points: list[Tensor] = []
        self.biases: list[float] = []
        self.outgoing: list[tuple[int, Tensor]] = []

    def add(self, net: ConvNet, theta_P: Tensor, hypothesis: Hypothesis, kinks: Kinks) -> None:
        """Each kink as the weights of a unit at the position that explains its normal best, where one does."""
        if not len(kinks.x_SI):
            return
        read_SKL, jacobian_SIKL = read_jacobians(net, theta_P, hypothesis, kinks.x_SI)
        for number, normal_I in enumerate(kinks.normal_SI):
            x_I, read_KL = kinks.x_SI[number], read_SKL[number]
            row_K, active_K, position = row_at_best(jacobian_SIKL[number], normal_I, READ)
            if position >= 0:
                size = row_K.norm()
                self.rows.append(row_K / size)
                self.masks.append(active_K)
                self.points.append(x_I)
                self.biases.append(-float(row_K @ read_KL[:, position] / size))
                self.outgoing.append((position, kinks.jump_SO[number] * size))

    def layer(self) -> Layer | None:
        """The channels that are shown twice; None where there is none."""
        if len(self.rows) < 2:
            return None
        channels, found = same_channel(torch.stack(self.rows), torch.stack(self.masks)), list[tuple[Tensor, ...]]()
        for members in (np.flatnonzero(channels == channel) for channel in range(int(channels.max()) + 1)):
            if len(members) > 1:
                row_K, mask_K, outgoing_LO = self.joined(members)
                if mask_K.double().mean() > KNOWN:
                    found.append((row_K, mask_K, torch.stack([self.points[i] for i in members]), outgoing_LO))
        if not found:
            return None
        matrices, masks, points, outgoing = zip(*found, strict=True)
        return Layer(torch.stack(matrices), torch.stack(masks), list(points), torch.stack(outgoing))

    def joined(self, members: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """A channel's [weights, bias] [K + 1], which weights are known [K], and what it adds to the outputs [L, O]."""
        order = sorted(members, key=lambda i: -int(self.masks[i].sum()))
        row_K, mask_K = self.rows[order[0]].clone(), self.masks[order[0]].clone()
        rows, biases, outgoing = list[Tensor](), list[float](), list[tuple[int, Tensor]]()
        for i in order:
            shared_K = mask_K & self.masks[i]
            if int(shared_K.sum()) < SHARED:
                continue
            factor = float(row_K[shared_K] @ self.rows[i][shared_K] / self.rows[i][shared_K].square().sum())
            new_K = self.masks[i] & ~mask_K
            row_K[new_K] = factor * self.rows[i][new_K]
            mask_K |= self.masks[i]
            rows.append(torch.where(self.masks[i], factor * self.rows[i], torch.nan))
            biases.append(factor * self.biases[i])
            outgoing.append((self.outgoing[i][0], self.outgoing[i][1] / abs(factor)))
        row_K = torch.stack(rows).nanmedian(0).values.nan_to_num(0.0)  # single ones may be badly conditioned
        positions = self.stage.before[0] * self.stage.before[1]
        outgoing_LO = row_K.new_full((positions, len(outgoing[0][1])), torch.nan)
        for position in {position for position, _ in outgoing}:
            outgoing_LO[position] = torch.stack([o for p, o in outgoing if p == position]).median(0).values
        return torch.cat([row_K, row_K.new_tensor([np.median(biases)])]), mask_K, outgoing_LO


def row_at_best(jacobian_IKL: Tensor, normal_I: Tensor, allowed: float) -> tuple[Tensor, Tensor, int]:
    """Weights [K] of a unit at the position that explains a normal best, which of them can be told [K], and that
    position; -1 where every one leaves more than `allowed`."""
    gram_LKK = torch.einsum("ikl,ijl->lkj", jacobian_IKL, jacobian_IKL)
    trace_L = gram_LKK.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-300)
    gram_LKK = gram_LKK + RIDGE * trace_L[:, None, None] * torch.eye(gram_LKK.shape[1], dtype=torch.float64)
    right_LK = torch.einsum("ikl,i->lk", jacobian_IKL, normal_I)
    explained_L = (right_LK * torch.linalg.solve(gram_LKK, right_LK)).sum(1)
    for position in explained_L.argsort(descending=True).tolist():
        if explained_L[position] < EXPLAINED:
            break
        row_K, active_K, residual = row_of(jacobian_IKL[:, :, position], normal_I)
        if residual < allowed:
            return row_K, active_K, position
    return torch.zeros_like(right_LK[0]), torch.zeros_like(right_LK[0], dtype=torch.bool), -1


def row_of(matrix_IK: Tensor, normal_I: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weights [K] that explain a normal, which of them can be told, and what is left (infinite if they cannot)."""
    active_K = matrix_IK.abs().amax(0) > 0
    row_K = torch.zeros(len(active_K), dtype=torch.float64)
    if not 0 < int(active_K.sum()) < len(normal_I):
        return row_K, active_K, torch.inf
    left, values, right = torch.linalg.svd(matrix_IK[:, active_K], full_matrices=False)
    if values[-1] < STEEP * values[0]:
        return row_K, active_K, torch.inf
    row_K[active_K] = right.T @ ((left.T @ normal_I) / values)
    return row_K, active_K, float((matrix_IK @ row_K - normal_I).norm())


def same_channel(rows_SK: Tensor, masks_SK: Tensor) -> np.ndarray:
    """[S]: which rows are one channel's, over the weights they share."""
    masks = masks_SK.double()
    power_SS, shared_SS = rows_SK.square() @ masks.T, masks @ masks.T
    cosine_SS = (rows_SK @ rows_SK.T).square() / (power_SS * power_SS.T).clamp(min=1e-300)
    enough_SS = (shared_SS >= SHARED) & (torch.minimum(power_SS, power_SS.T) > 0.1)
    same_SS = enough_SS & (1 - cosine_SS < SAME_ROW)
    return connected_components(same_SS.numpy(), directed=False)[1]


def places(stage: Stage, map_shape: tuple[int, int, int]) -> Tensor:
    """[K, L]: which number of the map, from 1, every position reads; 0 is padding."""
    channels, height, width = map_shape
    numbers = torch.arange(1, channels * height * width + 1, dtype=torch.float64).view(1, *map_shape)
    return F.unfold(numbers, stage.kernel, padding=stage.padding, stride=stage.stride)[0].round().long()
