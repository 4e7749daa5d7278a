"""Layers of a relu network one after the other, each from the kinks that show it, in the layers before it.

In a region where no unit of the layers found so far changes, what the next layer reads is linear in the inputs, with a
known matrix A at each position. A kink of one of its units there has a normal A^T v, so least squares over the position
gives the unit's weights v, as far as what they read is active; the rows of many kinks that are one channel are joined
over the weights they share. Compare Rolnick and Kording (arXiv 1910.00744), Carlini, Jagielski, Mironov
(arXiv 2003.04884) for dense layers.

Legend: S kinks, Q queries, I inputs, O outputs, C channels, K numbers that a channel reads, L positions, P parameters,
W windows of a pooling, D positions of a window, N numbers of the map that a layer reads.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.convolution.filters import Filters
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.convolution.network import ConvNet, Passed
from distrecon.expand_cluster.convolution.rows import READ, Kinks, Layer, Rows, places, read_jacobians, row_of
from distrecon.nets.activations import Activation

SEGMENTS = 8_000  # drawn at a time, of which those inside one region of the known layers are asked about
# of a round, at most: segments, those that are cut to where they bend, and those whose Jacobians are taken
ASKED, CUT, EXAMINED = 8000, 1200, 300
PARTS = 8  # of a segment that bends
REACHES = (0.5, 100.0)  # of the segments, in units of the inputs' scale
LENGTHS = (0.5, 0.2, 0.08, 0.03, 0.01, 0.003)  # half lengths over the distance from the centre, in turn
BENDS = 1e-7  # of the answer: second differences above it are kinks
INSIDE, STEP = 0.9, 5e-3  # of a segment's half length: where its Jacobians are taken, and their differences
ALONE = 1e-6  # ratio of the second singular value of the Jacobians' difference to the first, at one kink
TARGETED = 0.7  # share of the segments that are moved to where units respond seldom
CLIMBS, CLIMB = 12, 0.25  # steps of these at most, and their size over the distance from the centre
ASCENTS, ASCENT, FAR = 100, 5, (10.0, 1000.0)  # of a round along the outputs, their steps, and how far out they go on
BY_ASCENT = 0.5  # share of the segments that lie on them
LOUD = 0.7  # of those, where a unit is to respond; elsewhere none is
SAMPLE, SELDOM = 2000, 0.02  # inputs at which it is counted how often units respond; rates below which all count alike
AIMED, AIMS = 600, 10  # segments of a round at points where a unit bends and a weight that it lacks shows; steps there
AIM = (1e-3, 0.5)  # how far on the number is that the weight is for, over the distance from the centre
ROUNDS = 10  # of segments for a layer
ENOUGH = 6  # kinks of a channel all of whose weights are known: others of it are not looked at
QUIET = 3  # rounds in a row that show no new channel where every weight is known: there are no others
SILENT = 1e-6  # of a row's largest coefficient: what does not respond


def pattern(net: ConvNet, passed: list[Passed]) -> Tensor:
    """What tells the linear region of every query: [Q, N] whole numbers."""
    parts = []
    for stage, here in zip(net.hypothesis.stages, passed, strict=True):
        on = here.before_QCL.flatten(1) > 0 if stage.pool == 1 or stage.average else here.after.flatten(1) > 0
        parts.append(on.long())
        if here.taken_QCM is not None:
            parts.append(torch.where(on, here.taken_QCM.flatten(1), -1))
    return torch.cat(parts, dim=1)


def find_kinks(
    box: BlackBox,
    net: ConvNet,
    theta_P: Tensor,
    unit: float,
    generator: torch.Generator,
    wider: tuple[ConvNet, Tensor] | None = None,
    layer: Layer | None = None,
) -> Kinks:
    """Kinks of one unit behind the layers of `net`, in regions where these are linear.

    With what is known of the next layer already, and the network with it, those that it explains are left out, and
    weights that it lacks are aimed at.
    """
    x_QI, move_QI = _segments(box, net, theta_P, unit, generator, wider, layer)
    here_QO, up_QO, down_QO = box(x_QI), box(x_QI + move_QI), box(x_QI - move_QI)
    bends_Q = ((up_QO + down_QO - 2 * here_QO).abs() > BENDS * here_QO.abs().amax(1, keepdim=True)).any(1)
    x_SI, move_SI = cut(box, x_QI[bends_Q][:CUT], move_QI[bends_Q][:CUT], generator)
    if wider and layer:
        open_S = ~_explained(*wider, layer, x_SI, move_SI)
        x_SI, move_SI = x_SI[open_S], move_SI[open_S]
    x_SI, move_SI = x_SI[:EXAMINED], INSIDE * move_SI[:EXAMINED]
    if not len(x_SI):
        return Kinks(x_SI, x_SI, x_SI.new_empty(0, box.outputs))
    y_2, jacobian_2 = [], []
    for sign in (-1, 1):
        end_SI = x_SI + sign * move_SI
        step_S = STEP * move_SI.norm(dim=1) / box.inputs**0.5
        y_2.append(box(end_SI))
        jacobian_2.append(_jacobians(box, end_SI, y_2[-1], step_S))
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


def _segments(
    box: BlackBox,
    net: ConvNet,
    theta_P: Tensor,
    unit: float,
    generator: torch.Generator,
    wider: tuple[ConvNet, Tensor] | None,
    layer: Layer | None,
) -> tuple[Tensor, Tensor]:
    """Middles [Q, I] and half lengths [Q, I] of segments on which no unit of `net` changes."""
    climbed_SI = along_outputs(box, _drawn(box, ASCENTS, unit, FAR, generator), generator)
    count = int(BY_ASCENT * SEGMENTS)
    others_QI = _towards_rare(net, theta_P, _drawn(box, SEGMENTS - count, unit, REACHES, generator), generator)
    x_QI = torch.cat([climbed_SI[torch.randint(len(climbed_SI), (count,), generator=generator)], others_QI])
    shape = x_QI.shape
    move_QI = (
        x_QI.norm(dim=1, keepdim=True) / box.inputs**0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    )
    aimed = 0
    if wider and layer and not layer.seen_CK.all():
        lacking_QI, along_QI = towards_lacking(*wider, layer, generator)
        aimed, x_QI, move_QI = len(lacking_QI), torch.cat([lacking_QI, x_QI]), torch.cat([along_QI, move_QI])
    length_Q1 = torch.zeros(len(x_QI), 1, dtype=torch.float64)
    for length in LENGTHS:
        open_Q = (length_Q1[:, 0] == 0).nonzero()[:, 0]
        ends = [pattern(net, net.trace(theta_P, x_QI[open_Q] + sign * length * move_QI[open_Q])) for sign in (-1, 1)]
        length_Q1[open_Q[(ends[0] == ends[1]).all(1)]] = length
    chosen_Q = (length_Q1[:, 0] > 0).nonzero()[:, 0]
    chosen_Q = chosen_Q[torch.randperm(len(chosen_Q), generator=generator)]
    chosen_Q = chosen_Q[(chosen_Q >= aimed).long().argsort(stable=True)][:ASKED]
    return x_QI[chosen_Q], (length_Q1 * move_QI)[chosen_Q]


def _drawn(box: BlackBox, count: int, unit: float, reaches: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Inputs of every size."""
    low, high = (np.log(unit * reach) for reach in reaches)
    size_Q1 = (low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)).exp()
    return box.place(size_Q1 * torch.randn(count, box.inputs, generator=generator, dtype=torch.float64))


