"""Measurements that tell one kind of function from another, each by a few dozen or hundred queries.

All are made in standard inputs u (see surroundings.py), inside the domain if there is one, and in answers divided by
their standard deviations, so that outputs of any size count alike.

Legend: Q queries, I inputs, O outputs, L lines, T points of a line, P pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.odds import Odds
from distrecon.expand_cluster.surroundings import Surroundings

Ask = Callable[[Tensor], Tensor]
POINTS = 160  # standard draws that the answers' means and deviations are taken from
COARSE = 8.0  # steps of the answers' format, taken for the inputs' too, between the points of sixth differences
NOISE_LINES, NOISE_SPACING = 24, 1e-4  # sixth differences: h^6 is far below rounding, h above the rounding of inputs
TRIMMED, TRIMMED_NORMAL = 0.8, 0.6616  # share of them that is used; their root mean square, of normal numbers
LATTICE = 0.01  # of a quantum: answers this near its multiples are rounded to it
FORMAT_STEPS = 4.0  # steps of the numbers' own format that a quantum must exceed
LEVELS = 1e9  # a range of more quanta than this is no rounding
FEWEST = 3  # different multiples: any two numbers are such
ALIKE = 4  # different answers that one multiple may have: not 1e-20, 1e-30, ... all called 0
PAIRS, HALVINGS = 8, 36
STEPS, LEFT = 32.0, 0.3  # steps of the inputs' format, and what of a difference over so many is still there at a jump
LINES, GRID = 3, 38  # lines, and points to either side of their middles
LONG, SHORT = 0.05, 0.005  # steps of long and of short differences on them
ZOOMS = 7
KINK_ZOOMS, CURVE_ZOOMS = 4, 5  # in which a bend must be seen
STRAIGHT = 30.0  # second differences below this many times the noise are none
RESOLVED = 1e4  # first differences this many times larger would show a curve
FAR = 1e6  # where bounded activations are constant to the last digit
TURN = 1e-4
BEYOND, RESOLUTION = 1e3, 1e-6  # where limits of the inputs are behind one, and to what they are found


@dataclass(frozen=True)
class Sample:
    """A black box in standard inputs: how to ask it, inside which domain, its answers' scale and noise per output."""

    ask: Ask
    around: Surroundings
    generator: torch.Generator
    u_QI: Tensor
    y_QO: Tensor
    scale_O: Tensor
    noise_O: Tensor
    quantum_O: Tensor
    odds: Odds | None = None

    @staticmethod
    def draw(ask: Ask, around: Surroundings, generator: torch.Generator, odds: Odds | None = None) -> "Sample":
        """Standard draws, then the noise of the answers; with `odds` these are scores."""
        inputs, inside = len(around.scale_I), around.inside
        u_QI = inside(torch.randn(POINTS, inputs, generator=generator, dtype=torch.float64), 0.0)
        y_QO = ask(u_QI)
        scale_O = y_QO.std(0, correction=0)
        scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
        quantum_O = torch.tensor([quantum(y_Q) for y_Q in y_QO.T], dtype=torch.float64)
        coarse_O = torch.tensor([number_format(y_Q).eps for y_Q in y_QO.T], dtype=torch.float64)
        spacing = max(NOISE_SPACING, COARSE * float(coarse_O.max()))
        noise_O = torch.maximum(rounding(ask, inside, inputs, generator, spacing), quantum_O / 12**0.5)
        return Sample(ask, around, generator, u_QI, y_QO, scale_O, noise_O, quantum_O, odds)

    @property
    def inputs(self) -> int:
        return len(self.around.scale_I)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.inputs, generator=self.generator, dtype=torch.float64)

    def noise(self, y_QO: Tensor) -> Tensor:
        """Standard deviation of the noise of answers: in proportion to them where they are larger than usual.

        That of scores is at least what probabilities near 0 or 1 leave of them, and infinite where these tell none.
        """
        usual_O = self.y_QO.abs().amax(0).clamp(min=1e-300)
        noise_QO = torch.maximum(self.noise_O, torch.tensor(1e-16) * usual_O) * (y_QO.abs() / usual_O).clamp(min=1.0)
        if self.odds is None:
            return noise_QO
        p_QC = self.odds.of_classes(self.odds.all_classes(y_QO.flatten(0, -2)))
        error_QO = self.odds.error(p_QC).where(self.odds.known(p_QC)[:, None], math.inf)
        return torch.maximum(noise_QO, error_QO.view_as(y_QO))


