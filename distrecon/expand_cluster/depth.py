"""Whether the kinks of a piecewise linear black box are those of one hidden layer.

Its hyperplanes then run straight through all inputs, and the slope changes by the same all over each of them. In a
deeper network those of the first layer change it by more or less where other neurons behind them are on, and those of
the other layers turn. So kinks are followed along their hyperplanes: the next place is foretold by the last two, 30
times as far each time, and four answers say whether the slope changes there as it should.

Legend: I inputs, O outputs.
"""

import math

import torch
from torch import Tensor

from distrecon.expand_cluster.symptoms import Kink, Sample

PLACES = 4  # that each kink is followed to
GROWTH = 30.0  # of the distance from one place to the next: a place is foretold to that many times a kink's error
RESOLVED = 1000.0  # x the error of a kink's place: half of what is looked at, which must hold it
NARROWEST, WIDEST = 1e-7, 1e-3  # likewise: of standard inputs; in more there may be several kinks
START = 0.1  # of it: the first distance, so that kinks that meet the line at a flat angle are still inside
SAME = 0.1  # relative difference of the slope's changes that are one
TWICE = 2  # places at which a kink is not what it should be: at one another kink may have been in the way


def course(sample: Sample, kink: Kink) -> str:
    """Of a kink's hyperplane: "straight" all the way to a standard input or more, "turns" if not, or "unclear"."""
    half = 2 * float(kink.step_I.norm() / kink.direction_I.norm())
    at_I, direction_I = kink.at_I, kink.direction_I
    for _ in range(2):  # coarsely, then as finely as the noise allows
        met = _meet(sample, at_I, direction_I, half)
        if met is None or abs(met[0]) > half:
            return "unclear"
        at_I = at_I + met[0] * direction_I
        half = max(NARROWEST, RESOLVED * float(1 / (met[1] / met[2]).norm()))
        if half > WIDEST:
            return "unclear"
    turns = 0
    for target_I in sample.u_QI[:PLACES]:
        found = _towards(sample, at_I, direction_I, target_I, half)
        if found == "straight":
            return found
        turns += found == "turns"
    return "turns" if turns >= TWICE else "unclear"


def _towards(sample: Sample, at_I: Tensor, direction_I: Tensor, target_I: Tensor, half: float) -> str:
    """The hyperplane of a kink, followed in the plane of its line and another input until it is beside that one."""
    met = _meet(sample, at_I, direction_I, half)
    if met is None:
        return "unclear"
    change_O, slope, distance = met[1], 0.0, START * half
    while True:
        here_I = at_I + distance * (target_I - at_I + slope * direction_I)
        met = _meet(sample, here_I, direction_I, half)
        if met is None:
            return "unclear"
        shift, changes_O, noise_O = met
        off = float(((changes_O - change_O) / noise_O).norm())
        size = float((change_O / noise_O).norm())
        if off > SAME * size + math.sqrt(len(noise_O)) * 10 / half or abs(shift) > half:
            return "unclear" if distance == START * half else "turns"
        if distance == 1:
            return "straight"
        slope += shift / distance
        distance = min(1.0, GROWTH * distance)


def _meet(sample: Sample, at_I: Tensor, direction_I: Tensor, half: float) -> tuple[float, Tensor, Tensor] | None:
    """Where two straight pieces meet on a line, the change of slope [O] there and the answers' noise [O].

    None outside the domain, where probabilities tell no scores, or where nothing changes.
    """
    times_41 = half * torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
    line_4I = at_I + times_41 * direction_I
    if not sample.around.holds(line_4I).all():
        return None
    y_4O = sample.ask(line_4I)
    noise_O = sample.noise(y_4O).amax(0).clamp(min=1e-300)
    before_O, after_O = (y_4O[1] - y_4O[0]) / half, (y_4O[3] - y_4O[2]) / half
    change_O = after_O - before_O
    gap_O = y_4O[2] - y_4O[1] - (before_O + after_O) * half
    weighted_O = change_O / noise_O
    if not torch.isfinite(noise_O).all() or not weighted_O.any():
        return None
    return -float((gap_O / noise_O * weighted_O).sum() / weighted_O.square().sum()), change_O, noise_O