def along_outputs(box: BlackBox, x_SI: Tensor, generator: torch.Generator) -> Tensor:
    """The inputs and those on the way from each along a random combination of the outputs, at the same distance.

    Units that nearly always respond stop there, some that hardly ever do begin: whichever lowers that combination.
    """
    size_S1, inputs = x_SI.norm(dim=1, keepdim=True), x_SI.shape[1]
    weights_SO = torch.randn(len(x_SI), box.outputs, generator=generator, dtype=torch.float64)
    eye_II, path = torch.eye(inputs, dtype=torch.float64), [x_SI]
    for _ in range(ASCENT):
        step_S11 = STEP * size_S1[:, :, None] / inputs**0.5
        near_SIO = box((x_SI[:, None] + step_S11 * eye_II).flatten(0, 1)).unflatten(0, (-1, inputs))
        slope_SI = torch.einsum("sio,so->si", near_SIO - box(x_SI)[:, None], weights_SO)
        x_SI = x_SI + CLIMB * size_S1 * F.normalize(slope_SI, dim=1)
        x_SI = box.place(x_SI * size_S1 / x_SI.norm(dim=1, keepdim=True))
        path.append(x_SI)
    return torch.cat(path)


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


def cut(box: BlackBox, x_SI: Tensor, move_SI: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A shorter segment of each, round one of the places where it bends: it may bend at several."""
    if not len(x_SI):
        return x_SI, move_SI
    t_T = torch.linspace(-1, 1, PARTS + 1, dtype=torch.float64)
    y_STO = box((x_SI[:, None] + t_T[:, None] * move_SI[:, None]).flatten(0, 1)).unflatten(0, (len(x_SI), -1))
    second_ST = (y_STO[:, 2:] + y_STO[:, :-2] - 2 * y_STO[:, 1:-1]).abs().amax(2)
    bends_ST = (second_ST > BENDS * y_STO.abs().amax((1, 2))[:, None]).double()
    kept_S = bends_ST.any(1)
    at_S = t_T[1:-1][torch.multinomial(bends_ST[kept_S], 1, generator=generator)]
    return x_SI[kept_S] + at_S * move_SI[kept_S], 2 / PARTS * move_SI[kept_S]


def _explained(wider: ConvNet, wider_P: Tensor, layer: Layer, x_SI: Tensor, move_SI: Tensor) -> Tensor:
    """[S]: whether a unit of the last layer of enough kinks and without unknown weights bends on a segment."""
    on, off = (wider.trace(wider_P, x_SI + sign * move_SI)[-1].before_QCL > 0 for sign in (1, -1))
    known_C = layer.seen_CK.all(1) & (torch.tensor([len(points_SI) for points_SI in layer.bends_CSI]) >= ENOUGH)
    return (on != off)[:, known_C].any(2).any(1)


def towards_lacking(wider: ConvNet, wider_P: Tensor, layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points [Q, I] where a unit bends while a number is on whose weight it lacks, and moves [Q, I] through its kink.

    By Newton steps from points where it bends, for two equations: the unit, as far as it is known, is 0, and the number
    a little above 0. The moves leave that number as it is.
    """
    before, stage = wider.hypothesis.stages[-2:]
    place_KL = places(stage, (wider.widths[-2], *before.after))
    lacking = (~layer.seen_CK).nonzero()
    pair_Q = lacking[torch.randint(len(lacking), (AIMED,), generator=generator)]
    x_QI = torch.stack([_one_of(layer.bends_CSI[unit], generator) for unit in pair_Q[:, 0]])
    row_Q = torch.arange(AIMED)
    position_Q = wider.trace(wider_P, x_QI)[-1].before_QCL[row_Q, pair_Q[:, 0]].abs().argmin(1)
    number_Q = place_KL[pair_Q[:, 1], position_Q] - 1
    inside_Q = number_Q >= 0  # the others are padding
    x_QI, pair_Q, position_Q, number_Q = x_QI[inside_Q], pair_Q[inside_Q], position_Q[inside_Q], number_Q[inside_Q]
    row_Q, size_Q1 = torch.arange(len(x_QI)), x_QI.norm(dim=1, keepdim=True)
    low, high = map(np.log, AIM)
    above_Q = (low + (high - low) * torch.rand(len(x_QI), generator=generator, dtype=torch.float64)).exp()
    above_Q = above_Q * size_Q1[:, 0] / x_QI.shape[1] ** 0.5
    for step in range(AIMS + 1):
        with torch.enable_grad():
            at_QI = x_QI.detach().requires_grad_()
            passed = wider.trace(wider_P, at_QI)
            unit_Q = passed[-1].before_QCL[row_Q, pair_Q[:, 0], position_Q]
            number_Q1 = signed_map(wider, passed)[row_Q, number_Q]
            slopes = [torch.autograd.grad(v.sum(), at_QI, retain_graph=True)[0] for v in (unit_Q, number_Q1)]
        slope_Q2I = torch.stack(slopes, 1)
        if step == AIMS:
            break
        wanted_Q2 = torch.stack([-unit_Q, above_Q - number_Q1], 1).detach()
        move_QI = (torch.linalg.pinv(slope_Q2I) @ wanted_Q2[:, :, None])[:, :, 0]
        x_QI = x_QI + move_QI * (AIM[1] * size_Q1 / move_QI.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)
    unit_QI, number_QI = F.normalize(slope_Q2I, dim=2).unbind(1)
    along_QI = F.normalize(unit_QI - (unit_QI * number_QI).sum(1, keepdim=True) * number_QI, dim=1)
    return x_QI, size_Q1 * along_QI


def _one_of(points_SI: Tensor, generator: torch.Generator) -> Tensor:
    return points_SI[int(torch.randint(len(points_SI), (1,), generator=generator))]


def signed_map(net: ConvNet, passed: list[Passed]) -> Tensor:
    """The map that the last layer reads without its activation, [Q, N]."""
    stage = net.hypothesis.stages[-2]
    before = passed[-2].before_QCL.unflatten(2, stage.before)
    if stage.pool > 1:
        before = (F.avg_pool2d if stage.average else F.max_pool2d)(before, stage.pool)
    return before.flatten(1)


def _jacobians(box: BlackBox, x_SI: Tensor, y_SO: Tensor, step_S: Tensor) -> Tensor:
    """[S, O, I] by differences from the answers y, which are exact where the black box is linear."""
    moves_SII = step_S[:, None, None] * torch.eye(box.inputs, dtype=torch.float64)
    moved_SIO = box((x_SI[:, None] + moves_SII).flatten(0, 1)).unflatten(0, (len(x_SI), -1))
    return ((moved_SIO - y_SO[:, None]) / step_S[:, None, None]).transpose(1, 2)


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
    rows, layer, found, quiet = Rows(hypothesis.stages[len(known)]), None, 0, 0
    for _ in range(ROUNDS):
        net, theta_P = known_layers(hypothesis, known, activation)
        wider = None if layer is None else known_layers(hypothesis, [*known, layer.matrix_CK], activation)
        kinks = find_kinks(box, net, theta_P, unit, generator, wider, layer)
        if open_signs:
            sign_C = signs_by_next(net, theta_P, hypothesis, kinks)
            if sign_C is None:
                continue
            known[-1], open_signs = sign_C[:, None] * known[-1], False
            net, theta_P = known_layers(hypothesis, known, activation)
        rows.add(net, theta_P, hypothesis, kinks)
        layer = rows.layer()
        if layer is not None:
            whole = bool(layer.seen_CK.all())
            quiet = quiet + 1 if whole and len(layer.matrix_CK) == found else 0
            found = len(layer.matrix_CK)
            if quiet == QUIET:
                break
    return layer


def signs_by_pooling(net: ConvNet, theta_P: Tensor, bends_CSI: list[Tensor]) -> Tensor:
    """+1 or -1 for every channel of the last layer of `net` [C], which is max-pooled, from points where it bends.

    There the unit is zero at one position, and at the others of its window it must be below, or it would not show.
    """
    stage, signs = net.hypothesis.stages[-1], []
    for channel, x_SI in enumerate(bends_CSI):
        before_SL = net.trace(theta_P, x_SI)[-1].before_QCL[:, channel]
        windows = before_SL.unflatten(1, (1, *stage.before)).transpose(0, 1)[0]
        size = stage.pool
        patches_SWD = windows.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).flatten(2)
        window_S = patches_SWD.abs().amin(2).argmin(1)
        chosen_SD = patches_SWD[torch.arange(len(x_SI)), window_S]
        signs.append(-torch.sign(chosen_SD.sum(1)).sum().sign())
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
            row_K, there_K, residual = row_of(matrix_IK, normal_I)
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
