"""Where a black box lives: the centre and the scale of its inputs, and the domain that no query may leave.

The method works in standard inputs u = (x - centre) / scale, in which queries are about standard normal. Centre and
scale come from the user's data, else from the domain, else they are found by asking: second differences at all scales
tell at which the black box bends, and on long lines transitions are looked for (see transitions.py). Seen from afar,
those of an ordinary black box all pass near 0. Where they do not, where it does not bend at standard normal inputs, or
where some inputs act a hundred times as strongly as others, the transitions tell more: how far each input has to move
there to change the answer is its scale, and the point nearest to their hyperplanes is the centre.

Legend: Q queries, I inputs, O outputs, K transitions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.transitions import WITHIN, Transitions

Ask = Callable[[Tensor], Tensor]
Bound = float | Sequence[float] | np.ndarray | Tensor

TRIPLES = 8  # x - d, x, x + d: their second difference tells how the black box bends at the scale of x and d
SCALES = tuple(10.0**k for k in range(-5, 6))
ORDINARY = 10.0  # the scale of ordinary inputs is 1 to within this factor, and their hyperplanes pass as near 0
POINTS = 100  # times inputs that are moved one by one
SPREAD = 100.0  # of the inputs' strengths: more means that they have scales of their own
ACTING = 1e-5  # of the strongest input's action: weaker ones do nothing visible
AFAR = 100.0, 1000.0  # lengths of lines, in turn, in units of the scale at which it bends
FINE = 1e-4  # of the answers: what is visible of transitions far away, where inputs are rounded too
NEARER, ROUNDED = (10.0, 30.0), 1e-8  # those where so much of the answers is rounding: far out it hides transitions
OF_VISIBLE = 0.05  # of what is visible there: the rounding itself
WITNESSES = 12  # transitions that are looked at first
SEARCH = 12_000  # queries for the transitions of a round
ROUNDS = 3
SETTLED = 0.3  # of the scale: a centre that moves less is found


@dataclass(frozen=True)
class Surroundings:
    """Standard inputs u = (x - centre) / scale, and the domain low <= x <= high (infinite where there is none)."""

    centre_I: Tensor
    scale_I: Tensor
    low_I: Tensor
    high_I: Tensor

    @property
    def bounded(self) -> bool:
        """Whether there is any limit to the inputs."""
        return bool(torch.isfinite(self.low_I).any() or torch.isfinite(self.high_I).any())

    def inputs(self, u_QI: Tensor) -> Tensor:
        """x of u; what rounding puts outside the domain lies on its boundary."""
        return torch.minimum(torch.maximum(self.centre_I + self.scale_I * u_QI, self.low_I), self.high_I)

    def standard(self, x_QI: Tensor) -> Tensor:
        """u of x: x itself, not copied, where they are the same."""
        if not self.centre_I.any() and (self.scale_I == 1).all():
            return x_QI
        return (x_QI - self.centre_I) / self.scale_I

    def holds(self, u_QI: Tensor) -> Tensor:
        """[Q]: which u lie inside the domain."""
        return ((u_QI >= self.standard(self.low_I)) & (u_QI <= self.standard(self.high_I))).all(1)

    def uniform(self) -> "Surroundings":
        """The same domain with centre 0 and one scale, that of all inputs, which is what convolutions can bear."""
        scale = (self.centre_I.square() + self.scale_I.square()).mean().sqrt()
        return Surroundings(torch.zeros_like(self.centre_I), scale.expand_as(self.scale_I), self.low_I, self.high_I)

    def asked(self, ask: Ask) -> Ask:
        """A function of x as one of u."""
        return lambda u_QI: ask(self.inputs(u_QI))

    def pulled(self, u_QI: Tensor, share: float = 1.0) -> Tensor:
        """The same u moved straight towards the centre until they lie inside a share of the domain."""
        low_I, high_I = self.standard(self.low_I), self.standard(self.high_I)
        beyond_Q = torch.maximum(u_QI / high_I, u_QI / low_I).nan_to_num(0.0).amax(1)
        return u_QI / (beyond_Q / share).clamp(min=1.0)[:, None]

    def inside(self, u_QI: Tensor, margin: float = 0.0) -> Tensor:
        """The same u reflected at the domain's boundary until they lie inside it, by a margin in standard inputs.

        Wide draws then cover the domain evenly. The margin is at most a quarter of the domain's width.
        """
        low_I, high_I = self.standard(self.low_I), self.standard(self.high_I)
        margin_I = torch.clamp((high_I - low_I) / 4, max=margin)
        low_I, high_I = low_I + margin_I, high_I - margin_I
        width_I = high_I - low_I
        both_QI = low_I + width_I - ((u_QI - low_I) % (2 * width_I) - width_I).abs()
        one_QI = torch.where(torch.isfinite(low_I), low_I + (u_QI - low_I).abs(), u_QI)
        one_QI = torch.where(torch.isfinite(high_I), high_I - (u_QI - high_I).abs(), one_QI)
        return torch.where(torch.isfinite(width_I), both_QI, one_QI)


def unbounded(inputs: int) -> tuple[Tensor, Tensor]:
    """Limits of inputs without a domain."""
    limit_I = torch.full((inputs,), torch.inf, dtype=torch.float64)
    return -limit_I, limit_I


def read_domain(domain: tuple[Bound, Bound] | None, inputs: int) -> tuple[Tensor, Tensor]:
    """Low and high [I] of `domain`: two numbers, or two lists of as many as there are inputs; None: no limits."""
    if domain is None:
        return unbounded(inputs)
    try:
        low, high = domain
        low_I = torch.as_tensor(low, dtype=torch.float64).expand(inputs)
        high_I = torch.as_tensor(high, dtype=torch.float64).expand(inputs)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"domain is (low, high), numbers or {inputs} numbers each, not {domain!r}") from None
    if not (low_I < high_I).all():
        raise UserError("domain: every low must be below its high")
    return low_I.clone(), high_I.clone()


def from_data(data_QI: Tensor, low_I: Tensor, high_I: Tensor) -> Surroundings:
    """Mean and standard deviation of the data; inputs that do not vary there get the others' typical scale."""
    outside = int(((data_QI < low_I) | (data_QI > high_I)).any(1).sum())
    if outside:
        raise UserError(f"{outside} of {len(data_QI)} rows of data lie outside the domain")
    scale_I = data_QI.std(0, correction=0)
    varies_I = scale_I > 1e-12 * data_QI.abs().amax(0)
    typical = scale_I[varies_I].median() if varies_I.any() else torch.tensor(1.0, dtype=torch.float64)
    scale_I = torch.where(varies_I, scale_I, typical)
    return Surroundings(data_QI.mean(0), torch.minimum(scale_I, (high_I - low_I) / 2), low_I, high_I)


