"""The first of two hidden layers, from places where all of its neurons but one are saturated.

tanh and sigmoid are constant far out. On lines ten thousand times as long as usual every neuron of the first layer
switches at a place of its own. The Jacobian there has rank one, and its right factor is the neuron's direction; the
answers reach their limits on both sides like exp(-rate slope |t|), which tells the slope.

The biases follow from the second layer. In the first layer's pre-activations u the Jacobian divided by f'(u) is C D V
with a diagonal D: over all points these matrices span as many dimensions as the second layer has neurons, if slopes and
biases are right. What is left outside is made zero by least squares (variable projection: Golub and Pereyra 1973, in
Kaufman's simpler form). The number of dimensions is seen before, without any slope or bias: from points at which half
of the pre-activations stay, and in these only.

Legend: K places, S points, R relevant input directions, H first layer's neurons, O outputs, T places on a line.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distrecon.expand_cluster.coordinates import Coordinates, numerical_rank
from distrecon.expand_cluster.derivatives import Ask, jacobians
from distrecon.expand_cluster.least_squares import levenberg_marquardt
from distrecon.expand_cluster.profiles import derivative
from distrecon.expand_cluster.thresholds import ALONE, SAME_DIRECTION
from distrecon.expand_cluster.transitions import Transitions
from distrecon.nets.activations import Activation

LENGTHS = [1e4, 3e4]  # of the lines, in probes' deviations
ROUNDS, PLACES = 8, 4  # of lines, and places looked for in each, for every neuron
ENOUGH = 3  # places of every neuron
VISIBLE = 1e-9  # of the answers: second differences
STEP = 1e-2  # of a transition: of the differences there
USED = 8  # places of a neuron whose responses are looked at
NARROWEST, WIDEN, WIDENINGS = 0.1, 1.3, 50  # half widths of a response that are tried
LIMIT = 1e-10  # share of a response that may lie in the outer halves
WIDER = 1.5  # times the narrowest of a neuron's responses: in wider ones another neuron has a part
POINTS = 401  # of a response
TAIL = (1e-9, 1e-4)  # shares of a response in which its end is one exponential
TAIL_POINTS, TAIL_ERROR = 4, 1e-3  # of the logarithm, root mean square
DEGREE = 5  # of the polynomial in f(u) that a response nearly is
CENTRES = torch.linspace(-6, 6, 241, dtype=torch.float64)  # u at the place found, tried
WITHIN = 1.5  # |u| of the points at which slopes and biases are told
SAMPLES, SPARE = 3, 40  # points: times the dimensions, and beside them
DIFFERENCE = 1e-3  # steps of the differences there, in probes' deviations
FITS, ITERATIONS, CONVERGED = 2, 100, 1e-26


@dataclass(frozen=True)
class Units:
    """Neurons u = slope (n . z) + bias with unit directions n[H, R]."""

    direction_HR: Tensor
    slope_H: Tensor
    bias_H: Tensor

    @property
    def neurons_HK(self) -> Tensor:
        """[w, b] of each."""
        return torch.cat([self.slope_H[:, None] * self.direction_HR, self.bias_H[:, None]], dim=1)

    def points(self, u_SH: Tensor) -> Tensor:
        """z[S, R] with these pre-activations."""
        return ((u_SH - self.bias_H) / self.slope_H) @ torch.linalg.pinv(self.direction_HR).T


def first_layer(ask: Ask, rank: int, activation: Activation, generator: torch.Generator) -> Units | None:
    """The first layer's directions and slopes, and its biases roughly, of as many neurons as relevant directions.

    None where not so many are met. `ask` is a function of z[Q, R] -> y[Q, O], of which differences tell 1e-9.
    """
    at_KR, direction_KR, purity_K = (
        torch.empty(0, rank).double(),
        torch.empty(0, rank).double(),
        torch.empty(0).double(),
    )
    for _ in range(ROUNDS):
        met = Transitions.look(ask, LENGTHS, PLACES * rank, rank, generator, VISIBLE)
        if not len(met.at_KI):
            return None
        jacobians_KOR = jacobians(ask, met.at_KI, STEP * met.step_KI.norm(dim=1))
        _, values, right = torch.linalg.svd(jacobians_KOR, full_matrices=False)
        alone_K = values[:, 1] < ALONE * values[:, 0]
        purity_K = torch.cat([purity_K, (values[:, 1] / values[:, 0])[alone_K]])
        at_KR, direction_KR = torch.cat([at_KR, met.at_KI[alone_K]]), torch.cat([direction_KR, right[alone_K, 0]])
        same_KK = (direction_KR @ direction_KR.T).abs() > 1 - SAME_DIRECTION
        first_K = ~same_KK.tril(-1).any(1)
        found = int(first_K.sum())
        if found > rank:
            return None
        if found == rank and int(same_KK[first_K].sum(1).min()) >= ENOUGH:
            break
    if found < rank:
        return None
    units = []
    for same_K in same_KK[first_K]:
        order_K = purity_K[same_K].argsort()
        unit = _unit(ask, activation, direction_KR[same_K][order_K][0], at_KR[same_K][order_K][:USED])
        if unit is None:
            return None
        units.append(unit)
    slope_H, bias_H = torch.tensor([(unit[1], unit[2]) for unit in units], dtype=torch.float64).T
    return Units(torch.stack([unit[0] for unit in units]), slope_H, bias_H)


def _unit(ask: Ask, activation: Activation, direction_R: Tensor, at_KR: Tensor) -> tuple[Tensor, float, float] | None:
    """Direction, slope and rough bias of a neuron from answers across its hyperplane; None if they tell no slope."""
    along_K = at_KR @ direction_R
    middle = float(along_K.median())
    flat_KR = at_KR - along_K[:, None] * direction_R

    def respond(t_T: Tensor) -> Tensor:
        return ask((flat_KR[:, None] + (middle + t_T)[:, None] * direction_R).flatten(0, 1)).unflatten(
            0, (-1, len(t_T))
        )

    half_K = _half_widths(respond, len(at_KR))
    half = float(half_K.min())
    if not half < torch.inf:
        return None
    t_T = torch.linspace(-half, half, POINTS, dtype=torch.float64)
    y_KTO = respond(t_T)[half_K <= WIDER * half]
    slope = _slope(activation, t_T, y_KTO)
    if slope is None:
        return None
    y_TF = y_KTO.transpose(0, 1).flatten(1)
    y_TF = y_TF - y_TF.mean(0)
    losses = []
    for centre in CENTRES:
        f_T = activation(slope * t_T + centre)
        powers_TD = torch.stack([(2 * (f_T - f_T.mean())) ** power for power in range(DEGREE + 1)], dim=1)
        basis_TD, _ = torch.linalg.qr(powers_TD)
        losses.append(float((y_TF - basis_TD @ (basis_TD.T @ y_TF)).square().sum()))
    centre = float(CENTRES[torch.tensor(losses).argmin()])
    return direction_R, slope, centre - slope * middle


def _half_widths(respond: Ask, count: int) -> Tensor:
    """[K]: how far on both sides all but a little of every response lies; infinite where another neuron's follows."""
    half, half_K = NARROWEST, torch.full((count,), torch.inf, dtype=torch.float64)
    for _ in range(WIDENINGS):
        ends_KTO = respond(half * torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=torch.float64))
        change_KT = ends_KTO.diff(dim=1).norm(dim=2)
        ended_K = (change_KT[:, 0] + change_KT[:, 2]) < LIMIT * change_KT.sum(1)
        half_K = torch.where(ended_K, half_K.clamp(max=half), half_K)
        if ended_K.all() or half > WIDER**2 * float(half_K.min()):
            break
        half *= WIDEN
    return half_K


