"""The hyperplanes on which one hidden layer bends, from the bends on a few lines, to the last digits.

A line crosses nearly all hyperplanes, and a network of one hidden layer bends on the whole of each: so the bends of one
line, each with its normal from the gradients beside it, are the layer, and further lines only confirm it. Then every
hyperplane is crossed along its normal, at places where no other one is near: the crossing is found to rounding, and
several of them give the hyperplane to the precision of the answers (1e-13 and better), whatever the other neurons are.
With the hyperplanes known, y = sum_h J_h |u_h| / 2 + L z + c is one least squares.

Legend: H hyperplanes, R input directions, K = R + 1 ([unit normal, offset] of a hyperplane), O outputs, S bends,
M crossings, Q answers, F features.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distrecon.expand_cluster.segments import Answer, Bends
from distrecon.expand_cluster.thresholds import (
    BEND_MARGIN,
    ERROR_MARGIN,
    EXPECTED,
    ORIENTED,
    PURE,
    SAME_PLANE,
    SHOWS,
    SURELY_OTHER,
)

BESIDE = 0.3  # of the room round a bend: how far from it its two gradients are taken
STEPS = (1.0, 0.3, 0.1, 0.01, 1e-3)  # of that distance: of the gradients' differences, while others bend in between
PRECISE = 1e-8  # longer differences than this error needs are not tried
AT_ONCE = 4_000_000  # numbers of the queries that are made at a time
CROSSINGS = 1.5  # of a hyperplane, for each of its unknowns
CHOICE = 6  # places drawn for each crossing that is chosen, those with most room
FREE = 0.45  # of the way to the next hyperplane: how far a crossing's outer answers are from it
INNER = 0.25  # of that: the inner answers
NEAR = 0.01  # of the room round a hyperplane's bend: its error at the places where it is crossed, at most
DOUBT = 30.0  # x the error of a hyperplane that is not met where it should be
WORSE = 10.0  # x the median error: hyperplanes that are crossed again, now that their neighbours are known
REPEATS = 6  # of the crossings of one hyperplane, at most, while they still move it
EQUATIONS = 6  # answers for every feature


@dataclass(frozen=True)
class Arrangement:
    """Hyperplanes [H, K], the jumps [H, O] of the slope along their normals, and a bend of each [H, R].

    `room_H` is how far that bend is from others, `error_H` that of [unit normal, offset / |bend|], about.
    """

    planes_HK: Tensor
    jumps_HO: Tensor
    bends_HR: Tensor
    room_H: Tensor
    error_H: Tensor

    @staticmethod
    def empty(rank: int, outputs: int) -> "Arrangement":
        def none(*shape: int) -> Tensor:
            return torch.zeros(0, *shape, dtype=torch.float64)

        return Arrangement(none(rank + 1), none(outputs), none(rank), none(), none())

    def __len__(self) -> int:
        return len(self.planes_HK)

    def take(self, which_H: Tensor) -> "Arrangement":
        """Some of the hyperplanes, by number or as booleans."""
        return Arrangement(*(part[which_H] for part in self._parts()))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.planes_HK, self.jumps_HO, self.bends_HR, self.room_H, self.error_H

    def join(self, *others: "Arrangement") -> "Arrangement":
        """These and those of the others that are new, the surest first."""
        other = Arrangement(*(torch.cat(parts) for parts in zip(*(o._parts() for o in others), strict=True)))
        kept = self
        for i in other.error_H.argsort().tolist():
            if not kept.has(other.take(torch.tensor([i]))):
                one = other.take(torch.tensor([i]))
                kept = Arrangement(*(torch.cat(pair) for pair in zip(kept._parts(), one._parts(), strict=True)))
        return kept

    def has(self, one: "Arrangement") -> bool:
        """Whether a single hyperplane is among these, within errors."""
        size = one.bends_HR.norm() + 1e-300
        unit_HK, own_1K = (torch.cat([a.planes_HK[:, :-1], a.planes_HK[:, -1:] / size], dim=1) for a in (self, one))
        gap_H = torch.minimum((unit_HK - own_1K).norm(dim=1), (unit_HK + own_1K).norm(dim=1))
        return bool((gap_H <= (ERROR_MARGIN * (self.error_H + one.error_H)).clamp(SAME_PLANE, SURELY_OTHER)).any())

    def explains(self, bends: Bends) -> Tensor:
        """Which bends [S] are where a hyperplane is crossed, with the jump that it should have."""
        if not len(self):
            return torch.zeros(len(bends.line_S), dtype=torch.bool)
        along_LH = bends.direction_LR @ self.planes_HK[:, :-1].T
        t_LH = -(bends.start_LR @ self.planes_HK[:, :-1].T + self.planes_HK[:, -1]) / along_LH
        off_SH = (t_LH[bends.line_S] - bends.t_S[:, None]).abs()
        nearest_S = off_SH.argmin(1)
        allowed_S = torch.maximum(EXPECTED * bends.room_S, ERROR_MARGIN * self.error_H[nearest_S] * bends.t_S.abs())
        here_S = off_SH.amin(1) <= allowed_S
        jump_SO = self.jumps_HO[nearest_S] * along_LH[bends.line_S, nearest_S].abs()[:, None]
        return here_S & ((jump_SO - bends.jump_SO).norm(dim=1) <= 10 * EXPECTED * jump_SO.norm(dim=1))


def oriented(answer: Answer, bends: Bends, chosen_S: Tensor) -> Arrangement:
    """The hyperplanes through chosen bends whose gradients show one; 4 R queries each, more where others are near."""
    points_SR, direction_SR = bends.points_SR[chosen_S], bends.direction_LR[bends.line_S[chosen_S]]
    away_S = BESIDE * bends.room_S[chosen_S]
    normal_SR, error_S = torch.zeros_like(points_SR), torch.full_like(away_S, math.inf)
    rounding = 2 * points_SR.shape[1] ** 0.5
    # of a gradient's difference at step 1, over the jump
    rough_S = rounding * answer(points_SR)[1].amax(1) / (away_S * bends.jump_SO[chosen_S].norm(dim=1))
    waiting = torch.arange(len(points_SR))
    for number, step in enumerate(STEPS):
        enough_S = rough_S[waiting] <= PRECISE * STEPS[min(number + 1, len(STEPS) - 1)]
        left = waiting[~enough_S] if number + 1 < len(STEPS) else waiting
        if not len(left):
            continue
        beside_SR = away_S[left, None] * direction_SR[left]
        before, after = (
            _gradients(answer, points_SR[left] + side * beside_SR, step * away_S[left]) for side in (-1.0, 1.0)
        )
        noise_S1O = torch.maximum(before[1], after[1])
        jump_SRO = ((after[0] - before[0]) / noise_S1O).nan_to_num(0.0)  # unknown ones are not clean
        u_SRR, values, _ = torch.linalg.svd(jump_SRO, full_matrices=False)
        clean_S = before[2] & after[2] & (values[:, 0] > 0)
        if values.shape[1] > 1:
            clean_S &= values[:, 1] <= (PURE * values[:, 0]).clamp(min=BEND_MARGIN * rounding)
        normal_SR[left] = u_SRR[:, :, 0] * torch.sign((u_SRR[:, :, 0] * direction_SR[left]).sum(1))[:, None]
        error_S[left[clean_S]] = (rounding / values[:, 0])[clean_S]
        waiting = waiting[~torch.isin(waiting, left[clean_S])]
    offset_S1 = -(points_SR * normal_SR).sum(1, keepdim=True)
    jumps_SO = bends.jump_SO[chosen_S] / (direction_SR * normal_SR).sum(1, keepdim=True)
    found = Arrangement(torch.cat([normal_SR, offset_S1], dim=1), jumps_SO, points_SR, bends.room_S[chosen_S], error_S)
    return found.take((error_S <= ORIENTED) & torch.isfinite(jumps_SO).all(1))


def _gradients(answer: Answer, z_SR: Tensor, step_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [S, R, O] by central differences, their rounding [S, 1, O], and whether all is straight there [S]."""
    rank = z_SR.shape[1]
    most = max(1, AT_ONCE // rank**2)
    if len(z_SR) > most:
        parts = [_gradients(answer, *part) for part in zip(z_SR.split(most), step_S.split(most), strict=True)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]
    moves_SRR = step_S[:, None, None] * torch.eye(rank, dtype=torch.float64)
    y_SO, noise_SO = answer(z_SR)
    up, down = (
        answer((z_SR[:, None] + side * moves_SRR).flatten(0, 1))[0].reshape(len(z_SR), rank, -1) for side in (1, -1)
    )
    straight_S = ((up + down - 2 * y_SO[:, None]).abs() <= BEND_MARGIN * noise_SO[:, None]).all(2).all(1)
    width_S11 = 2 * step_S[:, None, None]
    return (up - down) / width_S11, 2 * noise_SO[:, None] / width_S11, straight_S


@dataclass(frozen=True)
class Answers:
    """Queries, answers and their rounding noise."""

    z_QR: Tensor
    y_QO: Tensor
    noise_QO: Tensor

    @staticmethod
    def join(parts: list["Answers"]) -> "Answers":
        """All of them, as far as they are known."""
        z_QR, y_QO, noise_QO = (torch.cat([getattr(p, name) for p in parts]) for name in ("z_QR", "y_QO", "noise_QO"))
        known_Q = torch.isfinite(y_QO).all(1)
        return Answers(z_QR[known_Q], y_QO[known_Q], noise_QO[known_Q])

    def some(self, count: int, generator: torch.Generator) -> "Answers":
        """At random; all of them if these are fewer."""
        rows = torch.randperm(len(self.z_QR), generator=generator)[:count]
        return Answers(self.z_QR[rows], self.y_QO[rows], self.noise_QO[rows])


def refined(
    answer: Answer, arrangement: Arrangement, known: int, generator: torch.Generator, uneven: bool = False
) -> tuple[Arrangement, Answers]:
    """Every hyperplane through its own crossings: those from number `known` on, which stay only if they are there, and
    those before that are less precise than others.

    Takes 4 queries a crossing, and CHOICE more where answers are `uneven`: unknown, or of less digits, in places. Also
    returns the answers: both sides of every hyperplane are among them.
    """
    parts = []
    confirmed = torch.arange(len(arrangement)) < known
    moving = ~confirmed
    if known:
        moving |= arrangement.error_H > WORSE * arrangement.error_H[:known].median()
    for _ in range(REPEATS):
        if not moving.any():
            break
        which = moving.nonzero()[:, 0]
        planes_HK, jumps_HO, error_H, shift_H, there_H, answers = _crossed(
            answer, arrangement, which, generator, uneven
        )
        parts.append(answers)
        crossed_H, old_H = torch.isfinite(error_H), arrangement.error_H[which]
        better_H = error_H < old_H
        new = [part.clone() for part in arrangement._parts()]
        new[0][which[better_H]] = planes_HK[better_H]
        new[1][which] = jumps_HO
        # what was not met is looked for nearer to its bend
        doubt_H = torch.where(confirmed[which], old_H, (DOUBT * old_H).clamp(max=1.0))
        new[4][which] = torch.where(crossed_H, torch.minimum(error_H, old_H), doubt_H)
        arrangement = Arrangement(*new)
        wide_H = _wide(arrangement, which, old_H)
        confirmed[which] |= crossed_H & wide_H
        moving[which] = ~crossed_H | ~wide_H | (better_H & (shift_H > ERROR_MARGIN * error_H))
        kept = confirmed.clone()
        kept[which[there_H]] = True
        arrangement, moving, confirmed = arrangement.take(kept), moving[kept], confirmed[kept]
    return arrangement.take(confirmed), Answers.join(parts)


def _crossed(
    answer: Answer, arrangement: Arrangement, which: Tensor, generator: torch.Generator, uneven: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Answers]:
    """New planes [H, K] of `which`, their jumps and errors, how far they moved, whether they are there; answers."""
    planes_HK = arrangement.planes_HK
    rank = planes_HK.shape[1] - 1
    count = math.ceil(CROSSINGS * rank) + 4
    places_HMR, reach_HM = _places(arrangement, which, count, generator, answer if uneven else None)
    normal_H1R = planes_HK[which, None, :-1]
    sides_4 = torch.tensor([-1.0, -INNER, INNER, 1.0], dtype=torch.float64)
    z_HM4R = places_HMR[:, :, None] + (reach_HM[..., None] * sides_4)[..., None] * normal_H1R[:, :, None]
    answers = _in_parts(answer, z_HM4R.flatten(0, 2))
    y_HM4O, noise_HM4O = (v.unflatten(0, z_HM4R.shape[:3]) for v in (answers.y_QO, answers.noise_QO))
    width_HM1 = ((1 - INNER) * reach_HM)[..., None]
    before_HMO = (y_HM4O[:, :, 1] - y_HM4O[:, :, 0]) / width_HM1
    after_HMO = (y_HM4O[:, :, 3] - y_HM4O[:, :, 2]) / width_HM1
    noise_HMO = noise_HM4O.amax(2)
    inner_HM1 = (INNER * reach_HM)[..., None]
    gap_HMO = y_HM4O[:, :, 2] - after_HMO * inner_HM1 - y_HM4O[:, :, 1] - before_HMO * inner_HM1
    jump_HMO = after_HMO - before_HMO
    # another hyperplane that is not known yet changes the jump: only crossings with the usual jump are taken
    slack_HMO = BEND_MARGIN * noise_HMO / width_HM1
    middle_H1O = slack_HMO.nanmedian(1, keepdim=True).values
    usual_H1O = jump_HMO.where(slack_HMO <= middle_H1O, math.nan).nanmedian(1, keepdim=True).values
    clean_HM = ((jump_HMO - usual_H1O).abs() <= slack_HMO + middle_H1O).all(2)
    strength_HMO = jump_HMO / noise_HMO
    delta_HM = -(gap_HMO / noise_HMO * strength_HMO).sum(2) / strength_HMO.square().sum(2)
    spread_HM = 3 / strength_HMO.norm(dim=2)
    clean_HM &= torch.isfinite(delta_HM) & (delta_HM.abs() < inner_HM1[..., 0])
    usual_HO, expected_HO = usual_H1O[:, 0], arrangement.jumps_HO[which]
    rounding_H = ERROR_MARGIN * (noise_HMO / width_HM1).norm(dim=2).nanmedian(1).values
    there_H = (usual_HO - expected_HO).norm(dim=1) <= 0.5 * expected_HO.norm(dim=1) + rounding_H
    told_H = clean_HM.sum(1) > rank
    there_H |= ~told_H  # too little to tell
    jumps_HO = torch.where((told_H & (usual_HO.norm(dim=1) > rounding_H))[:, None], usual_HO, expected_HO)
    new_HK, error_H, shift_H = (
        planes_HK[which].clone(),
        torch.full((len(which),), math.inf).double(),
        torch.zeros(len(which)).double(),
    )
    for i, h in enumerate(which.tolist()):
        clean_M = clean_HM[i]
        if clean_M.sum() <= rank or not there_H[i]:
            continue
        size = 1 + arrangement.bends_HR[h].norm()
        p_MK = torch.cat([places_HMR[i][clean_M], size.expand(int(clean_M.sum()), 1)], dim=1)
        change = _tilt(
            p_MK, delta_HM[i][clean_M], spread_HM[i][clean_M], torch.cat([planes_HK[h, :-1], planes_HK[h, -1:] / size])
        )
        if change is None:
            continue
        moved_K, error = change
        new_K = planes_HK[h] - torch.cat([moved_K[:-1], moved_K[-1:] * size])
        new_HK[i], error_H[i], shift_H[i] = new_K / new_K[:-1].norm(), error, moved_K.norm()
    return new_HK, jumps_HO, error_H, shift_H, there_H, answers


def _tilt(p_MK: Tensor, delta_M: Tensor, spread_M: Tensor, own_K: Tensor) -> tuple[Tensor, float] | None:
    """d[K] with p d = delta by weighted least squares, at right angles to `own` (the scale is free), and its error."""
    for _ in range(2):
        a_MK = torch.cat([p_MK / spread_M[:, None], normalize(own_K, dim=0)[None] * (p_MK / spread_M[:, None]).norm()])
        b_M = torch.cat([delta_M / spread_M, delta_M.new_zeros(1)])
        q, r = torch.linalg.qr(a_MK)
        if r.diagonal().abs().min() <= 1e-10 * r.diagonal().abs().max():
            return None
        inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype), upper=True)
        d_K = inverse @ (q.T @ b_M)
        rest_M = ((p_MK @ d_K - delta_M) / spread_M).abs()
        good_M = rest_M <= 5 * rest_M.median().clamp(min=1.0)
        if good_M.all() or int(good_M.sum()) < p_MK.shape[1]:
            break
        p_MK, delta_M, spread_M = p_MK[good_M], delta_M[good_M], spread_M[good_M]
    return d_K, float(inverse.norm() * rest_M.square().mean().sqrt().clamp(min=1.0))


