"""First-layer filters from places far out, where the slope of one unit alone changes.

Far from the centre nearly all units are constant or straight. Where the slope of exactly one first-layer unit changes
between two near points, the difference of the two Jacobians has rank one, and its direction in the inputs is that
unit's filter, shifted, whatever follows it. Units of later layers change along directions that no window of a filter's
size holds, and so do two positions that take turns in a max pooling. The filters of many such places, clustered, are
the channels; how the outputs change along a filter gives its size (of relu and leaky_relu it is free) and its bias.

Legend: S places, Q queries, I inputs, O outputs, K numbers that a filter reads, T points of a profile, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.neurons import average_linkage, members
from distrecon.expand_cluster.profiles import fit_profile
from distrecon.nets.activations import Activation

REACHES = (300.0, 1000.0, 100.0, 3000.0)  # of the places, in standard inputs, in turn
PLACES = 3000  # looked at, for each reach
APART = 1.0  # half the distance of the two points of a place, in standard inputs
BENDS = 1e-4  # of the largest second difference seen: places that bend less are straight
EXAMINED = 120  # places of a reach whose Jacobians are taken
STEP = 3e-4  # of the differences
ALONE = 1e-5  # ratio of the second singular value of the Jacobians' difference to the first, where one unit changes
EMPTY = 1e-5  # of a filter's largest weight: what its direction has elsewhere
SAME_FILTER = 1e-3  # distance of unit vectors that are one filter; they are found to 1e-8
NEAR_PLACES, NEAR_EXAMINED, NEAR_REACH = 400, 40, 10.0  # places near the centre for each kink, and how far out these go
NEAR_APART, NEAR_STEP = 0.05, 5e-3  # half the distance of their two points, and the step of the differences
PROFILE, PROFILE_POINTS = 3.0, 61  # half length, and points, of the lines on which size and bias are found
SUM = 1e-5  # what is left of a direction beside those of other filters, if it is a sum of them
TWICE = 2  # places that must show a filter: one alone may be an accident
ENOUGH = 3  # places of every direction seen at which no more are looked for
TIMES = 2  # that every reach has its turn
INSIDE = 1e-4  # of a bend: what a window that ends before the border leaves of it along the border


@dataclass(frozen=True)
class Places:
    """Places x[S, I] where one unit changes: its unit filter [S, K], the same in the image [S, I], the outputs' unit
    direction [S, O], and for kinks how far along the filter they lie [S] and a point of each [S, I]."""

    x_SI: Tensor
    filter_SK: Tensor
    direction_SI: Tensor
    output_SO: Tensor
    kink_S: Tensor
    bend_SI: Tensor

    @staticmethod
    def join(parts: list["Places"]) -> "Places":
        names = ("x_SI", "filter_SK", "direction_SI", "output_SO", "kink_S", "bend_SI")
        return Places(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Filters:
    """[filter, bias] of every channel of the first layer, [C, K + 1], up to its sign, and points [S, I] at which the
    unit of each bends at some position (of relu and leaky_relu)."""

    first_CK: Tensor
    bends_CSI: list[Tensor]


def find_filters(
    box: BlackBox, hypothesis: Hypothesis, activation: Activation, generator: torch.Generator, unit: float = 1.0
) -> Filters | None:
    """The first layer's filters; None where no place shows one.

    All lengths are multiples of `unit`, the scale of the inputs at which the black box bends.
    """
    parts: list[Places] = []
    groups: list[np.ndarray] = []
    for reach in TIMES * REACHES:
        parts.append(_places(box, hypothesis, reach, generator, unit))
        found = Places.join(parts)
        if len(found.x_SI) > 1:
            groups = _channels(found.filter_SK)
            if min(map(len, groups)) >= ENOUGH:
                break
    groups = [group for group in groups if len(group) >= TWICE]
    if not groups:
        return None
    first_CK = torch.stack([_with_size(box, activation, found, group, unit) for group in groups])
    filters = Filters(first_CK, [found.bend_SI[group] for group in groups])
    return _refined(box, hypothesis, filters, generator, unit) if activation.symmetry == "scaled" else filters


def _channels(filter_SK: Tensor) -> list[np.ndarray]:
    """Indices of the places of each direction, up to its sign, the most frequent first.

    Where the units of one position alone are on, a unit of the next layer bends along a sum of their filters: such a
    direction, rarer than theirs, is no filter.
    """
    groups = members(average_linkage(filter_SK, "odd"), SAME_FILTER)
    kept: list[np.ndarray] = []
    for group in sorted(groups, key=len, reverse=True):
        before_KC, direction_K = filter_SK[[other[0] for other in kept]].T, filter_SK[group[0]]
        if 0 < len(kept) < len(direction_K):
            part_C = torch.linalg.lstsq(before_KC, direction_K[:, None]).solution
            if (before_KC @ part_C - direction_K[:, None]).norm() < SUM:
                continue
        kept.append(group)
    return kept


def _places(box: BlackBox, hypothesis: Hypothesis, reach: float, generator: torch.Generator, unit: float) -> Places:
    """Places so far out, drawn at random, at which one first-layer unit alone changes."""
    x_QI = box.place(unit * reach * torch.randn(PLACES, box.inputs, generator=generator, dtype=torch.float64))
    move_QI = unit * APART * torch.randn(PLACES, box.inputs, generator=generator, dtype=torch.float64)
    second_QO = box(x_QI + move_QI) + box(x_QI - move_QI) - 2 * box(x_QI)
    bend_Q = second_QO.abs().amax(1)
    seen_Q = (bend_Q > BENDS * bend_Q.max()).nonzero()[:, 0]
    seen_Q = seen_Q[torch.randperm(len(seen_Q), generator=generator)]
    if _borders_mislead(hypothesis):
        allowed_Q = INSIDE * bend_Q[seen_Q] / (unit * APART)
        seen_Q = seen_Q[along_border(box, hypothesis, x_QI[seen_Q], move_QI[seen_Q], unit * STEP) < allowed_Q]
    chosen_Q = seen_Q[:EXAMINED]
    return _examined(box, hypothesis, x_QI[chosen_Q], move_QI[chosen_Q], unit * STEP)


def _borders_mislead(hypothesis: Hypothesis) -> bool:
    """Whether windows at the border count for nothing: where that is padded, the difference of two filters that take
    turns in a max pooling may be cut to a filter's size."""
    stage = hypothesis.stages[0]
    return stage.padding > 0 and stage.pool > 1 and not stage.average


