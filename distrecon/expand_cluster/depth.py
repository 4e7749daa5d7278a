"""Whether the kinks of a piecewise linear black box are those of one hidden layer.

Its hyperplanes then run straight through all inputs, and the slope changes by the same all over each of them. In a
deeper network those of the first layer change it by more or less where other neurons behind them are on, and those of
the other layers turn. So kinks are followed along their hyperplanes: the next place is foretold by the last two, 100
times as far each time, and four answers say whether the slope changes there as it should.

Legend: I inputs, O outputs.
"""

import math

import torch
from torch import Tensor

from distrecon.expand_cluster.symptoms import Kink, Sample

PLACES, ALIKE = 4, 2  # that each kink is followed to, and at how many it must do the same
GROWTH = 100.0  # of the distance from one place to the next: a place is foretold to that many times a kink's error
RESOLVED = 1000.0  # x the error of a kink's place: half of what is looked at, which must hold it
NARROWEST, WIDEST = 1e-5, 1e-3  # likewise: of standard inputs; in more there may be several kinks
START = 0.1  # of it: the first distance, so that kinks that meet the line at a flat angle are still inside
ROUNDING = 10.0  # x the noise of an answer, over the distance of two: of a change of slope
SAME = 0.1  # relative difference of the slope's changes that are one
RETRIES = ((1.0, 1.0), (0.93, 4.0), (0.86, 16.0))  # of a distance, and of half of what is looked at there, in turn: at
# one place another kink may be in the way, and noise may be larger than it was measured


def course(sample: Sample, kink: Kink) -> str:
    """Of a kink's hyperplane: "straight" all the way to standard inputs, "turns" on the way to them, or "unclear"."""
    half = 2 * float(kink.step_I.norm() / kink.direction_I.norm())
    at_I, direction_I, change_O = kink.at_I, kink.direction_I, torch.zeros(0)
    for _ in range(2):  # coarsely, then as finely as the noise allows
        met = _meet(sample, at_I, direction_I, half)
        if met is None or abs(met[0]) > half:
            return "unclear"
        shift, change_O, noise_O = met
        at_I = at_I + shift * direction_I
        half = max(NARROWEST, RESOLVED / max(float((change_O / noise_O).norm()), 1e-300))
        if half > WIDEST:
            return "unclear"
    found: list[str] = []
    for target_I in sample.u_QI[:PLACES]:
        found.append(_towards(sample, at_I, direction_I, change_O, target_I, half))
        if found[-1] != "unclear" and found.count(found[-1]) == ALIKE:
            return found[-1]
    return "unclear"


def _towards(sample: Sample, at_I: Tensor, direction_I: Tensor, change_O: Tensor, target_I: Tensor, half: float) -> str:
    """The hyperplane of a kink, followed in the plane of its line and another input until it is beside that one."""
    slope, distance = 0.0, START * half
    while True:
        for nearer, wider in RETRIES:
            along, beside = nearer * distance, wider * half
            met = _meet(sample, at_I + along * (target_I - at_I + slope * direction_I), direction_I, beside)
            if met is None:
                return "unclear"
            shift, changes_O, noise_O = met
            off = float(((changes_O - change_O) / noise_O).norm())
            most = SAME * float((change_O / noise_O).norm()) + ROUNDING * math.sqrt(len(noise_O)) / beside
            if off <= most and abs(shift) <= beside:
                break
        else:
            return "unclear" if distance == START * half else "turns"
        if distance == 1:
            return "straight"
        slope += shift / along
        distance = GROWTH * distance if 2 * GROWTH * distance < 1 else 1.0


def _meet(sample: Sample, at_I: Tensor, direction_I: Tensor, half: float) -> tuple[float, Tensor, Tensor] | None:
    """Where two straight pieces meet on a line, the change of slope [O] there and the answers' noise [O].

    None outside the domain, or where probabilities tell no scores.
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
    if not torch.isfinite(noise_O).all():
        return None
    shift = -(gap_O / noise_O * weighted_O).sum() / weighted_O.square().sum().clamp(min=1e-300)
    return float(shift), change_O, noise_O