def _sizes(arrangement: Arrangement, error_H: Tensor) -> tuple[Tensor, Tensor]:
    """Of the part of a hyperplane that bends are met in, and of the part round its own bend where errors are small."""
    rank = arrangement.planes_HK.shape[1] - 1
    scale = arrangement.bends_HR.norm(dim=1).median()
    size_H = torch.maximum(scale, arrangement.planes_HK[:, -1].abs()) / rank**0.5
    return size_H, NEAR * arrangement.room_H / error_H


def _wide(arrangement: Arrangement, which: Tensor, error_H: Tensor) -> Tensor:
    """Whether hyperplanes of these errors are crossed all over, and not only near their bends."""
    errors = arrangement.error_H.clone()
    errors[which] = error_H
    size_H, near_H = _sizes(arrangement, errors)
    return (near_H > size_H)[which]


def _places(
    arrangement: Arrangement, which: Tensor, count: int, generator: torch.Generator, answer: Answer | None
) -> tuple[Tensor, Tensor]:
    """Places [H, M, R] on the hyperplanes with much room, and how far one may go along the normals there [H, M].

    With `answer`, room counts in units of the noise there.
    """
    planes_HK, rank = arrangement.planes_HK, arrangement.planes_HK.shape[1] - 1
    size_H, near_H = _sizes(arrangement, arrangement.error_H)
    places, reaches = [], []
    for h in which.tolist():
        normal_R, offset, size, near = planes_HK[h, :-1], planes_HK[h, -1], size_H[h], near_H[h]
        z_MR = torch.randn(CHOICE * count, rank, generator=generator, dtype=torch.float64)
        z_MR = size * z_MR if near > size else arrangement.bends_HR[h] + near / rank**0.5 * z_MR
        z_MR = z_MR - (z_MR @ normal_R + offset)[:, None] * normal_R
        away_MH = (z_MR @ planes_HK[:, :-1].T + planes_HK[:, -1]).abs() / (planes_HK[:, :-1] @ normal_R).abs()
        away_MH[:, h] = math.inf
        reach_M = torch.minimum(FREE * away_MH.nan_to_num(math.inf).amin(1), size * rank**0.5)
        worth_M = reach_M if answer is None else (reach_M / answer(z_MR)[1].amax(1)).nan_to_num(0.0)
        best = worth_M.topk(count).indices
        places.append(z_MR[best])
        reaches.append(reach_M[best])
    return torch.stack(places), torch.stack(reaches)