def _slope(activation: Activation, t_T: Tensor, y_KTO: Tensor) -> float | None:
    """From the exponentials with which responses approach their ends: the median over places and sides."""
    tail = derivative(activation, 1)(torch.tensor([14.0, 15.0], dtype=torch.float64)).detach()
    rate = float((tail[0] / tail[1]).log())
    size_K = (y_KTO[:, -1] - y_KTO[:, 0]).norm(dim=1)
    slopes = []
    for end, side in ((0, -1.0), (-1, 1.0)):
        share_KT = (y_KTO - y_KTO[:, end][:, None]).norm(dim=2) / size_K[:, None]
        inside_KT = (share_KT > TAIL[0]) & (share_KT < TAIL[1]) & (side * t_T > 0)
        for share_T, inside_T in zip(share_KT, inside_KT, strict=True):
            if int(inside_T.sum()) < TAIL_POINTS:
                continue
            line_T2 = torch.stack([t_T[inside_T], torch.ones_like(t_T[inside_T])], dim=1)
            solution = torch.linalg.lstsq(line_T2, share_T[inside_T].log()[:, None]).solution
            error = (line_T2 @ solution - share_T[inside_T].log()[:, None]).square().mean().sqrt()
            if error < TAIL_ERROR:
                slopes.append(float(solution[0].abs()) / rate)
    return float(torch.tensor(slopes, dtype=torch.float64).median()) if slopes else None