def along_border(box: BlackBox, hypothesis: Hypothesis, x_QI: Tensor, move_QI: Tensor, step: float) -> Tensor:
    """By how much the outputs' slope along one direction that moves all pixels of the border differs between both ends
    of a place, [Q]: by nothing where a window inside changes."""
    direction = torch.ones(hypothesis.input_shape, dtype=torch.float64)
    direction[:, 1:-1, 1:-1] = 0.0
    direction_I = direction.flatten() * torch.arange(1, box.inputs + 1, dtype=torch.float64).sqrt().cos()  # no pattern
    after_QO, before_QO = (_along(box, x_QI + sign * move_QI, direction_I, 1, step) for sign in (1, -1))
    return (after_QO - before_QO).abs().amax(1)


def _examined(box: BlackBox, hypothesis: Hypothesis, x_SI: Tensor, move_SI: Tensor, step: float) -> Places:
    """Those of the places between x - move and x + move at which one first-layer unit alone changes."""
    before_SOI, after_SOI = (jacobians(box, x_SI + sign * move_SI, step) for sign in (-1, 1))
    left_SOO, values, right_SOI = torch.linalg.svd(after_SOI - before_SOI, full_matrices=False)
    ratio_S = values[:, 1] / values[:, 0].clamp(min=1e-300) if values.shape[1] > 1 else torch.zeros(len(x_SI))
    kept, filters = [], []
    for number in (ratio_S < ALONE).nonzero()[:, 0].tolist():
        window = _window(right_SOI[number, 0].unflatten(0, hypothesis.input_shape), hypothesis)
        if window is not None:
            kept.append(number)
            filters.append(window.flatten())
    width = hypothesis.input_shape[0] * hypothesis.stages[0].kernel[0] * hypothesis.stages[0].kernel[1]
    stacked = torch.stack(filters) if filters else torch.empty(0, width, dtype=torch.float64)
    x_SI, move_SI, output_SO, direction_SI = x_SI[kept], move_SI[kept], left_SOO[kept, :, 0], right_SOI[kept, 0]
    # straight lines along the move from both ends meet at the share t of it, where there is a kink
    ends = [
        (box(x_SI + sign * move_SI), (jacobian_SOI[kept] @ move_SI[:, :, None])[:, :, 0])
        for sign, jacobian_SOI in ((-1, before_SOI), (1, after_SOI))
    ]
    (low_S, low_slope_S), (high_S, high_slope_S) = (
        ((y_SO * output_SO).sum(1), (slope_SO * output_SO).sum(1)) for y_SO, slope_SO in ends
    )
    share_S = (high_S - low_S - high_slope_S - low_slope_S) / (low_slope_S - high_slope_S)
    bend_SI = x_SI + share_S[:, None] * move_SI
    return Places(x_SI, stacked, direction_SI, output_SO, (bend_SI * direction_SI).sum(1), bend_SI)


