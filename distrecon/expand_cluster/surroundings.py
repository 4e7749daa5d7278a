"""Where a black box lives: the centre and the scale of its inputs, and the domain that no query may leave.

The method works in standard inputs u = (x - centre) / scale, in which queries are about standard normal. Centre and
scale come from the user's data, else from the domain, else they are found by asking: second differences at all scales
tell at which the black box bends, and on long lines transitions are looked for (a neuron's bend or slope). Seen from
afar, those of an ordinary black box all pass near 0. Where they do not, where it does not bend at standard normal
inputs, or where some inputs act a hundred times as strongly as others, the transitions tell more: how far each input
has to move there to change the answer is its scale; and since the answers' gradient changes across a transition by a
multiple of the neuron's weights, each gives the normal of a hyperplane, and the centre is the point nearest to all.

Legend: Q queries, I inputs, O outputs, K transitions, T points of a line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError

Ask = Callable[[Tensor], Tensor]
Bound = float | Sequence[float] | np.ndarray | Tensor

TRIPLES = 8  # x - d, x, x + d: their second difference tells how the black box bends at the scale of x and d
SCALES = tuple(10.0**k for k in range(-5, 6))
FINER_SCALES = tuple(10.0 ** (k / 2) for k in range(-8, 4))
VISIBLE = 1e-5  # of the answers: second differences below this may be rounding
ORDINARY = 10.0  # the scale of ordinary inputs is 1 to within this factor, and their hyperplanes pass as near 0
POINTS = 100  # times inputs that are moved one by one
SPREAD = 100.0  # of the inputs' strengths: more means that they have scales of their own
AFAR = 30.0  # length of the lines, in units of the scale at which the black box bends
WITNESSES = 6  # transitions that are looked at first
HALVINGS = 24  # of a line towards its sharpest bend
STRAIGHT = 0.1  # share of second differences at which a zoomed transition looks straight
SEARCH = 800  # queries for the normals of transitions, in each of
NEARER = 10.0  # length of the second round's lines, likewise
MOVE = 0.05  # of a transition's step, for derivatives beside it
PURE = 0.05  # ratio of singular values of the derivatives' change at a transition of one neuron
RIDGE = 1e-3  # shrinks a centre towards the one before
TILT = 0.002  # of a normal, by differences of derivatives
LARGEST = 0.8  # quantile of the misses that counts as usual
REWEIGHTED = 20  # times, so that a few wrong normals do not matter


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
        """u of x."""
        return (x_QI - self.centre_I) / self.scale_I

    def holds(self, u_QI: Tensor) -> Tensor:
        """[Q]: which u lie inside the domain."""
        return ((u_QI >= self.standard(self.low_I)) & (u_QI <= self.standard(self.high_I))).all(1)

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


def by_asking(ask: Ask, standard: Surroundings, generator: torch.Generator, visible: float = VISIBLE) -> Surroundings:
    """The same surroundings, of centre 0 and scale 1, where they are ordinary, else what transitions tell.

    `visible`: second differences below this share of the answers may be rounding.
    """
    zero_I, inputs = standard.centre_I, len(standard.scale_I)
    limits = standard.low_I, standard.high_I
    reach = _reach(ask, standard, generator, SCALES, visible)
    if reach is None:
        return standard
    found = _Transitions.look(ask, AFAR * reach, WITNESSES, inputs, generator, visible)
    near = 1 / ORDINARY <= reach <= ORDINARY and found.pass_within(ask, ORDINARY, generator)
    if near and _strength_spread(ask, standard, generator) < SPREAD:
        return standard
    if not len(found.at_KI):
        return Surroundings(zero_I, zero_I + reach, *limits)
    scale_I = found.scales(ask)
    if scale_I is None:
        return standard
    around = Surroundings(zero_I, scale_I, *limits)
    reach = float((reach / scale_I).max())
    if not found.scaled(scale_I).pass_within(lambda u_QI: ask(scale_I * u_QI), None, generator):
        count = int(min(inputs + 4, SEARCH / (4 * inputs + 60)))
        for length in (AFAR, NEARER):
            around = _recentred(ask, around, length * reach, count, generator, visible)
            reach = _reach(ask, around, generator, tuple(reach * s for s in SCALES[1:-2]), visible) or reach
    reach = _reach(ask, around, generator, tuple(reach * s for s in FINER_SCALES), visible) or reach
    return Surroundings(around.centre_I, reach * scale_I, *limits)


def _recentred(
    ask: Ask, around: Surroundings, length: float, count: int, generator: torch.Generator, visible: float
) -> Surroundings:
    """The same scales round the point nearest to the hyperplanes that lines of a length show."""

    def standard(u_QI: Tensor) -> Tensor:
        return ask(around.inputs(u_QI))

    found = _Transitions.look(standard, length, count, len(around.scale_I), generator, visible)
    centre_I = around.inputs(found.centre(standard)) if len(found.at_KI) else around.centre_I
    return Surroundings(centre_I, around.scale_I, around.low_I, around.high_I)


def _reach(
    ask: Ask, around: Surroundings, generator: torch.Generator, scales: Sequence[float], visible: float
) -> float | None:
    """The smallest scale at which second differences over the scale reach half of their largest value.

    The median over the outputs; None where nothing visibly bends, or as much at the smallest scale.
    """
    bends = []
    for scale in scales:
        u_QI, d_QI = torch.randn(2, TRIPLES, len(around.scale_I), generator=generator, dtype=torch.float64) * scale
        at_QO, up_QO, down_QO = ask(around.inputs(torch.cat([u_QI, u_QI + d_QI, u_QI - d_QI]))).chunk(3)
        second_QO = up_QO + down_QO - 2 * at_QO
        seen_QO = second_QO.abs() > visible * at_QO.abs().amax(0)
        bends.append((second_QO * seen_QO).square().mean(0).sqrt() / scale)
    bend_SO = torch.stack(bends)
    bend_SO = bend_SO[:, bend_SO.amax(0) > 0]
    if not bend_SO.shape[1]:
        return None
    first_O = (bend_SO >= bend_SO.amax(0) / 2).int().argmax(0)
    first = int(first_O.median())
    return scales[first] if first else None


def _strength_spread(ask: Ask, around: Surroundings, generator: torch.Generator) -> float:
    """Ratio of the strongest to the weakest input's action, those that do nothing visible aside."""
    inputs = len(around.scale_I)
    points = max(1, min(8, POINTS // inputs))
    u_QI = torch.randn(points, inputs, generator=generator, dtype=torch.float64)
    moved_QI = (u_QI[:, None] + 0.3 * torch.eye(inputs, dtype=torch.float64)).flatten(0, 1)
    change_QIO = ask(around.inputs(moved_QI)).unflatten(0, (points, -1)) - ask(around.inputs(u_QI))[:, None]
    strength_IO = change_QIO.square().mean(0).sqrt()
    strength_I = (strength_IO / strength_IO.amax(0).clamp(min=1e-300)).amax(1)
    seen_I = strength_I[strength_I > VISIBLE]
    return float(seen_I.max() / seen_I.min()) if len(seen_I) else 1.0


@dataclass(frozen=True)
class _Transitions:
    """Points x[K, I] where the black box bends, half a transition `step_KI` along the line that found each."""

    at_KI: Tensor
    step_KI: Tensor

    @staticmethod
    def look(
        ask: Ask, length: float, count: int, inputs: int, generator: torch.Generator, visible: float
    ) -> "_Transitions":
        """The sharpest bends of random lines, zoomed in on until they look straight."""
        from_KI, to_KI = length * torch.randn(2, count, inputs, generator=generator, dtype=torch.float64)
        at_KI, step_KI, found_K = _zoom(ask, from_KI, to_KI, visible)
        return _Transitions(at_KI[found_K], step_KI[found_K])

    def scaled(self, scale_I: Tensor) -> "_Transitions":
        """The same in standard inputs."""
        return _Transitions(self.at_KI / scale_I, self.step_KI / scale_I)

    def pass_within(self, ask: Ask, distance: float | None, generator: torch.Generator) -> bool:
        """Whether most hyperplanes pass 0 so near: from derivatives towards 0 and in a few random directions.

        None: within ORDINARY widths of their transitions.
        """
        if not len(self.at_KI):
            return True
        count, inputs = self.at_KI.shape
        toward_KI = self.at_KI / self.at_KI.norm(dim=1, keepdim=True)
        other_KDI = torch.randn(count, 6, inputs, generator=generator, dtype=torch.float64)
        other_KDI = torch.nn.functional.normalize(other_KDI, dim=2)
        jump_KDO = self._jumps(ask, torch.cat([toward_KI[:, None], other_KDI], dim=1))
        slope_KO = jump_KDO[:, 1:].square().mean(1).sqrt() * inputs**0.5
        height_K = self.at_KI.norm(dim=1) * (jump_KDO[:, 0].norm(dim=1) / slope_KO.norm(dim=1).clamp(min=1e-300))
        width_K = self.step_KI.norm(dim=1) / inputs**0.5
        return float((height_K / (1 if distance else width_K)).median()) <= (distance or ORDINARY)

    def _jumps(self, ask: Ask, directions_KDI: Tensor) -> Tensor:
        """Changes of the derivatives in directions[K, D, I] from one side of the transition to the other, [K, D, O]."""
        move_K11 = MOVE * self.step_KI.norm(dim=1)[:, None, None]
        sides = []
        for x_KI in (self.at_KI + 2 * self.step_KI, self.at_KI - 2 * self.step_KI):
            moved_KDI = torch.cat(
                [x_KI[:, None] + move_K11 * directions_KDI, x_KI[:, None] - move_K11 * directions_KDI]
            )
            up_KDO, down_KDO = ask(moved_KDI.flatten(0, 1)).unflatten(0, moved_KDI.shape[:2]).chunk(2)
            sides.append((up_KDO - down_KDO) / (2 * move_K11))
        return sides[0] - sides[1]

    def scales(self, ask: Ask) -> Tensor | None:
        """How far each input moves to change the answer as the transition does, up to one factor, [I].

        None where no single input changes it.
        """
        inputs = self.at_KI.shape[1]
        at_WI, step_WI = self.at_KI[:3], self.step_KI[:3]
        here_WO = ask(at_WI)
        size_WO = (ask(at_WI + step_WI) - ask(at_WI - step_WI)).abs().clamp(min=1e-300)
        move_WI = 0.1 * step_WI.norm(dim=1, keepdim=True).expand(-1, inputs) / inputs**0.5
        strength_WI = torch.zeros_like(move_WI)
        for _ in range(5 if inputs <= 64 else 2):
            moved_WII = at_WI[:, None] + torch.diag_embed(move_WI)
            change_WIO = (ask(moved_WII.flatten(0, 1)).unflatten(0, (-1, inputs)) - here_WO[:, None]).abs()
            share_WI = (change_WIO / size_WO[:, None]).amax(2)
            strength_WI = share_WI / move_WI
            factor_WI = (0.1 / share_WI.clamp(min=1e-4)).clamp(min=1 / 30)
            move_WI = move_WI * torch.where((share_WI > 0.01) & (share_WI < 0.5), torch.ones_like(move_WI), factor_WI)
        strength_I = strength_WI.square().mean(0).sqrt()
        alive_I = strength_I > 1e-9 * strength_I.max()
        if not alive_I.any():
            return None
        return 1 / torch.where(alive_I, strength_I, strength_I[alive_I].median())

    def centre(self, ask: Ask) -> Tensor:
        """The point nearest to the hyperplanes of all transitions, [I], by robust least squares.

        A normal's error moves its hyperplane the more, the farther the transition is from the centre.
        """
        inputs = self.at_KI.shape[1]
        eye_II = torch.eye(inputs, dtype=torch.float64)
        jump_KOI = self._jumps(ask, eye_II.expand(len(self.at_KI), -1, -1)).transpose(1, 2)
        jump_KOI = jump_KOI / jump_KOI.norm(dim=2, keepdim=True).mean(0).clamp(min=1e-300)  # outputs of any size
        _, values, right = torch.linalg.svd(jump_KOI, full_matrices=False)
        pure_K = (values[:, 1] < PURE * values[:, 0]) if values.shape[1] > 1 else torch.ones(len(values)) > 0
        pure_K = pure_K if pure_K.any() else ~pure_K
        normal_KI, at_KI = right[pure_K, 0], self.at_KI[pure_K]
        offset_K, centre_I = (normal_KI * at_KI).sum(1), torch.zeros(inputs, dtype=torch.float64)
        weight_K = torch.ones_like(offset_K)
        for _ in range(REWEIGHTED):
            weighted_IK = normal_KI.T * weight_K
            gram_II = weighted_IK @ normal_KI
            ridge = RIDGE * gram_II.diagonal().mean()
            centre_I = torch.linalg.solve(gram_II + ridge * eye_II, weighted_IK @ offset_K)
            miss_K = (normal_KI @ centre_I - offset_K).abs()
            usual = miss_K.quantile(LARGEST)
            tilt_K = TILT * (at_KI - centre_I).norm(dim=1)
            weight_K = 1 / (miss_K.square() + usual.square() + tilt_K.square()).clamp(min=1e-300)
        return centre_I


def _zoom(ask: Ask, from_KI: Tensor, to_KI: Tensor, visible: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sharpest bend between the ends of each line: where, the step to its neighbours, whether there is one.

    Five points a line; the bend that is sharpest among the inner three is the middle of the next line, half as long, of
    which three points are known. The first line has nine.
    """
    count, points = len(from_KI), 9
    share_T = torch.linspace(0, 1, points, dtype=torch.float64)
    line_KTI = from_KI[:, None] + share_T[:, None] * (to_KI - from_KI)[:, None]
    y_KTO = ask(line_KTI.flatten(0, 1)).unflatten(0, (count, points))
    at_KI, step_KI = (from_KI + to_KI) / 2, (to_KI - from_KI) / (points - 1)
    found_K, going_K = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    rows_K = torch.arange(count)
    for _ in range(HALVINGS):
        first_KTO, second_KTO = (y_KTO[:, 2:] - y_KTO[:, :-2]) / 2, y_KTO.diff(n=2, dim=1) / 2
        share_KT = (second_KTO.square() / (first_KTO.square() + second_KTO.square()).clamp(min=1e-300)).amax(2)
        size_KO = (y_KTO.amax(1) - y_KTO.amin(1)).clamp(min=1e-300)
        seen_KT = (2 * second_KTO.abs() > visible * y_KTO.abs().amax(1, keepdim=True)).any(2)
        bend_KT = (second_KTO.abs() / size_KO[:, None]).amax(2) * seen_KT
        best_K = bend_KT.argmax(1)
        going_K = going_K & (bend_KT.amax(1) > 0) & (share_KT[rows_K, best_K] > STRAIGHT)
        if not going_K.any():
            break
        known_KTO = torch.stack([y_KTO[rows_K, best_K + i] for i in range(3)], dim=1)
        middle_KI = line_KTI[rows_K, best_K + 1]
        half_KI = (line_KTI[:, 1] - line_KTI[:, 0]) / 2
        at_KI = torch.where(going_K[:, None], middle_KI, at_KI)
        step_KI = torch.where(going_K[:, None], 2 * half_KI, step_KI)
        found_K = found_K | going_K
        line_KTI = middle_KI[:, None] + torch.arange(-2, 3)[:, None] * half_KI[:, None]
        y_KTO = known_KTO.repeat_interleave(2, dim=1)[:, :5]
        y_KTO[going_K, 1::2] = ask(line_KTI[going_K, 1::2].flatten(0, 1)).unflatten(0, (-1, 2))
    return at_KI, step_KI, found_K