def _in_parts(answer: Answer, z_QR: Tensor) -> Answers:
    parts = [(part, *answer(part)) for part in z_QR.split(max(1, AT_ONCE // z_QR.shape[1]))]
    return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Explained:
    """y = sum_h J_h |u_h| / 2 + L z + c: the hyperplanes' jumps, L, c; and how well that is known.

    `misfit` is the root mean square of residuals over noise; `jump_error_H`, `linear_error` are standard errors for
    outputs in units of their noise `unit_O`.
    """

    arrangement: Arrangement
    linear_OR: Tensor
    constant_O: Tensor
    misfit: float
    jump_error_H: Tensor
    linear_error: float
    unit_O: Tensor

    @property
    def coefficients_FO(self) -> Tensor:
        return torch.cat([self.arrangement.jumps_HO, self.linear_OR.T, self.constant_O[None]])

    def features(self, z_QR: Tensor) -> Tensor:
        """[|u| / 2, z, 1] as [Q, F]."""
        return _features(self.arrangement, z_QR)

    def __call__(self, z_QR: Tensor) -> Tensor:
        return self.features(z_QR) @ self.coefficients_FO

    @property
    def rounding(self) -> float:
        """Of the linear term and of the hyperplanes' own linear terms together, in units of the outputs' noise."""
        strength_H = (self.arrangement.jumps_HO / self.unit_O).norm(dim=1)
        own = (strength_H * self.arrangement.error_H).square().sum() + self.jump_error_H.square().sum()
        return float((own + self.linear_error**2).sqrt())


def explain(arrangement: Arrangement, answers: Answers, generator: torch.Generator) -> Explained:
    """Jumps and linear term by least squares weighted by noise; jumps within their errors are dropped."""
    rank, outputs = answers.z_QR.shape[1], answers.y_QO.shape[1]
    while True:
        hidden = len(arrangement)
        rows = answers.some(EQUATIONS * (hidden + rank + 1), generator)
        # one weight a row, so that one factorisation serves all outputs, in units of each output's typical noise
        unit_O = rows.noise_QO.median(0).values
        weight_Q1 = 1 / (rows.noise_QO / unit_O).amax(1, keepdim=True)
        design_QF = _features(arrangement, rows.z_QR) * weight_Q1
        right_QO = rows.y_QO / unit_O * weight_Q1
        scale_F = design_QF.norm(dim=0).clamp(min=1e-300)
        u_QF, values_F, v_FF = torch.linalg.svd(design_QF / scale_F, full_matrices=False)
        kept_F = values_F > 1e-14 * values_F[0]
        inverse_FF = v_FF[kept_F].T / values_F[kept_F]
        solution_FO = inverse_FF @ (u_QF[:, kept_F].T @ right_QO)
        rest_QO = right_QO - design_QF / scale_F @ solution_FO
        solution_FO = solution_FO + inverse_FF @ (u_QF[:, kept_F].T @ rest_QO)
        rest_QO = right_QO - design_QF / scale_F @ solution_FO
        misfit = float(rest_QO.square().mean().sqrt())
        error_F = inverse_FF.norm(dim=1) / scale_F * max(1.0, misfit) * outputs**0.5
        solution_FO = solution_FO / scale_F[:, None]
        strength_H = solution_FO[:hidden].norm(dim=1)
        shows_H = strength_H > SHOWS * error_F[:hidden]
        if bool(shows_H.all()) or not bool(kept_F.all()) or misfit > ERROR_MARGIN:
            break  # as long as something is missing, what is weak may be its neighbour
        arrangement = arrangement.take(shows_H)
    jumps_HO, linear_RO, constant_1O = (solution_FO * unit_O).split([hidden, rank, 1])
    known = dataclasses.replace(arrangement, jumps_HO=jumps_HO)
    linear_error = float(error_F[hidden:-1].norm())
    return Explained(known, linear_RO.T, constant_1O[0], misfit, error_F[:hidden], linear_error, unit_O)


def _features(arrangement: Arrangement, z_QR: Tensor) -> Tensor:
    u_QH = z_QR @ arrangement.planes_HK[:, :-1].T + arrangement.planes_HK[:, -1]
    return torch.cat([u_QH.abs() / 2, z_QR, z_QR.new_ones(len(z_QR), 1)], dim=1)