def _refined(
    box: BlackBox, hypothesis: Hypothesis, filters: Filters, generator: torch.Generator, unit: float
) -> Filters:
    """Filters and biases of kinks once more, from places near the centre, where differences are a thousand times more
    exact: layers behind the first are read through them."""
    stage, first_CK, bends_CSI = hypothesis.stages[0], filters.first_CK.clone(), list(filters.bends_CSI)
    images = torch.eye(box.inputs, dtype=torch.float64).unflatten(1, hypothesis.input_shape)
    reads_IKL = F.unfold(images, stage.kernel, padding=stage.padding, stride=stage.stride)
    whole_L = (reads_IKL.sum((0, 1)) == reads_IKL.shape[1]).nonzero()[:, 0]
    for channel, row_K in enumerate(filters.first_CK):
        position_Q = whole_L[torch.randint(len(whole_L), (NEAR_PLACES,), generator=generator)]
        size_Q1 = unit * NEAR_REACH ** torch.rand(NEAR_PLACES, 1, generator=generator, dtype=torch.float64)
        x_QI = box.place(size_Q1 * torch.randn(NEAR_PLACES, box.inputs, generator=generator, dtype=torch.float64))
        direction_QI = (reads_IKL[:, :, position_Q] * row_K[:-1, None]).sum(1).T
        x_QI = x_QI - ((x_QI * direction_QI).sum(1) + row_K[-1])[:, None] * direction_QI  # onto the kink
        move_QI = NEAR_APART * unit * direction_QI
        here_QO = box(x_QI)
        bend_Q = (box(x_QI + move_QI) + box(x_QI - move_QI) - 2 * here_QO).abs().amax(1)
        seen_Q = (bend_Q > BENDS * bend_Q.max()).nonzero()[:, 0][:NEAR_EXAMINED]
        found = _examined(box, hypothesis, x_QI[seen_Q], move_QI[seen_Q], NEAR_STEP * unit)
        sign_S = torch.sign(found.filter_SK @ row_K[:-1])
        rows_SK = torch.cat([found.filter_SK, -found.kink_S[:, None]], dim=1) * sign_S[:, None]
        own_S = (rows_SK - row_K).norm(dim=1) < SAME_FILTER * row_K.norm()
        if int(own_S.sum()) >= ENOUGH:
            first_CK[channel] = rows_SK[own_S].median(0).values
            bends_CSI[channel] = torch.cat([bends_CSI[channel], found.bend_SI[own_S]])
    return Filters(first_CK, bends_CSI)


def _window(image: Tensor, hypothesis: Hypothesis) -> Tensor | None:
    """The part of a direction [C, H, W] that one whole filter reads; None where it is not that."""
    stage = hypothesis.stages[0]
    seen_HW = image.abs().amax(0) > EMPTY * image.abs().max()
    rows, columns = seen_HW.any(1).nonzero()[:, 0], seen_HW.any(0).nonzero()[:, 0]
    corner = []
    border = _borders_mislead(hypothesis)
    for places, kernel, side in zip((rows, columns), stage.kernel, image.shape[1:], strict=True):
        low, high = int(places[0]), int(places[-1])
        if border and (low == 0 or high == side - 1):
            return None
        if high - low + 1 != kernel or (low + stage.padding) % stage.stride:
            return None
        corner.append(low)
    return image[:, corner[0] : corner[0] + stage.kernel[0], corner[1] : corner[1] + stage.kernel[1]]


def jacobians(box: BlackBox, x_SI: Tensor, step: float) -> Tensor:
    """[S, O, I] by central differences."""
    moves_II = step * torch.eye(box.inputs, dtype=torch.float64)
    up, down = (box((x_SI[:, None] + sign * moves_II).flatten(0, 1)) for sign in (1, -1))
    return ((up - down).unflatten(0, (len(x_SI), -1)) / (2 * step)).transpose(1, 2)


def _with_size(box: BlackBox, activation: Activation, places: Places, group: np.ndarray, unit: float) -> Tensor:
    """[filter, bias] of a channel, from the profile at its place that one neuron explains best; of kinks, size 1."""
    if activation.symmetry == "scaled":
        first = places.filter_SK[group[0]]
        signs_S = torch.sign(places.filter_SK[group] @ first)
        return torch.cat([first, -(signs_S * places.kink_S[group]).median()[None]])
    order = 2 if activation.symmetry == "even_linear" else 1
    best: tuple[float, Tensor] | None = None
    for number in group[: 2 * ENOUGH].tolist():
        direction_I, middle = places.direction_SI[number], float(places.kink_S[number])
        x_I = places.x_SI[number]
        if order == 2:
            x_I = x_I + (middle - float(x_I @ direction_I)) * direction_I
        t_T = unit * torch.linspace(-PROFILE, PROFILE, PROFILE_POINTS, dtype=torch.float64)
        line_TI = x_I + t_T[:, None] * direction_I
        values_T = _along(box, line_TI, direction_I, order, unit * STEP) @ places.output_SO[number]
        alpha, beta, loss = fit_profile(activation, order, t_T, values_T)
        bias = beta - alpha * float(direction_I @ x_I)
        neuron_K = torch.cat([alpha * places.filter_SK[number], torch.tensor([bias], dtype=torch.float64)])
        if best is None or loss < best[0]:
            best = loss, neuron_K
    assert best is not None
    return best[1]


def _along(box: BlackBox, x_TI: Tensor, direction_I: Tensor, order: int, step: float) -> Tensor:
    """First or second derivatives [T, O] along a direction."""
    step = step if order == 1 else 50 * step
    up_TO, down_TO = box(x_TI + step * direction_I), box(x_TI - step * direction_I)
    return (up_TO - down_TO) / (2 * step) if order == 1 else (up_TO + down_TO - 2 * box(x_TI)) / step**2
