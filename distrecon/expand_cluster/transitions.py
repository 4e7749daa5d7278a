"""Transitions: places where one neuron of a black box bends or switches, met on long lines, and what they tell of it.

Far from the centre of a network the transitions of its first layer lie apart, each along a hyperplane. About one of
them all other neurons are straight or constant, and the change of the gradient across it is a multiple of that
neuron's weights: with the place that is the hyperplane, and the transition's width is one over the weights' size.

Legend: L lines, T points of a line, K transitions, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Ask = Callable[[Tensor], Tensor]

GRID = 33  # points of a line
PEAKS, MOST_PEAKS = 3, 6  # transitions that are looked for on a line, and how many one may have where others lack
HALVINGS = 16  # of the distance between points round a transition, at most
SHARP = 0.29  # of the second difference before, when steps are halved: 1/3 or more of a kink, 1/4 of a curve
WITHIN = 0.7  # quantile of the hyperplanes, so that a few far ones are ordinary
CLEARLY = 3.0  # widths of its transition that a hyperplane must be off to be off at all
LEAST = 1e-3  # of the transitions' distance from the centre: the least scale that kinks show
KINK = 1e-5  # width of a transition over its distance: about kinks nothing tells the weights' size
TOLD = 200.0  # x what is visible: a transition whose second differences are less tells too little of its hyperplane
PURE = 0.05  # ratio of singular values of the gradients' change at a transition of one neuron
RIDGE = 1e-5  # shrinks a centre towards the one before, where hyperplanes leave it undetermined
WIDTHS = 2.0  # of a transition, as measured by the steps at its sharpest bend: the least scale that it shows
SAME = 0.999  # cosine of two normals of one neuron
USUAL = 0.8  # quantile of the misses that counts as usual, which are never taken to be less than a width
REWEIGHTED = 30  # times, so that a few wrong hyperplanes do not matter
WITNESSES = 6  # transitions at which inputs are moved one by one
ALIKE = 30.0  # spread of the strengths of inputs that are taken to have one scale


@dataclass(frozen=True)
class Hyperplanes:
    """Where normal_KI . x = offset_K, and how wide their transitions are across; all 1 if they are kinks."""

    normal_KI: Tensor
    offset_K: Tensor
    width_K: Tensor
    distance: float  # of the transitions, in one coordinate's deviation
    kinks: bool

    def centre(self) -> Tensor:
        """The point nearest to the hyperplanes in units of their widths, [I], by robust least squares.

        Where they leave it undetermined, the one nearest to 0.
        """
        normal_KI, offset_K = self.normal_KI / self.width_K[:, None], self.offset_K / self.width_K
        alone_K = 1 / ((self.normal_KI @ self.normal_KI.T).abs() > SAME).sum(1)  # every neuron counts once
        weight_K = alone_K
        eye_II = torch.eye(normal_KI.shape[1], dtype=torch.float64)
        for _ in range(REWEIGHTED):
            weighted_IK = normal_KI.T * weight_K
            gram_II = weighted_IK @ normal_KI
            ridge = RIDGE * gram_II.diagonal().mean()
            centre_I = torch.linalg.solve(gram_II + ridge * eye_II, weighted_IK @ offset_K)
            miss_K = (normal_KI @ centre_I - offset_K).abs()
            usual = miss_K.quantile(USUAL).clamp(min=1e-12 * float(offset_K.abs().max()) if self.kinks else 1.0)
            weight_K = alone_K / (1 + (miss_K / usual).square())
        return centre_I

    def size(self, centre_I: Tensor) -> float:
        """The scale round a centre at which most hyperplanes and transitions are met, in one coordinate's deviation."""
        height_K = (self.normal_KI @ centre_I - self.offset_K).abs()
        if self.kinks:
            return max(float(height_K.quantile(WITHIN)), LEAST * self.distance)
        return max(float(height_K.quantile(WITHIN)), WIDTHS * float(self.width_K.median()))

    def relative_scales(self) -> Tensor:
        """Scales of the inputs relative to those in which the hyperplanes are given, [I]: equal if they nearly are."""
        strength_I = self.normal_KI.square().mean(0).sqrt()
        return _evened(strength_I)