@dataclass(frozen=True)
class Sample:
    """Points as t[S, H] along the directions, and the Jacobians with respect to these, [S, O, H]."""

    t_SH: Tensor
    jacobians_SOH: Tensor

    @staticmethod
    def draw(ask: Ask, units: Units, count: int, generator: torch.Generator, kept_H: Tensor | None = None) -> "Sample":
        """Points of moderate pre-activations; `kept_H`: neurons whose pre-activation is the same at all of them."""
        u_SH = WITHIN * (2 * torch.rand(count, len(units.slope_H), generator=generator, dtype=torch.float64) - 1)
        if kept_H is not None:
            u_SH[:, kept_H] = u_SH[0, kept_H]
        z_SR = units.points(u_SH)
        found_SOR = jacobians(ask, z_SR, torch.full((count,), DIFFERENCE, dtype=torch.float64))
        return Sample(z_SR @ units.direction_HR.T, found_SOR @ torch.linalg.pinv(units.direction_HR))

    def hidden(self, units: Units, activation: Activation) -> tuple[Tensor, Tensor]:
        """The first layer's answers h[S, H], and the Jacobians with respect to them, [S, O, H]."""
        u_SH = units.slope_H * self.t_SH + units.bias_H
        slope_SH = units.slope_H * derivative(activation, 1)(u_SH).detach()
        return activation(u_SH), self.jacobians_SOH / slope_SH[:, None]


def second_size(ask: Ask, units: Units, generator: torch.Generator) -> int | None:
    """Neurons of the second layer: the rank of Jacobians whose factors 1 / f'(u) are the same at all points."""
    kept_H = torch.arange(0, len(units.slope_H), 2)
    sample = Sample.draw(ask, units, 2 * len(units.slope_H) + SPARE, generator, kept_H)
    kept_SF = sample.jacobians_SOH[:, :, kept_H].flatten(1)
    found = numerical_rank(kept_SF)
    return found if found < min(kept_SF.shape) else None