def rounding(
    ask: Ask, inside: Callable[[Tensor, float], Tensor], inputs: int, generator: torch.Generator, spacing: float
) -> Tensor:
    """Standard deviation [O] of the answers' rounding noise, by sixth differences on short lines.

    Moré and Wild, Estimating computational noise, 2011.
    """
    start_LI, direction_LI = torch.randn(2, NOISE_LINES, inputs, generator=generator, dtype=torch.float64)
    direction_LI = torch.nn.functional.normalize(direction_LI, dim=1)
    times_T1 = torch.arange(7, dtype=torch.float64)[:, None] * spacing
    line_LTI = inside(start_LI, 7 * spacing)[:, None] + times_T1 * direction_LI[:, None]
    differences_LO = torch.diff(ask(line_LTI.flatten(0, 1)).unflatten(0, (-1, 7)), n=6, dim=1)[:, 0]
    smaller_LO = differences_LO.square().sort(dim=0).values[: int(TRIMMED * NOISE_LINES)]  # larger ones may be kinks
    return smaller_LO.mean(0).sqrt() / (TRIMMED_NORMAL * math.sqrt(924))


def quantum(y_Q: Tensor) -> float:
    """The step whose multiples all answers are; 0 where there is none but floating point's own."""
    steps_Q = y_Q.unique().diff()
    if not len(steps_Q):
        return 0.0
    span = float(y_Q.max() - y_Q.min())
    least = max(span / LEVELS, FORMAT_STEPS * number_format(y_Q).eps * float(y_Q.abs().max()))
    rest_Q, step = steps_Q.sort().values, 0.0
    while len(rest_Q) and float(rest_Q[-1]) > least:  # Euclid's algorithm on all differences at once
        step = float(rest_Q[rest_Q > least][0])
        rest_Q = (rest_Q - step * (rest_Q / step).round()).abs().unique()
        rest_Q = rest_Q[rest_Q > LATTICE * step]
    if not step or len(rest_Q):
        return 0.0
    count_Q = ((y_Q - y_Q.min()) / step).round()
    multiples = len(count_Q.unique())
    if multiples < FEWEST or len(y_Q.unique()) > ALIKE * multiples:
        return 0.0
    step = float((count_Q * (y_Q - y_Q.min())).sum() / count_Q.square().sum())  # least squares: all digits of it
    off = float((y_Q - y_Q.min() - count_Q * step).abs().max())
    return step if off <= LATTICE * step else 0.0