@dataclass(frozen=True)
class Transitions:
    """Points x[K, I] where the black box bends, half a transition `step_KI` along the line that found each.

    `sharp`: most are still as sharp at the last steps that are seen, as kinks are, and show no width.
    """

    at_KI: Tensor
    step_KI: Tensor
    sharp: bool = False

    @staticmethod
    def none(inputs: int) -> "Transitions":
        """No transitions."""
        return Transitions(*torch.empty(2, 0, inputs, dtype=torch.float64))

    @staticmethod
    def look(
        ask: Ask, lengths: list[float], count: int, inputs: int, generator: torch.Generator, visible: float
    ) -> "Transitions":
        """The sharpest bends of random lines of these lengths, zoomed in on until they look like curves."""
        lines = -(-count // PEAKS)
        size_L1 = torch.tensor(lengths, dtype=torch.float64).repeat(lines)[:lines, None]
        from_LI, to_LI = size_L1 * torch.randn(2, lines, inputs, generator=generator, dtype=torch.float64)
        share_T1 = torch.linspace(0, 1, GRID, dtype=torch.float64)[:, None]
        line_LTI = from_LI[:, None] + share_T1 * (to_LI - from_LI)[:, None]
        y_LTO = ask(line_LTI.flatten(0, 1)).unflatten(0, (lines, GRID))
        range_LO = (y_LTO.amax(1) - y_LTO.amin(1)).clamp(min=1e-300)
        second_LTO = y_LTO.diff(n=2, dim=1).abs()
        seen_LTO = second_LTO > visible * y_LTO.abs().amax(1, keepdim=True)
        bend_LT = (second_LTO * seen_LTO / range_LO[:, None]).amax(2)
        line_K, place_K = _peaks(bend_LT, count)
        step_LI = (to_LI - from_LI) / (GRID - 1)
        near_KTO = torch.stack([y_LTO[line_K, place_K + i] for i in range(3)], dim=1)
        zoomed = _zoom(ask, line_LTI[line_K, place_K + 1], step_LI[line_K], near_KTO, TOLD * visible)
        return Transitions(*zoomed)

    def heights(self, ask: Ask, generator: torch.Generator, visible: float, rounding: float) -> tuple[Tensor, Tensor]:
        """How far from 0 the hyperplanes pass, [K], and which of these distances are clearly more than their widths and
        what rounding, relative, makes of them.

        From derivatives towards 0 and in a few random directions; in one coordinate's deviation.
        """
        count, inputs = self.at_KI.shape
        if not count:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
        toward_KI = torch.nn.functional.normalize(self.at_KI, dim=1)
        other_KDI = torch.randn(count, 6, inputs, generator=generator, dtype=torch.float64)
        other_KDI = torch.nn.functional.normalize(other_KDI, dim=2)
        directions_KDI = torch.cat([toward_KI[:, None], other_KDI], dim=1)
        jump_KDO = self._jumps(ask, directions_KDI, (TOLD * visible) ** 0.25)
        slope_KO = jump_KDO[:, 1:].square().mean(1).sqrt() * inputs**0.5
        height_K = self.at_KI.norm(dim=1) * (jump_KDO[:, 0].norm(dim=1) / slope_KO.norm(dim=1).clamp(min=1e-300))
        width_K, away_K = self.step_KI.norm(dim=1) / inputs**0.5, self.at_KI.norm(dim=1) / inputs**0.5
        error_K = rounding * away_K.square() / ((TOLD * visible) ** 0.25 * width_K)
        return height_K, height_K > torch.maximum(CLEARLY * width_K, error_K)

    def input_scales(self, ask: Ask) -> Tensor | None:
        """How far each input moves to change the answer as the transition does, [I]; None where no single one does."""
        inputs = self.at_KI.shape[1]
        at_WI, step_WI = self.at_KI[:WITNESSES], self.step_KI[:WITNESSES]
        if not len(at_WI):
            return None
        here_WO = ask(at_WI)
        size_WO = (ask(at_WI + step_WI) - ask(at_WI - step_WI)).abs()
        move_WI = 0.1 * step_WI.norm(dim=1, keepdim=True).expand(-1, inputs) / inputs**0.5
        strength_WI = torch.zeros_like(move_WI)
        for _ in range(5 if inputs <= 64 else 2):
            moved_WII = at_WI[:, None] + torch.diag_embed(move_WI)
            change_WIO = (ask(moved_WII.flatten(0, 1)).unflatten(0, (-1, inputs)) - here_WO[:, None]).abs()
            share_WIO = change_WIO / size_WO[:, None]
            share_WI = share_WIO.where(size_WO[:, None] > 0, 0.0).amax(2)  # 0: steps that rounding hides
            strength_WI = share_WI / move_WI
            factor_WI = (0.1 / share_WI.clamp(min=1e-4)).clamp(min=1 / 30)
            move_WI = move_WI * torch.where((share_WI > 0.01) & (share_WI < 0.5), torch.ones_like(move_WI), factor_WI)
        strength_WI = strength_WI * step_WI.norm(dim=1, keepdim=True)  # transitions of any width count alike
        strength_I = strength_WI.square().mean(0).sqrt()
        if not (strength_I > 0).any():
            return None
        return _evened(strength_I) * (step_WI.norm(dim=1).log().mean() / inputs**0.5).exp()

    def hyperplanes(self, ask: Ask, visible: float) -> Hyperplanes:
        """Their hyperplanes, from gradients on both sides; only those of one neuron alone, where there are any."""
        count, inputs = self.at_KI.shape
        eye_KII = torch.eye(inputs, dtype=torch.float64).expand(count, -1, -1)
        jump_KOI = self._jumps(ask, eye_KII, (TOLD * visible) ** 0.25).transpose(1, 2)
        jump_KOI = jump_KOI / jump_KOI.norm(dim=2, keepdim=True).mean(0).clamp(min=1e-300)  # outputs of any size
        _, values, right = torch.linalg.svd(jump_KOI, full_matrices=False)
        pure_K = values[:, 0] > 0
        if values.shape[1] > 1 and (values[:, 1] < PURE * values[:, 0]).any():
            pure_K &= values[:, 1] < PURE * values[:, 0]
        normal_KI, at_KI, step_KI = right[pure_K, 0], self.at_KI[pure_K], self.step_KI[pure_K]
        width_K = (normal_KI * step_KI).sum(1).abs().clamp(min=1e-300)
        distance = float(at_KI.norm(dim=1).median()) / inputs**0.5
        kinks = bool(width_K.median() < KINK * distance)
        width_K = torch.ones_like(width_K) if kinks else torch.maximum(width_K, width_K.median() / 100)
        return Hyperplanes(normal_KI, (normal_KI * at_KI).sum(1), width_K, distance, kinks)

    def _jumps(self, ask: Ask, directions_KDI: Tensor, move: float) -> Tensor:
        """Changes of the derivatives in directions[K, D, I] from one side of the transition to the other, [K, D, O].

        By central differences whose steps are `move` times a transition's.
        """
        move_K1 = move * self.step_KI.norm(dim=1, keepdim=True) / self.at_KI.shape[1] ** 0.5
        moves_KDI, sides = move_K1[:, None] * directions_KDI, []
        for x_KI in (self.at_KI + self.step_KI, self.at_KI - self.step_KI):
            moved_KDI = torch.cat([x_KI[:, None] + moves_KDI, x_KI[:, None] - moves_KDI])
            up_KDO, down_KDO = ask(moved_KDI.flatten(0, 1)).unflatten(0, moved_KDI.shape[:2]).chunk(2)
            sides.append((up_KDO - down_KDO) / (2 * move_K1[:, None]))
        return sides[0] - sides[1]


def _evened(strength_I: Tensor) -> Tensor:
    """Scales of inputs that act so strongly, of geometric mean 1; equal if they nearly are."""
    alive_I = strength_I > 1e-9 * strength_I.max()
    strength_I = torch.where(alive_I, strength_I, strength_I[alive_I].median())
    if strength_I.max() < ALIKE * strength_I.min():  # what a few neurons' weights make of equal scales
        return torch.ones_like(strength_I)
    return (strength_I.log().mean() - strength_I.log()).exp()


def _peaks(bend_LT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Line and place of up to `count` local maxima, at most MOST_PEAKS a line, the highest of every line first."""
    padded_LT = torch.nn.functional.pad(bend_LT, (1, 1))
    peak_LT = (bend_LT > 0) & (bend_LT >= padded_LT[:, :-2]) & (bend_LT > padded_LT[:, 2:])
    height_LK, place_LK = torch.where(peak_LT, bend_LT, 0.0).topk(min(MOST_PEAKS, bend_LT.shape[1]), dim=1)
    line_LK = torch.arange(len(bend_LT))[:, None].expand_as(place_LK)
    found_KL = height_LK.T > 0
    return line_LK.T[found_KL][:count], place_LK.T[found_KL][:count]


def _zoom(ask: Ask, at_KI: Tensor, step_KI: Tensor, y_KTO: Tensor, visible: float) -> tuple[Tensor, Tensor, bool]:
    """The sharpest bends near places on lines, the steps to their neighbours, and whether most are sharp still; answers
    at -1, 0, 1 steps are known.

    Steps are halved, and the sharpest of the three bends inside is the next place. As long as they are longer than the
    transition, its second difference stays or is halved with them (a kink's); when they are shorter, it is quartered.
    """
    rows_K, going_K = torch.arange(len(at_KI)), torch.ones(len(at_KI), dtype=torch.bool)
    curved_K = ~going_K
    before_K = torch.zeros(len(at_KI), dtype=torch.float64)
    size_KO = (y_KTO.amax(1) - y_KTO.amin(1)).clamp(min=1e-300)
    for _ in range(HALVINGS):
        if not going_K.any():
            break
        half_KI = step_KI / 2
        finer_KTO = y_KTO.repeat_interleave(2, dim=1)[:, :5]
        beside_KTI = torch.stack([at_KI - half_KI, at_KI + half_KI], dim=1)
        finer_KTO[going_K, 1::2] = ask(beside_KTI[going_K].flatten(0, 1)).unflatten(0, (-1, 2))
        second_KTO = finer_KTO.diff(n=2, dim=1).abs()
        seen_KT = (second_KTO > visible * finer_KTO.abs().amax(1, keepdim=True)).any(2)
        bend_K, best_K = ((second_KTO / size_KO[:, None]).amax(2) * seen_KT).max(1)
        curved_K |= going_K & (bend_K <= SHARP * before_K) & (bend_K > 0)
        going_K = going_K & (bend_K > SHARP * before_K) & (bend_K > 0)
        before_K = bend_K
        moved_KI = at_KI + (best_K - 1)[:, None] * half_KI
        chosen_KTO = torch.stack([finer_KTO[rows_K, best_K + i] for i in range(3)], dim=1)
        at_KI = torch.where(going_K[:, None], moved_KI, at_KI)
        step_KI = torch.where(going_K[:, None], half_KI, step_KI)
        y_KTO = torch.where(going_K[:, None, None], chosen_KTO, y_KTO)
    return at_KI, step_KI, float(curved_K.double().mean()) < 0.5
