"""One hidden layer of relu or leaky_relu neurons from where the black box bends, in seconds, whatever its width.

A few lines show the hyperplanes (segments.py, arrangement.py); further lines are scanned, half of them through what is
fitted worst, until least squares on the hyperplanes found explain the answers: the set of neurons is complete before
anything is made precise. Signs follow from the linear term (signs.py).

Legend: L lines, T points of a line, H hidden, R relevant input directions, O outputs, Q queries, K = R + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distrecon.expand_cluster.arrangement import Answers, Arrangement, Explained, explain, oriented, refined
from distrecon.expand_cluster.blackbox import OutOfQueries
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.outgoing import drop_costs
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.segments import Bends, BendsEverywhere, scan
from distrecon.expand_cluster.signs import carried_term, carriers, choose_flips, flip_constant, open_signs
from distrecon.expand_cluster.thresholds import COMPLETE, ERROR_MARGIN
from distrecon.nets.activations import Activation

ROUNDS = (4, 4, 8, 16, 32)  # lines of each round
POINTS, DECADES = (
    33,
    (4.0, 3.0),
)  # points of a line on either side, so many decades of the bends' distance; later rounds
MANY = 2  # x the bends of the fullest line, and a few: more hyperplanes are not those of one layer
RESERVED = 0.5  # share of the query budget that is left to probes, verification and students
ALL_INPUTS = 128  # up to so many inputs the relevant directions save too little
SOUNDINGS, UNEVEN = 64, 10.0  # queries that tell whether answers are unknown in places, or have so much more noise
ROUNDING = 1.1e-16  # of an answer


@dataclass(frozen=True)
class _Asking:
    """Answers in the given coordinates with their rounding noise, as long as more than the reserved queries are left.

    The noise is the black box's own; it grows with the inputs beyond the unit ones, and with the answers.
    """

    run: Run
    coordinates: Coordinates
    reserved: float

    def __call__(self, z_QR: Tensor) -> tuple[Tensor, Tensor]:
        box = self.run.box
        if box.left() - self.reserved < len(z_QR):
            raise OutOfQueries("the share of the query budget for bends is spent")
        x_QI = z_QR @ self.coordinates.back_IR.T
        y_QO = box.told(x_QI)
        size_Q1 = (x_QI.norm(dim=1, keepdim=True) / box.inputs**0.5).clamp(min=1.0)
        return y_QO, size_Q1 * box.noise_O + box.error(y_QO) + ROUNDING * y_QO.abs() + torch.finfo(torch.float64).tiny


def networks_from_bends(run: Run, coordinates: Coordinates) -> Iterator[tuple[Problem, Found, dict[str, Any]]]:
    """Networks that explain all answers on more and more lines to their noise, each with its problem and metrics.

    When none does in the end, the one that explains them best, if it misses little.

    Ends where the bends are not those of one layer, and when half of the queries that are left are spent.
    """
    if run.box.inputs <= ALL_INPUTS:
        coordinates = _all_inputs(coordinates)
    ask = _Asking(run, coordinates, RESERVED * run.box.left() if run.box.budget else 0.0)
    generator = run.generator
    found = loose = Arrangement.empty(coordinates.rank, run.box.outputs)  # loose: seen, crossed with others missing
    reach, uneven, worst_QR = coordinates.rank**0.5, False, torch.zeros(0, coordinates.rank, dtype=torch.float64)
    on_lines: list[Answers] = []
    beside: list[Answers] = []
    best: tuple[Explained, Answers] | None = None
    counts = ROUNDS[: run.config.budget.attempts]
    try:
        for number, count in enumerate(counts):
            if run.out_of_time():
                break
            bends = _scan(ask, worst_QR[: count // 2], count, reach, DECADES[min(number, 1)], generator)
            on_lines.append(Answers(bends.z_QR, bends.y_QO, bends.noise_QO))
            if not len(bends.line_S):
                continue
            if not len(found):
                reach = float(bends.t_S.abs().median())
                noise_QO = ask(reach / coordinates.rank**0.5 * _normal(generator, SOUNDINGS, coordinates.rank))[1]
                uneven = not bool((noise_QO <= UNEVEN * noise_QO.nanmedian(0).values).all())
            for line in range(count):
                new_S = ((bends.line_S == line) & ~found.explains(bends)).nonzero()[:, 0]
                if len(new_S):
                    joined = found.join(loose, oriented(ask, bends, new_S))
                    if len(joined) > len(found):
                        loose = joined.take(torch.arange(len(found), len(joined)))
                        found, crossings = refined(ask, joined, len(found), generator, uneven)
                        beside.append(crossings)
            if not len(found) and not number:
                continue  # the next lines are nearer, and what these showed counts with theirs
            if not len(found) or max(len(found), len(loose)) > MANY * int(bends.line_S.bincount().max()) + 10:
                break
            answers = Answers.join([*on_lines, *beside])
            explained = explain(found, answers, generator)
            worst_QR = _worst(explained, answers, 4 * count)
            worst_QR = worst_QR[torch.randperm(len(worst_QR), generator=generator)]
            if best is None or explained.misfit < best[0].misfit:
                best = explained, answers
            if explained.misfit <= ERROR_MARGIN:
                found = explained.arrangement
                yield _network(run, coordinates, explained, answers, sum(counts[: number + 1]))
    except (OutOfQueries, BendsEverywhere):
        pass
    if best is not None and best[0].misfit > ERROR_MARGIN and _relative(*best) < COMPLETE:
        yield _network(run, coordinates, *best, sum(counts))


def _all_inputs(coordinates: Coordinates) -> Coordinates:
    """The inputs themselves at the same scale: nothing rests on directions, which have an error of their own."""
    eye_II = torch.eye(coordinates.back_IR.shape[0], dtype=torch.float64)
    return Coordinates(eye_II / coordinates.scale, coordinates.scale * eye_II, 0 * eye_II, coordinates.scale, 0.0)


def _worst(explained: Explained, answers: Answers, count: int) -> Tensor:
    """Inputs [Q, R] of the answers that are explained worst, in units of their noise."""
    off_Q = ((explained(answers.z_QR) - answers.y_QO) / answers.noise_QO).abs().amax(1)
    return answers.z_QR[off_Q.argsort(descending=True)[:count]]


def _scan(
    ask: _Asking, through_QR: Tensor, count: int, reach: float, decades: float, generator: torch.Generator
) -> Bends:
    """`count` random lines, the first through given points, scanned to `decades` beyond and below the reach."""
    rank = through_QR.shape[1]
    start_LR = _normal(generator, count, rank) * reach / rank**0.5
    start_LR[: len(through_QR)] = through_QR
    direction_LR = normalize(_normal(generator, count, rank), dim=1)
    away_T = reach * 10.0 ** torch.linspace(-decades, decades, POINTS, dtype=torch.float64)
    grid_T = torch.cat([-away_T.flip(0), away_T.new_zeros(1), away_T])
    return scan(ask, start_LR, direction_LR, grid_T.expand(count, -1), generator)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _relative(explained: Explained, answers: Answers) -> float:
    """Root mean squared residual over that of the answers, each divided by its noise."""
    off_QO = (explained(answers.z_QR) - answers.y_QO) / answers.noise_QO
    return float(off_QO.square().mean().sqrt() / (answers.y_QO / answers.noise_QO).square().mean().sqrt())


def _network(
    run: Run, coordinates: Coordinates, explained: Explained, answers: Answers, lines: int
) -> tuple[Problem, Found, dict[str, Any]]:
    """The network of an explanation, its problem's probes so far out that they reach every hyperplane."""
    planes_HK = explained.arrangement.planes_HK
    factor = max(1.0, float(planes_HK[:, -1].abs().max()))
    unknowns = planes_HK.numel() + run.box.outputs * (len(planes_HK) + 1)
    problem = run.problem(Probes(coordinates.rescaled(factor)), unknowns)
    data = problem.data
    z_QR = data.x_QI @ coordinates.to_RI.T
    design_QF = explained.features(z_QR)
    costs_H = drop_costs(design_QF, explained.coefficients_FO / data.scale, len(planes_HK))
    if (costs_H <= problem.floor).any():  # an exact fit does without them
        explained = explain(explained.arrangement.take(costs_H > problem.floor), answers, run.generator)
    layer = signed(explained, run.activation)
    neurons_HK = torch.cat([layer.neurons_HK[:, :-1] * factor, layer.neurons_HK[:, -1:]], dim=1)
    last_OF = torch.cat([layer.outgoing_OH, (layer.constant_O - data.mean_O)[:, None]], dim=1) / data.scale
    net = problem.net(len(neurons_HK))
    theta_1P = DenseNet.flatten([neurons_HK[None], last_OF[None]])
    metrics = {"recover/students": 0, "recover/lines": lines}
    loss = float(net.loss(theta_1P, data.z_QR, data.y_QO)[0])
    if loss > problem.floor and explained.misfit <= ERROR_MARGIN:  # complete: hyperplanes have a few times the noise
        solution = problem.fit(net, theta_1P)
        theta_1P, loss = solution.theta_NP, float(net.loss(solution.theta_NP, data.z_QR, data.y_QO)[0])
    return problem, Found(net, theta_1P, loss, [], layer.objection, layer.note), metrics


