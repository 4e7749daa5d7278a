"""Layers of a relu network one after the other, each from the kinks that show it, in the layers before it.

In a region where no unit of the layers found so far changes, what the next layer reads is linear in the inputs, with a
known matrix A at each position. A kink of one of its units there has a normal A^T v, so least squares over the position
gives the unit's weights v, as far as what they read is active; the rows of many kinks that are one channel are joined
over the weights they share. Compare Rolnick and Kording (arXiv 1910.00744), Carlini, Jagielski, Mironov
(arXiv 2003.04884) for dense layers.

Legend: S kinks, Q queries, I inputs, O outputs, C channels, K numbers that a channel reads, L positions, P parameters.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.convolution.filters import Filters
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis, Stage
from distrecon.expand_cluster.convolution.network import ConvNet, Passed
from distrecon.nets.activations import Activation

SEGMENTS = 8_000  # drawn at a time, of which those inside one region of the known layers are asked about
ASKED, EXAMINED = 4000, 300  # of a round, at most: segments, and those whose Jacobians are taken
REACHES = (0.5, 100.0)  # of the segments, in units of the inputs' scale
LENGTHS = (0.5, 0.2, 0.08, 0.03, 0.01, 0.003)  # half lengths over the distance from the centre, in turn
BENDS = 1e-7  # of the answer: second differences above it are kinks
INSIDE, STEP = 0.9, 5e-3  # of a segment's half length: where its Jacobians are taken, and their differences
ALONE = 1e-6  # ratio of the second singular value of the Jacobians' difference to the first, at one kink
READ = 1e-6  # relative residual of a normal as a position's weights
RIDGE = 1e-9  # of a Gram matrix's trace, where positions are compared
EXPLAINED = 0.99  # of a normal squared, at positions that are looked at closely
STEEP = 1e-4  # of the largest singular value of what a position reads: smaller ones leave weights undetermined
SAME_ROW = 1e-7  # 1 - cosine of two rows of one channel, over the weights they share
SHARED = 5  # weights that two rows must share
TARGETED, CLIMBS, CLIMB = 0.7, 12, 0.25  # share of the segments that are moved to where units respond seldom; steps at
# most, and their size over the distance from the centre
LOUD = 0.7  # of those, where a unit is to respond; elsewhere none is
SAMPLE, SELDOM = 2000, 0.02  # inputs at which it is counted how often units respond; rates below which all count alike
ROUNDS, LAST_ROUNDS = 10, 4  # of segments for a layer; for the last hidden one, which residual.py completes
KNOWN = 0.5  # share of a channel's weights that must be seen
SILENT = 1e-6  # of a row's largest coefficient: what does not respond


@dataclass(frozen=True)
class Kinks:
    """Points x[S, I] of kinks of layers behind the known ones, their unit normals [S, I], and by how much the outputs'
    slope along the normal grows there [S, O]."""

    x_SI: Tensor
    normal_SI: Tensor
    jump_SO: Tensor


def pattern(net: ConvNet, passed: list[Passed]) -> Tensor:
    """What tells the linear region of every query: [Q, N] whole numbers."""
    parts = []
    for stage, here in zip(net.hypothesis.stages, passed, strict=True):
        on = here.before_QCL.flatten(1) > 0 if stage.pool == 1 or stage.average else here.after.flatten(1) > 0
        parts.append(on.long())
        if here.taken_QCM is not None:
            parts.append(torch.where(on, here.taken_QCM.flatten(1), -1))
    return torch.cat(parts, dim=1)


def find_kinks(box: BlackBox, net: ConvNet, theta_P: Tensor, unit: float, generator: torch.Generator) -> Kinks:
    """Kinks of one unit behind the layers of `net`, in regions where these are linear."""
    shape = (SEGMENTS, box.inputs)
    low, high = (np.log(unit * reach) for reach in REACHES)
    size_Q1 = (low + (high - low) * torch.rand(SEGMENTS, 1, generator=generator, dtype=torch.float64)).exp()
    x_QI = box.place(size_Q1 * torch.randn(shape, generator=generator, dtype=torch.float64))
    x_QI = _towards_rare(net, theta_P, x_QI, generator)
    move_QI = (
        x_QI.norm(dim=1, keepdim=True) / box.inputs**0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    )
    length_Q1 = torch.zeros(SEGMENTS, 1, dtype=torch.float64)
    for length in LENGTHS:
        ends = [pattern(net, net.trace(theta_P, x_QI + sign * length * move_QI)) for sign in (-1, 1)]
        inside_Q1 = (ends[0] == ends[1]).all(1, keepdim=True) & (length_Q1 == 0)
        length_Q1 = torch.where(inside_Q1, length, length_Q1)
    chosen_Q = (length_Q1[:, 0] > 0).nonzero()[:, 0]
    chosen_Q = chosen_Q[torch.randperm(len(chosen_Q), generator=generator)][:ASKED]
    x_QI, move_QI = x_QI[chosen_Q], (length_Q1 * move_QI)[chosen_Q]
    here_QO, up_QO, down_QO = box(x_QI), box(x_QI + move_QI), box(x_QI - move_QI)
    bends_Q = ((up_QO + down_QO - 2 * here_QO).abs() > BENDS * here_QO.abs().amax(1, keepdim=True)).any(1)
    x_SI, move_SI = x_QI[bends_Q][:EXAMINED], INSIDE * move_QI[bends_Q][:EXAMINED]
    y_2, jacobian_2 = [], []
    for sign in (-1, 1):
        end_SI = x_SI + sign * move_SI
        step_S = STEP * move_SI.norm(dim=1) / box.inputs**0.5
        y_2.append(box(end_SI))
        jacobian_2.append(_jacobians(box, end_SI, step_S))
    jump_SOI = jacobian_2[1] - jacobian_2[0]
    left_SOO, values, right_SOI = torch.linalg.svd(jump_SOI, full_matrices=False)
    alone_S = values[:, 1] < ALONE * values[:, 0] if values.shape[1] > 1 else values[:, 0] > 0
    output_SO = left_SOO[:, :, 0]
    before_S, after_S = ((output_SO * (j @ move_SI[:, :, None])[:, :, 0]).sum(1) for j in jacobian_2)
    low_S, high_S = ((output_SO * y).sum(1) for y in y_2)
    share_S = (high_S - low_S - after_S - before_S) / (before_S - after_S)
    alone_S &= share_S.abs() < 1
    normal_SI = right_SOI[:, 0]
    jump_SO = ((normal_SI * move_SI).sum(1).sign() * values[:, 0])[:, None] * output_SO
    return Kinks((x_SI + share_S[:, None] * move_SI)[alone_S], normal_SI[alone_S], jump_SO[alone_S])


def _towards_rare(net: ConvNet, theta_P: Tensor, x_QI: Tensor, generator: torch.Generator) -> Tensor:
    """Most of the inputs moved to where one unit of the last known layer responds, and the others little.

    Units of the next layer that seldom respond do so there, and weights for units that seldom respond show there.
    """
    count = len(x_QI)
    rate_U = (net.trace(theta_P, x_QI[:SAMPLE])[-1].before_QCL.flatten(1) > 0).double().mean(0)
    steps_Q = torch.randint(CLIMBS + 1, (count,), generator=generator)
    steps_Q[torch.rand(count, generator=generator) > TARGETED] = 0
    target_Q1 = torch.multinomial(1 / (rate_U + SELDOM), count, replacement=True, generator=generator)[:, None]
    quiet_Q = torch.rand(count, generator=generator, dtype=torch.float64)
    loud_Q1 = (torch.rand(count, 1, generator=generator) < LOUD).double()
    size_Q1 = x_QI.norm(dim=1, keepdim=True)
    for step in range(CLIMBS):
        moving_Q = (steps_Q > step).nonzero()[:, 0]
        with torch.enable_grad():
            x_NI = x_QI[moving_Q].requires_grad_()
            last = net.trace(theta_P, x_NI)[-1]
            wanted = last.before_QCL.flatten(1).gather(1, target_Q1[moving_Q]) * loud_Q1[moving_Q]
            unwanted = (last.after.flatten(1).sum(1) * quiet_Q[moving_Q]).sum()
            (slope_NI,) = torch.autograd.grad(wanted.sum() - unwanted, x_NI)
        slope_NI = torch.nn.functional.normalize(slope_NI, dim=1)
        x_QI = x_QI.index_add(0, moving_Q, CLIMB * size_Q1[moving_Q] * slope_NI)
        x_QI = x_QI * size_Q1 / x_QI.norm(dim=1, keepdim=True)
    return x_QI


def _jacobians(box: BlackBox, x_SI: Tensor, step_S: Tensor) -> Tensor:
    """[S, O, I] by central differences, which are exact where the black box is linear."""
    moves_SII = step_S[:, None, None] * torch.eye(box.inputs, dtype=torch.float64)
    up, down = (box((x_SI[:, None] + sign * moves_SII).flatten(0, 1)) for sign in (1, -1))
    return ((up - down).unflatten(0, (len(x_SI), -1)) / (2 * step_S[:, None, None])).transpose(1, 2)


@dataclass(frozen=True)
class Layer:
    """[weights, bias] of the channels of a layer, up to sign and size, [C, K + 1], which of the weights were seen
    [C, K] (the others are 0), points at which each bends, and what each adds to the outputs at every position if it is
    of the last hidden layer [C, L, O] (NaN where that was not seen)."""

    matrix_CK: Tensor
    seen_CK: Tensor
    bends_CSI: list[Tensor]
    outgoing_CLO: Tensor


def first_layer(filters: Filters) -> Layer:
    """Filters from far out as a layer; what follows them is not told."""
    seen_CK = torch.ones_like(filters.first_CK[:, :-1], dtype=torch.bool)
    return Layer(filters.first_CK, seen_CK, filters.bends_CSI, filters.first_CK.new_empty(len(seen_CK), 0, 0))


def next_layer(
    box: BlackBox,
    hypothesis: Hypothesis,
    known: list[Tensor],
    activation: Activation,
    unit: float,
    generator: torch.Generator,
) -> Layer | None:
    """The layer behind the known ones; None where no channel of it is shown twice.

    Where the last known layer is not max-pooled, its signs are settled first (`known` is changed).
    """
    open_signs = hypothesis.stages[len(known) - 1].pool == 1 or hypothesis.stages[len(known) - 1].average
    last = len(known) + 1 == len(hypothesis.stages)
    rows, before, channels = _Rows(), -1, np.empty(0, dtype=int)
    for _ in range(LAST_ROUNDS if last else ROUNDS):
        net, theta_P = known_layers(hypothesis, known, activation)
        kinks = find_kinks(box, net, theta_P, unit, generator)
        if open_signs:
            sign_C = signs_by_next(net, theta_P, hypothesis, kinks)
            if sign_C is None:
                continue
            known[-1], open_signs = sign_C[:, None] * known[-1], False
            net, theta_P = known_layers(hypothesis, known, activation)
        rows.add(net, theta_P, hypothesis, kinks)
        if len(rows.rows) > 1:
            channels = _same_channel(torch.stack(rows.rows), torch.stack(rows.masks))
            count, whole = _complete(channels, torch.stack(rows.masks))
            if count == before and whole:
                break
            before = count
    found = list[tuple[Tensor, Tensor, Tensor, Tensor]]()
    for channel in range(int(channels.max()) + 1 if len(channels) else 0):
        members = np.flatnonzero(channels == channel)
        if len(members) > 1:
            row_K, mask_K, outgoing_LO = rows.joined(members, hypothesis.stages[len(known)])
            if mask_K.double().mean() > KNOWN:
                found.append((row_K, mask_K, torch.stack([rows.points[i] for i in members]), outgoing_LO))
    if not found:
        return None
    matrices, masks, points, outgoing = zip(*found, strict=True)
    return Layer(torch.stack(matrices), torch.stack(masks), list(points), torch.stack(outgoing))


def signs_by_pooling(net: ConvNet, theta_P: Tensor, bends_CSI: list[Tensor]) -> Tensor:
    """+1 or -1 for every channel of the last layer of `net` [C], which is max-pooled, from points where it bends.

    There the unit is zero at one position, and at the others of its window it must be below, or it would not show.
    """
    stage, signs = net.hypothesis.stages[-1], []
    for channel, x_SI in enumerate(bends_CSI):
        before_SL = net.trace(theta_P, x_SI)[-1].before_QCL[:, channel]
        windows = before_SL.unflatten(1, (1, *stage.before)).transpose(0, 1)[0]
        size = stage.pool
        patches = (
            windows.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).flatten(2)
        )  # [S, windows, positions]
        least_SW = patches.abs().amin(2)
        window_S = least_SW.argmin(1)
        chosen_SP = patches[torch.arange(len(x_SI)), window_S]
        signs.append(-torch.sign(chosen_SP.sum(1)).sum().sign())
    sign_C = torch.stack(signs)
    return torch.where(sign_C == 0, 1.0, sign_C)


def signs_by_next(net: ConvNet, theta_P: Tensor, hypothesis: Hypothesis, kinks: Kinks) -> Tensor | None:
    """+1 or -1 for every channel of the last layer of `net` [C], from kinks of the next layer.

    A normal, as a sum over all units whether they are on or not, has no part of those that are off.
    """
    width, votes_C = net.widths[-1], torch.zeros(net.widths[-1], dtype=torch.float64)
    before_SKL, jacobian_SIKL = read_jacobians(net, theta_P, hypothesis, kinks.x_SI, True)
    for normal_I, before_KL, jacobian_IKL in zip(kinks.normal_SI, before_SKL, jacobian_SIKL, strict=True):
        for position in range(before_KL.shape[1]):
            matrix_IK = jacobian_IKL[:, :, position]
            row_K, there_K, residual = _row(matrix_IK, normal_I)
            if residual > READ:
                continue
            responds_K = row_K.abs() > SILENT * row_K.abs().max()
            vote_K = torch.where(responds_K, 1.0, -1.0) * torch.sign(before_KL[:, position]) * there_K
            votes_C += vote_K.unflatten(0, (width, -1)).sum(1)
    return None if (votes_C == 0).any() else votes_C.sign()


def known_layers(hypothesis: Hypothesis, known: list[Tensor], activation: Activation) -> tuple[ConvNet, Tensor]:
    """The first layers as a network, and its theta."""
    first = replace(hypothesis, stages=hypothesis.stages[: len(known)])
    net = ConvNet(first, tuple(len(m) for m in known), activation)
    return net, net.flatten(known)


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


class _Rows:
    """Kinks as weights of units: unit rows [K] with the mask of what was active, points, and biases."""

    def __init__(self) -> None:
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

    def joined(self, members: np.ndarray, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
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
        positions = stage.before[0] * stage.before[1]
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
        row_K, active_K, residual = _row(jacobian_IKL[:, :, position], normal_I)
        if residual < allowed:
            return row_K, active_K, position
    return torch.zeros_like(right_LK[0]), torch.zeros_like(right_LK[0], dtype=torch.bool), -1


def _row(matrix_IK: Tensor, normal_I: Tensor) -> tuple[Tensor, Tensor, float]:
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


def _same_channel(rows_SK: Tensor, masks_SK: Tensor) -> np.ndarray:
    """[S]: which rows are one channel's, over the weights they share."""
    masks = masks_SK.double()
    power_SS, shared_SS = rows_SK.square() @ masks.T, masks @ masks.T
    cosine_SS = (rows_SK @ rows_SK.T).square() / (power_SS * power_SS.T).clamp(min=1e-300)
    enough_SS = (shared_SS >= SHARED) & (torch.minimum(power_SS, power_SS.T) > 0.1)
    same_SS = enough_SS & (1 - cosine_SS < SAME_ROW)
    return connected_components(same_SS.numpy(), directed=False)[1]


def _complete(channels: np.ndarray, masks_SK: Tensor) -> tuple[int, bool]:
    """How many channels are shown twice, and whether all their weights are."""
    groups = [np.flatnonzero(channels == c) for c in range(int(channels.max()) + 1)]
    groups = [group for group in groups if len(group) > 2]
    return len(groups), all(bool(masks_SK[group].any(0).all()) for group in groups)