def from_domain(low_I: Tensor, high_I: Tensor) -> Surroundings:
    """The middle and the standard deviation of a domain; an input without both limits is taken to be standard."""
    width_I = high_I - low_I
    finite_I = torch.isfinite(width_I)
    scale_I = torch.where(finite_I, width_I / 12**0.5, torch.ones_like(width_I))
    middle_I = torch.where(finite_I, (low_I + high_I) / 2, torch.zeros_like(width_I))
    middle_I = torch.minimum(torch.maximum(middle_I, low_I + 1), high_I - 1).where(~finite_I, middle_I)
    return Surroundings(middle_I, scale_I, low_I, high_I)


def by_asking(
    ask: Ask,
    standard: Surroundings,
    generator: torch.Generator,
    visible: float,
    left: float = math.inf,
    ends: bool = False,
    hidden_O: Tensor | float = 0.0,
) -> Surroundings:
    """The same surroundings, of centre 0 and scale 1, where they are ordinary, else what transitions tell.

    `visible`: second differences below this share of the answers may be rounding. `left`: queries, of which half may be
    used. `ends`: answers end somewhere, as scores do where probabilities reach 0 or 1, which looks like a bend far out.
    `hidden_O`: likewise, what rounding to multiples hides at any size of the answers.
    """
    inputs = len(standard.scale_I)
    reach = _reach(ask, standard, generator, visible, hidden_O)
    if reach is None:
        return standard
    afar = AFAR if visible < ROUNDED else NEARER
    ordinary = 1 / ORDINARY <= reach <= ORDINARY
    near, concentric, found = ordinary, False, Transitions.none(inputs)
    if visible < FINE:
        look = partial(Transitions.look, ask, inputs=inputs, generator=generator, visible=visible)
        found = look([reach * length for length in afar], WITNESSES)
    if visible < FINE and not ends:
        rounding = OF_VISIBLE * visible if visible >= ROUNDED else torch.finfo(torch.float64).eps
        heights = partial(Transitions.heights, ask=ask, generator=generator, visible=visible, rounding=rounding)
        apart = heights(found)
        near &= not _several_pass_beyond(ORDINARY, *apart)
        if reach < 1 / ORDINARY:  # a few kinks near 0 may make it small
            near = _several_pass_beyond(1 / ORDINARY, *heights(look([*afar], WITNESSES)))
        concentric = visible >= ROUNDED and found.sharp and not _several_pass_beyond(ORDINARY * reach, *apart)
    if near and _strength_spread(ask, standard, generator) < SPREAD:
        return standard
    scaled = standard if ordinary else _at(standard, standard.centre_I, standard.scale_I * reach)
    if concentric and _strength_spread(ask, scaled, generator) < SPREAD:
        return scaled  # rounding hides what a few kinks would tell besides
    scale_I = found.input_scales(ask)
    if scale_I is None:
        return scaled
    around = _at(standard, standard.centre_I, scale_I)
    reach = float((reach / scale_I).max())
    moved = 0.0
    count = max(1, int(min(3 * inputs + 12, min(SEARCH, left / (2 * ROUNDS)) / (4 * inputs + 40))))
    for _ in range(ROUNDS):
        standing = around.asked(ask)
        found = Transitions.look(standing, [reach * length for length in afar], count, inputs, generator, visible)
        if not len(found.at_KI):
            break
        planes = found.hyperplanes(standing, visible)
        if not len(planes.normal_KI):  # bends from which the answers go on as before, as those of rounding
            break
        centre_I = planes.centre()
        size_I = planes.size(centre_I) * planes.relative_scales()
        moved = float((centre_I / size_I).square().mean().sqrt())
        around, reach = _at(standard, around.inputs(centre_I), around.scale_I * size_I), 1.0
        if _ordinary(around):
            return standard
        if moved < SETTLED:
            break
    return around if visible < ROUNDED or moved < ORDINARY else scaled


