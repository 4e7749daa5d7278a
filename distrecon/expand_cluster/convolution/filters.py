"""First-layer filters of a network whose activation saturates, from places far out where one unit alone responds.

Far from the centre nearly all units of the first layer are constant. Where exactly one responds, at one position, all
outputs change along one direction, which is that unit's filter, shifted: whatever follows it, the Jacobian has rank one
there. The filters of many such places, clustered, are the channels; how the outputs change along a filter gives its
size and its bias.

Legend: S places, Q queries, I inputs, O outputs, K numbers that a filter reads, T points of a profile, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.neurons import average_linkage, members
from distrecon.expand_cluster.profiles import fit_profile
from distrecon.nets.activations import Activation

REACHES = (300.0, 1000.0, 100.0, 3000.0)  # of the places, in standard inputs, in turn
PLACES = 3000  # looked at, for each reach
RESPONDS = 1e-4  # of the largest change seen: places that change less are constant
EXAMINED = 160  # places of a reach whose Jacobian is taken
STEP = 2e-3  # of the differences
ALONE = 1e-5  # ratio of the second singular value of the Jacobian to the first, where one unit responds
EMPTY = 1e-5  # of a filter's largest weight: what its direction has elsewhere
SAME_FILTER = 1e-3  # distance of unit vectors that are one filter; they are found to 1e-8
PROFILE, PROFILE_POINTS = 3.0, 61  # half length, and points, of the lines on which size and bias are found
ENOUGH = 4  # places a channel, on the average, at which no more are looked for


@dataclass(frozen=True)
class Places:
    """Places x[S, I] where one unit responds: its unit filter [S, K], where that starts in the image (flat index of
    its first weight), and the outputs' direction [S, O]."""

    x_SI: Tensor
    filter_SK: Tensor
    direction_SI: Tensor
    output_SO: Tensor

    @staticmethod
    def join(parts: list["Places"]) -> "Places":
        names = ("x_SI", "filter_SK", "direction_SI", "output_SO")
        return Places(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def find_filters(
    box: BlackBox, hypothesis: Hypothesis, activation: Activation, generator: torch.Generator
) -> Tensor | None:
    """[filter, bias] of every channel of the first layer, [C, K + 1], up to its sign; None where no place shows one."""
    parts: list[Places] = []
    for reach in REACHES:
        places = _places(box, hypothesis, reach, generator)
        parts.append(places)
        found = Places.join(parts)
        if len(found.x_SI) < 2:
            continue
        groups = _channels(found.filter_SK)
        if min(map(len, groups)) > 1 and len(found.x_SI) >= ENOUGH * len(groups):
            break
    if len(found.x_SI) < 2:
        return None
    return torch.stack([_with_size(box, activation, found, group) for group in groups])


def _channels(filter_SK: Tensor) -> list[np.ndarray]:
    """Indices of the places of each channel: those of the same direction, up to its sign."""
    merges = average_linkage(filter_SK, "odd")
    return members(merges, SAME_FILTER)


def _places(box: BlackBox, hypothesis: Hypothesis, reach: float, generator: torch.Generator) -> Places:
    inputs = box.inputs
    x_QI = box.place(reach * torch.randn(PLACES, inputs, generator=generator, dtype=torch.float64))
    move_QI = STEP * torch.randn(PLACES, inputs, generator=generator, dtype=torch.float64)
    change_Q = (box(x_QI + move_QI) - box(x_QI - move_QI)).abs().amax(1)
    order_Q = change_Q.argsort(descending=True)
    order_Q = order_Q[change_Q[order_Q] > RESPONDS * change_Q.max()][: 4 * EXAMINED]
    chosen_Q = order_Q[torch.randperm(len(order_Q), generator=generator)][:EXAMINED]
    x_SI = x_QI[chosen_Q]
    jacobian_SOI = _jacobians(box, x_SI)
    left_SOO, values, right_SOI = torch.linalg.svd(jacobian_SOI, full_matrices=False)
    ratio_S = values[:, 1] / values[:, 0].clamp(min=1e-300) if values.shape[1] > 1 else torch.zeros(len(x_SI))
    kept, filters = [], []
    for number in (ratio_S < ALONE).nonzero()[:, 0].tolist():
        image = right_SOI[number, 0].unflatten(0, hypothesis.input_shape)
        window = _window(image, hypothesis)
        if window is not None:
            kept.append(number)
            filters.append(window.flatten())
    width = hypothesis.input_shape[0] * hypothesis.stages[0].kernel[0] * hypothesis.stages[0].kernel[1]
    stacked = torch.stack(filters) if filters else torch.empty(0, width, dtype=torch.float64)
    return Places(x_SI[kept], stacked, right_SOI[kept, 0], left_SOO[kept, :, 0])


def _window(image: Tensor, hypothesis: Hypothesis) -> Tensor | None:
    """The part of a direction [C, H, W] that one whole filter reads; None where it is not that."""
    stage = hypothesis.stages[0]
    seen_HW = image.abs().amax(0) > EMPTY * image.abs().max()
    rows, columns = seen_HW.any(1).nonzero()[:, 0], seen_HW.any(0).nonzero()[:, 0]
    corner = []
    for places, kernel, side in ((rows, stage.kernel[0], image.shape[1]), (columns, stage.kernel[1], image.shape[2])):
        low, high = int(places[0]), int(places[-1])
        if high - low + 1 != kernel or (low + stage.padding) % stage.stride or high >= side:
            return None
        corner.append(low)
    return image[:, corner[0] : corner[0] + stage.kernel[0], corner[1] : corner[1] + stage.kernel[1]]


def _jacobians(box: BlackBox, x_SI: Tensor) -> Tensor:
    """[S, O, I] by five-point differences."""
    moves_II = STEP * torch.eye(box.inputs, dtype=torch.float64)

    def change(multiple: int) -> Tensor:
        up, down = (box((x_SI[:, None] + sign * multiple * moves_II).flatten(0, 1)) for sign in (1, -1))
        return (up - down).unflatten(0, (len(x_SI), -1))

    return ((8 * change(1) - change(2)) / (12 * STEP)).transpose(1, 2)


def _with_size(box: BlackBox, activation: Activation, places: Places, group: np.ndarray) -> Tensor:
    """[filter, bias] of a channel, from the profile at its place that one neuron explains best."""
    best: tuple[float, Tensor] | None = None
    for number in group[: 2 * ENOUGH].tolist():
        x_I, direction_I = places.x_SI[number], places.direction_SI[number]
        t_T = torch.linspace(-PROFILE, PROFILE, PROFILE_POINTS, dtype=torch.float64)
        line_TI = x_I + t_T[:, None] * direction_I
        change_TO = box(line_TI + STEP * direction_I) - box(line_TI - STEP * direction_I)
        values_T = change_TO @ places.output_SO[number] / (2 * STEP)
        alpha, beta, loss = fit_profile(activation, 1, t_T, values_T)
        neuron_K = torch.cat([alpha * places.filter_SK[number], torch.tensor([beta - alpha * float(direction_I @ x_I)])])
        if best is None or loss < best[0]:
            best = loss, neuron_K
    assert best is not None
    return best[1]