@dataclass(frozen=True)
class SpanFit:
    """theta [slopes, biases]: the share of the Jacobians outside `rank` dimensions (see least_squares.LeastSquares)."""

    sample: Sample
    activation: Activation
    rank: int

    def loss(self, theta_NP: Tensor) -> Tensor:
        return torch.stack([self._outside(theta_P)[0] for theta_P in theta_NP])

    def normal_equations(self, theta_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [self._normal(theta_P) for theta_P in theta_NP]
        return tuple(torch.stack(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def _outside(self, theta_P: Tensor) -> tuple[Tensor, ...]:
        """The squared share outside, the matrix [S, O H] of unit norm, its norm before, and its singular vectors."""
        hidden = self.sample.t_SH.shape[1]
        u_SH = theta_P[:hidden] * self.sample.t_SH + theta_P[hidden:]
        slope_SH = derivative(self.activation, 1)(u_SH).detach()
        matrix_SF = (self.sample.jacobians_SOH / slope_SH[:, None]).flatten(1)
        norm = matrix_SF.norm()
        if not torch.isfinite(norm):
            return norm, matrix_SF, norm, matrix_SF, matrix_SF, u_SH, slope_SH
        left, values, right = torch.linalg.svd(matrix_SF / norm, full_matrices=False)
        outside = values[self.rank :].square().sum()
        return outside, matrix_SF / norm, norm, left[:, : self.rank], right[: self.rank], u_SH, slope_SH

    def _normal(self, theta_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outside, matrix_SF, norm, left_SD, right_DF, u_SH, slope_SH = self._outside(theta_P)
        samples_SOH, t_SH = self.sample.jacobians_SOH, self.sample.t_SH
        hidden, outputs = t_SH.shape[1], samples_SOH.shape[1]
        rest_SF = matrix_SF - left_SD @ (left_SD.T @ matrix_SF)
        rest_SF = rest_SF - (rest_SF @ right_DF.T) @ right_DF
        bend_SH = -derivative(self.activation, 2)(u_SH).detach() / slope_SH.square() / norm
        by_bias_HSO = (samples_SOH * bend_SH[:, None]).permute(2, 0, 1)
        moved_PSO = torch.cat([by_bias_HSO * t_SH.T[:, :, None], by_bias_HSO])
        moved_PSO = moved_PSO - left_SD @ (left_SD.T @ moved_PSO)
        # the right projector touches the columns of one neuron: its rows I - V V^T of these
        columns_HDO = right_DF.unflatten(1, (outputs, hidden)).permute(2, 0, 1).repeat(2, 1, 1)
        into_PSD = moved_PSO @ columns_HDO.transpose(1, 2)
        gram_PP = _same_neuron(moved_PSO, hidden) - into_PSD.flatten(1) @ into_PSD.flatten(1).T
        rest_HSO = rest_SF.unflatten(1, (outputs, hidden)).permute(2, 0, 1).repeat(2, 1, 1)
        return outside, (moved_PSO * rest_HSO).sum((1, 2)), gram_PP


def _same_neuron(moved_PSO: Tensor, hidden: int) -> Tensor:
    """Products [P, P] of changes in the same columns: those of one neuron's slope and bias."""
    rows = moved_PSO.flatten(1)
    number_P = torch.arange(len(rows)) % hidden
    return (rows @ rows.T) * (number_P[:, None] == number_P)


def exact_units(
    ask: Ask, units: Units, size: int, activation: Activation, generator: torch.Generator
) -> tuple[Units, Sample, float]:
    """Slopes and biases by which the Jacobians span `size` dimensions; the last sample; the squared share outside."""
    outside, hidden = 1.0, len(units.slope_H)
    for _ in range(FITS):
        sample = Sample.draw(ask, units, SAMPLES * size + hidden + SPARE, generator)
        fit = SpanFit(sample, activation, size)
        solution = levenberg_marquardt(fit, torch.cat([units.slope_H, units.bias_H])[None], ITERATIONS, CONVERGED)
        units = Units(units.direction_HR, *solution.theta_NP[0].split(hidden))
        outside = float(solution.loss_N)
    return units, sample, outside


def asked(box: Ask, coordinates: Coordinates) -> Ask:
    """The black box as a function of z."""
    return partial(_at, box, coordinates.back_IR)


def _at(box: Ask, back_IR: Tensor, z_QR: Tensor) -> Tensor:
    return box(z_QR @ back_IR.T)