def number_format(y_Q: Tensor) -> torch.finfo:
    """The coarsest floating-point format that holds all numbers to the last digit."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(y_Q.to(dtype).double(), y_Q):
            return torch.finfo(dtype)
    return torch.finfo(torch.float64)


def repetition(ask_again: Ask, sample: Sample) -> tuple[float, float]:
    """How far answers differ, relatively, when queries are asked again, and when they are asked with other ones."""
    rows_QI, first_QO = sample.u_QI[:16], sample.y_QO[:16]
    again_QO, once_more_QO = ask_again(rows_QI), ask_again(rows_QI)
    scale_O = torch.maximum(sample.scale_O, first_QO.abs().amax(0))
    again, other = (float(((y_QO - again_QO).abs() / scale_O).max()) for y_QO in (once_more_QO, first_QO))
    return again, other


def largest_bend(sample: Sample, scales: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)) -> float:
    """The largest second difference of random triples, in units of what rounding could make of it."""
    largest = 0.0
    for scale in scales:
        u_QI, d_QI = scale * sample.normal(12), scale * sample.normal(12)
        a_QI, b_QI = sample.around.inside(u_QI - d_QI, 0.0), sample.around.inside(u_QI + d_QI, 0.0)
        a_QO, m_QO, b_QO = sample.ask(torch.cat([a_QI, (a_QI + b_QI) / 2, b_QI])).chunk(3)
        size_QO = torch.maximum(sample.noise(a_QO) + sample.noise(b_QO) + sample.noise(m_QO), sample.quantum_O)
        largest = max(largest, float(((a_QO + b_QO - 2 * m_QO).abs() / size_QO.clamp(min=1e-300)).max()))
    return largest


def jumps(sample: Sample) -> Tensor:
    """What is left of the difference between two answers as their queries are brought together, [P, O].

    The half of the interval with the larger difference is halved again, HALVINGS times. Inputs may be rounded to the
    answers' format, and a steep slope then looks like steps: but it has many of them, so that most of the difference at
    STEPS of these is gone at the last.
    """
    steps = max(number_format(y_Q).eps for y_Q in sample.y_QO.T) * STEPS
    change_P = ((sample.y_QO[1::2] - sample.y_QO[::2]).abs() / sample.scale_O).amax(1)
    chosen = change_P.topk(PAIRS).indices
    a_PI, b_PI = sample.u_QI[::2][chosen], sample.u_QI[1::2][chosen]
    a_PO, b_PO = sample.y_QO[::2][chosen], sample.y_QO[1::2][chosen]
    before_PO = b_PO - a_PO
    for _ in range(HALVINGS):
        m_PI = (a_PI + b_PI) / 2
        m_PO = sample.ask(m_PI)
        left_P1 = (((m_PO - a_PO).abs() - (b_PO - m_PO).abs()) / sample.scale_O).sum(1, keepdim=True) > 0
        a_PI, b_PI = torch.where(left_P1, a_PI, m_PI), torch.where(left_P1, m_PI, b_PI)
        a_PO, b_PO = torch.where(left_P1, a_PO, m_PO), torch.where(left_P1, m_PO, b_PO)
        apart_P, size_P = (b_PI - a_PI).norm(dim=1), sample.around.inputs(a_PI).norm(dim=1)
        before_PO = torch.where((apart_P > steps * size_P)[:, None], b_PO - a_PO, before_PO)
    jump_PO = (b_PO - a_PO).abs()
    return jump_PO.where(jump_PO >= LEFT * before_PO.abs(), 0.0)


def constant_share(sample: Sample, step: float = 1e-4) -> float:
    """Share of standard points round which the answers do not change at all."""
    u_QI = sample.around.inside(sample.u_QI[:32], step * 4)
    moved_QI = u_QI + step * torch.nn.functional.normalize(sample.normal(32), dim=1)
    return float((sample.ask(u_QI) == sample.ask(moved_QI)).all(1).double().mean())


@dataclass(frozen=True)
class Kink:
    """A kink on a line in some direction, and a step along it in which it lies, to either side of a point."""

    at_I: Tensor
    direction_I: Tensor
    step_I: Tensor


@dataclass(frozen=True)
class Shape:
    """Bends met on lines: those of the sharpest that stay as sharp on any scale, how many surely do not, and the share
    of straight places.
    """

    kinks: list[Kink]
    curves: int
    looked_at: int
    straight: float
    places: int


def shape(sample: Sample) -> Shape:
    """Kinks and straight pieces on standard lines.

    A kink's change of slope stays the same as one looks closer, a curve's shrinks with the distance. Straight places
    are those whose second difference is rounding though a curve's would be seen.
    """
    times_T1 = torch.arange(-GRID, GRID + 1, dtype=torch.float64)[:, None]
    start_LI, direction_LI = sample.normal(2 * LINES), sample.normal(2 * LINES)
    short = _short(sample)
    straight, places, kinks, curves = 0, 0, list[Kink](), 0
    for step, rows in ((short, slice(0, LINES)), (LONG, slice(LINES, None))):
        ends_2LI = [
            sample.around.inside(start_LI[rows] + sign * GRID * step * direction_LI[rows], 0.0) for sign in (-1, 1)
        ]
        middle_LI, half_LI = (ends_2LI[0] + ends_2LI[1]) / 2, (ends_2LI[1] - ends_2LI[0]) / (2 * GRID)
        line_LTI = middle_LI[:, None] + times_T1 * half_LI[:, None]
        y_LTO = sample.ask(line_LTI.flatten(0, 1)).unflatten(0, (-1, len(times_T1)))
        noise_LTO = _of_three(sample.noise(y_LTO), 1)
        second_LTO = y_LTO.diff(n=2, dim=1).abs()
        if step == short:
            first_LTO = (y_LTO[:, 2:] - y_LTO[:, :-2]).abs()
            sees_LT = (first_LTO > RESOLVED * STRAIGHT * noise_LTO).any(2)
            flat_LT = (second_LTO <= STRAIGHT * noise_LTO).all(2)
            straight, places = int((flat_LT & sees_LT).sum()), int(sees_LT.sum())
        for line in range(LINES):
            top = (second_LTO[line] / sample.scale_O).amax(1).argmax()
            kind, at_I, step_I = _bend(sample, line_LTI[line, top + 1], half_LI[line])
            kinks += [Kink(at_I, direction_LI[rows][line], step_I)] if kind == "kink" else []
            curves += kind == "curve"
    return Shape(kinks, curves, 2 * LINES, straight / max(places, 1), places)


def curved(sample: Sample, places: int, enough: int) -> int | None:
    """At how many of so many ordinary places the black box surely is a curve; no more than `enough` are looked for.

    None where noise may hide curves.
    """
    short = _short(sample)
    if short > SHORT:
        return None
    found = 0
    for u_I, direction_I in zip(sample.u_QI, sample.normal(places), strict=False):
        found += _bend(sample, u_I, short * direction_I)[0] == "curve"
        if found == enough:
            break
    return found


def _short(sample: Sample) -> float:
    """The shortest step that shows a curve in spite of the noise."""
    noise = float((sample.noise_O / sample.scale_O).median())
    return min(max(SHORT, math.sqrt(STRAIGHT * RESOLVED * noise)), LONG)


def _bend(sample: Sample, at_I: Tensor, step_I: Tensor) -> tuple[str, Tensor, Tensor]:
    """What the sharpest bend near a point is, as steps get 4 times shorter each time: a "kink", whose change of slope
    stays, a "curve", whose change is still shrinking with the steps when these are the shortest, or "unclear". Also
    where it is, within a step to either side.
    """
    offsets_T1 = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    changes: list[float] = []
    for zoom in range(ZOOMS):
        line_TI = at_I + offsets_T1 * step_I
        y_TO = sample.ask(line_TI)
        second_TO = y_TO.diff(n=2, dim=0).abs()
        seen_TO = second_TO > 10 * STRAIGHT * _of_three(sample.noise(y_TO), 0)
        if not seen_TO.any():
            break
        change_TO = second_TO * seen_TO / sample.scale_O
        best = int(change_TO.amax(1).argmax())
        changes.append(float(change_TO.amax()) * 4.0**zoom)
        at_I, step_I = line_TI[best + 1], step_I / 4
    if len(changes) >= KINK_ZOOMS and changes[-1] > 0.3 * changes[0]:
        return "kink", at_I, step_I
    curve = len(changes) >= CURVE_ZOOMS and changes[-1] < 0.5 * changes[-2]
    return "curve" if curve else "unclear", at_I, step_I


def _of_three(noise: Tensor, dim: int) -> Tensor:
    """The largest noise of every three neighbours along `dim`: that of their second difference."""
    return noise.unfold(dim, 3, 1).amax(-1)


def far_slopes(sample: Sample) -> tuple[Tensor, float, float]:
    """Slopes [D, O] far out, by how much they are not odd, and not additive, both relative.

    With a bounded activation only a linear path round the network grows: its slopes are linear in the direction.
    """
    d_DI = torch.nn.functional.normalize(sample.normal(8), dim=1)
    d_DI = torch.cat([d_DI, -d_DI, d_DI[:4] + d_DI[4:]])
    near_DO, far_DO = sample.ask(FAR * d_DI), sample.ask(2 * FAR * d_DI)
    slope_DO = (far_DO - near_DO) / FAR
    size = float(slope_DO.abs().max())
    odd = float((slope_DO[:8] + slope_DO[8:16]).abs().max()) / max(size, 1e-300)
    additive = float((slope_DO[16:] - slope_DO[:4] - slope_DO[4:8]).abs().max()) / max(size, 1e-300)
    return slope_DO, odd, additive


def linear_path(sample: Sample) -> Tensor:
    """The matrix [O, I] of the linear path round a network with bounded activations, in standard inputs."""
    eye_II = torch.eye(sample.inputs, dtype=torch.float64) + 1e-3 * sample.normal(sample.inputs)
    slope_IO = (sample.ask(2 * FAR * eye_II) - sample.ask(FAR * eye_II)) / FAR
    return torch.linalg.solve(eye_II, slope_IO).T


def invariances(ask: Ask, centre_I: Tensor, scale_I: Tensor, generator: torch.Generator) -> dict[str, float]:
    """How far out answers follow a scaling of all inputs, or a shift, relative to a small turn of the same length.

    Asked in the inputs themselves. Empty where small turns do not change the answers.
    """
    size = FAR * float((centre_I.abs() + scale_I).max())
    x_QI, d_QI = torch.randn(2, 16, len(centre_I), generator=generator, dtype=torch.float64)
    x_QI = size * x_QI
    here_QO, twice_QO = ask(x_QI), ask(2 * x_QI)
    turned_QO, shifted_QO = ask(x_QI + TURN * size * d_QI), ask(x_QI + TURN * size * d_QI[:, :1])
    spread_O = here_QO.std(0).clamp(min=1e-300)

    def change(y_QO: Tensor) -> float:
        return float(((y_QO - here_QO).abs() / spread_O).amax(1).median())

    turn = change(turned_QO)
    if not turn > TURN**2:
        return {}
    return {"scaling": change(twice_QO) / turn, "shift": change(shifted_QO) / turn}


def clamp(sample: Sample, coordinate: int, places: int) -> tuple[float, float] | None:
    """The standard inputs beyond which a coordinate no longer matters, if it does right up to them; None: no such.

    Most places must show the same limits: a neuron's bend would move, and a piecewise linear function may be constant
    before them at some.
    """
    found: list[float] = []
    for sign in (-1.0, 1.0):
        limits = [_limit(sample, base_I, coordinate, sign) for base_I in sample.u_QI[:places]]
        outermost = max((sign * limit for limit in limits if limit is not None), default=math.nan)
        agree = [limit for limit in limits if limit is not None and abs(sign * limit - outermost) < 4 * RESOLUTION]
        if None in limits or 2 * len(agree) <= places:
            return None
        found.append(sign * outermost)
    low, high = found
    return (low, high) if low < high else None


def _limit(sample: Sample, base_I: Tensor, coordinate: int, sign: float) -> float | None:
    """Where the answers become constant along a coordinate, if they do so from one moment to the next."""

    def differ(*values: float) -> Tensor:
        """How far the answers there are from those far out, relative to the outputs' deviations."""
        u_QI = base_I.repeat(len(values) + 1, 1)
        u_QI[:, coordinate] = torch.tensor([far, *values], dtype=torch.float64)
        y_QO = sample.ask(u_QI)
        change_QO = (y_QO[1:] - y_QO[0]).abs()
        return ((change_QO - STRAIGHT * sample.noise(y_QO[1:])).clamp(min=0) / sample.scale_O).amax(1)

    far = sign * BEYOND
    beyond = differ(3 * far, 1e3 * far, -far, float(base_I[coordinate]))
    if beyond[:2].any() or not beyond[2:].any():
        return None
    inner, outer = -far if beyond[2] else float(base_I[coordinate]), far
    while abs(outer - inner) > RESOLUTION:
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if differ(middle)[0] else (inner, middle)
    twice, once = differ(outer - sign * 2 * LONG, outer - sign * LONG)
    return outer if twice > 1.5 * once > 1e-6 else None