def _several_pass_beyond(distance: float, height_K: Tensor, clear_K: Tensor) -> bool:
    """Whether more than a few hyperplanes pass 0 clearly farther off."""
    return bool(len(height_K)) and float((clear_K & (height_K > distance)).double().mean()) >= 1 - WITHIN


def _ordinary(around: Surroundings) -> bool:
    """Whether inputs are of one scale, near 1, round a centre near 0."""
    low, high = float(around.scale_I.min()), float(around.scale_I.max())
    near = float(around.centre_I.square().mean().sqrt()) <= ORDINARY
    return low == high and 1 / ORDINARY <= low <= ORDINARY and near


def _at(around: Surroundings, centre_I: Tensor, scale_I: Tensor) -> Surroundings:
    """The same domain with another centre and scale."""
    return Surroundings(centre_I, scale_I, around.low_I, around.high_I)


def _reach(
    ask: Ask, around: Surroundings, generator: torch.Generator, visible: float, hidden_O: Tensor | float = 0.0
) -> float | None:
    """The smallest scale at which second differences over the scale reach half of their largest value.

    The median over the outputs; 1 where that is the smallest of all scales (a kink at 0); None where nothing bends.
    """
    bends, triples_2QI = [], torch.randn(2, TRIPLES, len(around.scale_I), generator=generator, dtype=torch.float64)
    for scale in SCALES:
        u_QI, d_QI = triples_2QI * scale  # the same at all scales: far from its kinks a homogeneous function is alike
        at_QO, up_QO, down_QO = ask(around.inputs(torch.cat([u_QI, u_QI + d_QI, u_QI - d_QI]))).chunk(3)
        second_QO = up_QO + down_QO - 2 * at_QO
        seen_QO = second_QO.abs() > (visible * at_QO.abs().amax(0)).clamp(min=hidden_O)
        bends.append((second_QO * seen_QO).square().mean(0).sqrt() / scale)
    bend_SO = torch.stack(bends)
    bend_SO = bend_SO[:, bend_SO.amax(0) > 0]
    if not bend_SO.shape[1]:
        return None
    first_O = (bend_SO >= bend_SO.amax(0) / 2).int().argmax(0)
    first = int(first_O.median())
    return SCALES[first] if first else 1.0


def _strength_spread(ask: Ask, around: Surroundings, generator: torch.Generator) -> float:
    """Ratio of the strongest to the weakest input's action, those that do nothing visible aside."""
    inputs = len(around.scale_I)
    points = max(1, min(8, POINTS // inputs))
    u_QI = torch.randn(points, inputs, generator=generator, dtype=torch.float64)
    moved_QI = (u_QI[:, None] + 0.3 * torch.eye(inputs, dtype=torch.float64)).flatten(0, 1)
    change_QIO = ask(around.inputs(moved_QI)).unflatten(0, (points, -1)) - ask(around.inputs(u_QI))[:, None]
    strength_IO = change_QIO.square().mean(0).sqrt()
    strength_I = (strength_IO / strength_IO.amax(0).clamp(min=1e-300)).amax(1)
    seen_I = strength_I[strength_I > ACTING]
    return float(seen_I.max() / seen_I.min()) if len(seen_I) else 1.0