@dataclass(frozen=True)
class Layer:
    """Neurons [H, K], outgoing weights [O, H] and constant [O]; why they are not the black box's own, and what else."""

    neurons_HK: Tensor
    outgoing_OH: Tensor
    constant_O: Tensor
    objection: str
    note: str


def signed(explained: Explained, activation: Activation) -> Layer:
    """The layer that equals an explanation; neurons that carry a linear term besides come last."""
    arrangement, unit_O = explained.arrangement, explained.unit_O
    planes_HK = arrangement.planes_HK
    one = torch.ones((), dtype=torch.float64)
    kappa, even = flip_constant(activation), float(activation(one) + activation(-one))
    outgoing_OH = arrangement.jumps_HO.T / even  # f(u) = kappa u / 2 + even |u| / 2
    linear_OR = explained.linear_OR - kappa / 2 * outgoing_OH @ planes_HK[:, :-1]
    flips = choose_flips(
        planes_HK, outgoing_OH / unit_O[:, None], linear_OR / unit_O[:, None], kappa, explained.rounding
    )
    sign_H = torch.where(flips.flips_H, -1.0, 1.0).double()
    constant_O = explained.constant_O - kappa / 2 * outgoing_OH @ (sign_H * planes_HK[:, -1])
    extra_DK, extra_OD = carriers(flips.rest_OR, kappa, explained.rounding)
    neurons_HK = torch.cat([sign_H[:, None] * planes_HK, extra_DK])
    outgoing_OH = torch.cat([outgoing_OH, extra_OD * unit_O[:, None]], dim=1)
    objection, weak = "", int((~flips.sure_H).sum())
    if len(extra_DK):
        objection = carried_term(len(planes_HK), len(extra_DK))
    elif not flips.determined:
        objection = open_signs(len(planes_HK))
    note = f"the signs of {weak} weak neurons do not show in the answers" if weak else ""
    return Layer(neurons_HK, outgoing_OH, constant_O, objection, note)
