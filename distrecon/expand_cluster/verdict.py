"""The verdict on a network that was found, after its last digits were polished. Verified means:

1. it agrees, output by output, with every answer of the run and with fresh ones at least as far out as any of them: to
   what rounding and an exact fit explain at each input, on the whole and at every single one (certificate.py);
2. no hidden neuron can be dropped;
3. no neuron of a piecewise linear network is on one side of its kink at all fresh queries;
4. every weight shows in some answer: neurons respond to each of their inputs (training queries count here, too).

Legend: Q queries, I inputs, R relevant input directions, H hidden, O outputs.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.certificate import (
    Certificate,
    Comparison,
    Dense,
    Network,
    Tolerance,
    certify,
    compare,
    contradicted_probabilities,
)
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.outgoing import drop_costs, features, solve_outgoing
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import (
    AGREEMENT,
    AGREEMENT_WORST,
    DIRECTION_MARGIN,
    NEARLY_EXACT,
    NEEDED,
    OPPOSITE,
    VANISHING,
)
from distrecon.expand_cluster.weights import Weights, from_theta, to_theta
from distrecon.nets.activations import Activation

DETERMINING = 5000  # training queries that are asked, besides the fresh ones, whether they determine all weights
NEAR_NUMBERS = 10_000_000  # of further answers' inputs that are looked at for this: .1 GiB
FRESH_SCALES = (1.0, 3.0, 10.0, 30.0)  # of the queries that verify a result, in turn
ELSEWHERE = 4  # for so many of them one is drawn in other rounds' coordinates, and one in the range of all answers
BEYOND = 1.05  # x the range of all answers: how far these go
USUAL = 20_000  # of the answers, evenly taken, tell what size is usual
CONTRADICTIONS = 64  # that are kept for the next round, at most


def conclude(run: Run, problem: Problem, found: Found | None, metrics: dict[str, Any]) -> Recovery:
    """Polish and verify what was found for a problem; None: nothing, which is unverified."""
    data, coordinates = problem.data, problem.probes.coordinates
    if found is None:
        nothing = DenseNet((coordinates.rank, *[1] * run.hidden_layers, run.box.outputs), run.activation)
        theta_P = torch.zeros(nothing.num_parameters, dtype=torch.float64)
        weights = from_theta(nothing, theta_P, data.mean_O, data.scale, coordinates.to_RI)
        metrics = {**metrics, "recover/train_loss": 1.0}
        left = metrics.get("recover/student_loss_best", 1.0) ** 0.5
        reason = f"no student has neurons that contribute; the best leaves a relative error of {left:.1e}"
        return Recovery(weights, run.activation.name, False, reason, [], metrics)
    weights = from_theta(found.net, found.theta_1P[0], data.mean_O, data.scale, coordinates.to_RI)
    run.candidates.append(
        Recovery(weights, run.activation.name, False, "", found.linkage, {**metrics, "recover/train_loss": found.loss})
    )
    nearly = found.loss <= max(problem.floor, NEARLY_EXACT)
    unknowns = sum(w.numel() + b.numel() for w, b in weights)
    polished, loss = nearly and polishable(run, coordinates, unknowns), found.loss
    if polished:
        with run.timed("polish"):
            weights, loss = _polish(run, problem, weights)
    run.progress("size", sum(found.net.sizes[1:-1]))
    verdict = judge(run, problem, weights, polished, loss)
    metrics = {**metrics, **verdict.certificate.metrics(), "recover/train_loss": found.loss}
    reasons = [verdict.objection or agreement(verdict.certificate), found.objection, found.note]
    return Recovery(
        weights,
        run.activation.name,
        not (verdict.objection or found.objection),
        "; ".join(reason for reason in reasons if reason),
        found.linkage,
        metrics,
        certificate=verdict.certificate,
        contradictions_QI=verdict.contradictions_QI,
    )


def polishable(run: Run, coordinates: Coordinates, unknowns: int) -> bool:
    """Whether a network of so many weights and biases is fitted once more in all inputs, which frees it from the
    directions' error.
    """
    return coordinates.rank < run.box.inputs and unknowns <= run.config.solver.polish_parameters


def _polish(run: Run, problem: Problem, weights: Weights) -> tuple[Weights, float]:
    """The last digits, in all inputs at once, and the loss left: frees the first layer of the directions' error."""
    net, data = DenseNet((run.box.inputs, *(len(b) for _, b in weights)), run.activation), problem.data
    solution = problem.refine(net, to_theta(weights, data.mean_O, data.scale))
    return from_theta(net, solution.theta_NP[0], data.mean_O, data.scale), float(solution.loss_N[0])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is held against a network ("" if nothing), what was compared, and inputs that contradict an exact fit."""

    objection: str
    certificate: Certificate
    contradictions_QI: Tensor | None = None


def judge(run: Run, problem: Problem, weights: Weights, polished: bool, train_loss: float) -> Verdict:
    """Whether all of the rule holds for a dense network fitted to the problem's data, with this relative loss."""
    weakness = partial(_weakness, run, problem, weights)
    return judge_network(run, problem, Dense(weights, run.activation.name), weakness, polished, train_loss)


def judge_network(
    run: Run,
    problem: Problem,
    network: Network,
    weakness: Callable[[Tensor, Tensor], str],
    polished: bool,
    train_loss: float,
) -> Verdict:
    """The same for any network.

    `weakness` says what queries x[Q, I] do not determine of it ("" if nothing), where each output may be off by a share
    [O] of its deviation.
    """
    floor = problem.polished_floor if polished else problem.floor
    with run.timed("queries"):
        probes_QI, fresh_QI = _fresh(run, problem.probes)
        answers_QO = run.box(fresh_QI)
    with run.timed("verdict"):
        tolerance, spread_O = _tolerance(run, problem, network, polished)
        x_QI, y_QO = fresh_QI, answers_QO
        comparison = compare(network, x_QI, y_QO, tolerance)
        objection = _disagreement(comparison, "fresh")
        exact = train_loss <= AGREEMENT**2 * floor
        if exact:
            x_QI, y_QO = run.box.asked()
            comparison = compare(network, x_QI, y_QO, tolerance, run.box.reach)
            objection = (
                objection or _disagreement(comparison, "of the run's") or _saturation(run.box, network, tolerance)
            )
        certificate = certify(comparison, tolerance, x_QI, len(fresh_QI), run.box.noise_O, spread_O, run.box.untold)
        if objection and train_loss > floor:
            left = f"{math.sqrt(train_loss):.1e} (floor {math.sqrt(floor):.1e})"
            objection = f"the best fit leaves a relative error of {left}"
        if objection:
            contradictions_QI = _contradictions(comparison, x_QI) if train_loss <= floor else None
            return Verdict(objection, certificate, contradictions_QI)
        relative_O = tolerance.unit_O / spread_O
        return Verdict(weakness(probes_QI, relative_O), certificate)


def confirm(box: BlackBox, recovery: Recovery) -> Recovery:
    """A verified recovery beside all answers once more, some of which were given after its verdict."""
    certificate = recovery.certificate
    if certificate is None or not recovery.verified:
        return recovery
    unit_O = torch.tensor(certificate.allowed, dtype=torch.float64) / AGREEMENT_WORST
    tolerance = Tolerance(unit_O, torch.tensor(certificate.terms, dtype=torch.float64), box.error_due)
    x_QI, y_QO = box.asked()
    comparison = compare(recovery.function, x_QI, y_QO, tolerance, box.reach)
    spread_O = torch.tensor(certificate.spread, dtype=torch.float64)
    certificate = certify(comparison, tolerance, x_QI, certificate.fresh, box.noise_O, spread_O, box.untold)
    objection = _disagreement(comparison, "of the run's") or _saturation(box, recovery.function, tolerance)
    return dataclasses.replace(
        recovery,
        verified=not objection,
        reason=objection or agreement(certificate),
        metrics={**recovery.metrics, **certificate.metrics()},
        certificate=certificate,
    )


def agreement(certificate: Certificate) -> str:
    """Why a network is verified."""
    return (
        f"{certificate.given} answers of the run and {certificate.fresh} fresh ones agree "
        f"(at most {100 * max(certificate.worst_share):.2g} % of what is allowed) and every neuron is needed"
    )


def _disagreement(comparison: Comparison, whose: str) -> str:
    """Which output disagrees, and by how much; "" if all agree."""
    if comparison.agrees_O.all():
        return ""
    output = int((~comparison.agrees_O).nonzero()[0])
    text = (
        f"output {output}: {int(comparison.contradicted_Q.sum())} of {comparison.count} {whose} answers contradict it"
    )
    return (
        f"{text}, by up to {float(comparison.largest_O[output]):.1e} (in units of what rounding and fit explain: "
        f"at most {float(comparison.ratio_O[output]):.1e}, allowed {AGREEMENT_WORST:g}; root mean square "
        f"{float(comparison.mean_ratio_O[output]):.1e}, allowed {AGREEMENT:g})"
    )


def _saturation(box: BlackBox, network: Network, tolerance: Tolerance) -> str:
    """What is held against a network by probabilities that tell no scores; "" if nothing."""
    if box.standard is None:
        return ""
    x_QI, p_QC = box.saturated()
    wrong = int(contradicted_probabilities(network, box.standard, x_QI, p_QC, tolerance).sum())
    return f"{wrong} of {len(x_QI)} probabilities of the run that are all but 0 or 1 contradict it" if wrong else ""


def _contradictions(comparison: Comparison, x_QI: Tensor) -> Tensor:
    """Some of the inputs at which answers contradict, from the least to the worst; the worst where none does alone."""
    order_Q = comparison.ratio_Q.argsort()
    contradicted = max(int(comparison.contradicted_Q.sum()), min(CONTRADICTIONS, len(order_Q)))
    chosen = torch.linspace(len(order_Q) - contradicted, len(order_Q) - 1, min(contradicted, CONTRADICTIONS)).round()
    return x_QI[order_Q[chosen.long()]].clone()


def _fresh(run: Run, probes: Probes) -> tuple[Tensor, Tensor]:
    """Queries that had no part in the fit: those in the problem's coordinates, and all of them.

    All are also those of other rounds' coordinates, those in the range of all answers so far and beyond, and the user's
    data, as far as their answers tell scores.
    """
    count, generator = run.config.probes.fresh, run.generator
    own_QI = run.box.place(probes.draw(count, generator, FRESH_SCALES))
    few = max(2, count // ELSEWHERE)
    others = [coordinates for coordinates in run.explored if coordinates is not probes.coordinates]
    parts = [coordinates.draw(math.ceil(few / len(others)), generator, FRESH_SCALES) for coordinates in others]
    data = [] if run.data_QI is None else [run.data_QI[:count]]
    data = [x_QI[torch.isfinite(run.box.told(x_QI)).all(1)] for x_QI in data]
    elsewhere_QI = run.box.place(torch.cat([*parts, beyond(run.box.asked()[0], few, generator)]))
    return torch.cat([own_QI, *data]), torch.cat([own_QI, *data, elsewhere_QI])


def beyond(asked_QI: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """x[count, I] over the range of the inputs asked so far, as many of every size from the usual to the largest.

    Two of them, in opposite corners, lie beyond it: in each coordinate, and the first in its norm.
    """
    low_I, high_I = asked_QI.amin(0), asked_QI.amax(0)
    middle_I, half_I = (low_I + high_I) / 2, BEYOND * (high_I - low_I) / 2
    some_QI = asked_QI[:: 1 + len(asked_QI) // USUAL]
    usual_I = some_QI.median(0).values
    least = float(((some_QI - usual_I).abs().median(0).values / half_I.clamp(min=1e-300)).median().clamp(1e-12, 1.0))
    size_Q1 = least ** torch.rand(count, 1, generator=generator, dtype=torch.float64)
    unit_QI = 2 * torch.rand(count, len(low_I), generator=generator, dtype=torch.float64) - 1
    unit_QI[0] = torch.where(middle_I >= 0, 1.0, -1.0)
    unit_QI[1] = -unit_QI[0]
    inner_QI = torch.minimum(torch.maximum(usual_I + size_Q1 * half_I * unit_QI, low_I), high_I)
    return torch.cat([(middle_I + half_I * unit_QI)[:2], inner_QI[2:]])


def _tolerance(run: Run, problem: Problem, network: Network, polished: bool) -> tuple[Tolerance, Tensor]:
    """What disagreement is due, and the answers' standard deviation per output (1 where it is 0), [O].

    The fit's own error relative to the spread, or the noise, which was measured elsewhere and is carried over in
    proportion to the terms (less of it where it is that of rounding to multiples, which is bounded); whatever is
    larger, and never below float64's rounding of the answers.
    """
    data = problem.data
    spread_O = data.scale * data.y_QO.std(0)
    spread_O = torch.where(spread_O > 0, spread_O, torch.ones_like(spread_O))
    here_O, there_O = (
        network.outputs_and_terms(x_QI)[1].square().mean(0).sqrt().clamp(min=1e-300)
        for x_QI in (data.x_QI, run.box.noise_QI)
    )
    fit = math.sqrt(run.config.solver.floor)
    if not polished:
        fit = max(fit, DIRECTION_MARGIN * problem.probes.coordinates.error)
    noise_O = run.box.noise_due_O * here_O / there_O
    rounding_O = torch.finfo(torch.float64).eps * (data.mean_O.abs() + spread_O)
    return Tolerance(
        torch.maximum(torch.maximum(fit * spread_O, noise_O), rounding_O), here_O, run.box.error_due
    ), spread_O


def _weakness(run: Run, problem: Problem, weights: Weights, x_QI: Tensor, relative_O: Tensor) -> str:
    """What the queries do not determine of a network that agrees; "" if nothing."""
    activation = run.activation
    needed, layer, neuron = _least_needed(activation, weights, x_QI, relative_O)
    if not needed > NEEDED:
        return f"a neuron can be dropped: that costs {needed:.1e} times what a fit may leave (needed: {NEEDED:g})"
    if needed < 1 / float(relative_O.min()) and _fits_without(run, problem, weights, layer, neuron):
        return f"a neuron can be dropped: the others of hidden layer {layer + 1}, fitted again, do without it"
    layer, opposite = _opposites(activation, weights)
    if opposite:
        return (
            f"{opposite} neurons of hidden layer {layer + 1} are opposites, which carry a linear term together: the "
            "black box has neurons that never bend where it was asked, or a linear path"
        )
    straight = _never_bent(activation, weights, x_QI)
    if straight:
        return f"{straight} neurons are on one side of their kink at all queries, which do not determine them"
    asked_QI, to_RI = torch.cat([x_QI, problem.data.x_QI[:DETERMINING]]), problem.probes.coordinates.to_RI
    loose = _undetermined(activation, weights, asked_QI, asked_QI @ to_RI.T)
    if loose:  # what seldom shows was met on scanned lines; all answers of the run are compared, too
        asked_QI = torch.cat([asked_QI, _as_near(run.box.asked()[0], asked_QI)])
        loose = _undetermined(activation, weights, asked_QI, asked_QI @ to_RI.T)
    if loose:
        return f"{loose} neurons respond to an input at none of the queries, which do not determine its weight"
    return ""


def _as_near(x_QI: Tensor, others_QI: Tensor) -> Tensor:
    """Those of the inputs that are no farther out than the others (farther ones would outweigh these), thinned out."""
    near_QI = x_QI[x_QI.norm(dim=1) <= others_QI.norm(dim=1).max()]
    return near_QI[:: max(1, math.ceil(near_QI.numel() / NEAR_NUMBERS))]


def _least_needed(activation: Activation, weights: Weights, x_QI: Tensor, relative_O: Tensor) -> tuple[float, int, int]:
    """Smallest cost of dropping a hidden neuron, its layer and number.

    The cost is the squared error of the next layer's pre-activations after their weights are solved again. Each of them
    counts relative to its spread and to what a fit may leave of it, `relative_O` for the outputs.
    """
    least, hidden_QH = (math.inf, 0, 0), x_QI
    for layer, ((w, b), (w_next, b_next)) in enumerate(itertools.pairwise(weights)):
        design_QF = features(torch.cat([w, b[:, None]], dim=1), hidden_QH, activation, False)
        next_QH = design_QF @ torch.cat([w_next, b_next[:, None]], dim=1).T
        rounding_H = torch.finfo(torch.float64).eps * next_QH.abs().amax(0)
        due = relative_O if layer == len(weights) - 2 else relative_O.min()
        next_QH = next_QH / (due * torch.maximum(next_QH.std(0), rounding_H).clamp(min=1e-300))
        coefficients_FH, _ = solve_outgoing(design_QF, next_QH)
        costs_H = drop_costs(design_QF, coefficients_FH, len(b))
        least = min(least, (float(costs_H.min()), layer, int(costs_H.argmin())))
        hidden_QH = design_QF[:, :-1]
    return least


def _fits_without(run: Run, problem: Problem, weights: Weights, layer: int, neuron: int) -> bool:
    """Whether the network fits as exactly without a neuron, when all its weights are free to move.

    Two neurons that differ by a small delta do the work of one to order delta^2, and more. Dropping one of them costs
    delta^2 while the others stay, so only costs below the root of the floor need this test.
    """
    (w, b), (w_next, b_next), data = weights[layer], weights[layer + 1], problem.data
    kept = torch.arange(len(b)) != neuron
    fewer = [*weights[:layer], (w[kept], b[kept]), (w_next[:, kept], b_next), *weights[layer + 2 :]]
    net = DenseNet((run.box.inputs, *(len(b) for _, b in fewer)), run.activation)
    solution = problem.fit(net, to_theta(fewer, data.mean_O, data.scale), data.x_QI)
    return float(solution.loss_N[0]) <= problem.floor


def _opposites(activation: Activation, weights: Weights) -> tuple[int, int]:
    """The first layer of a piecewise linear network with neurons of which another is the opposite, and how many.

    f(u) - f(-u) has no bend: opposite incoming and outgoing weights are a linear term and no neurons.
    """
    if activation.symmetry != "scaled":
        return 0, 0
    for layer, ((w, b), (w_next, _)) in enumerate(itertools.pairwise(weights)):
        neurons_HK = torch.cat([w, b[:, None]], dim=1)
        size_H = neurons_HK.norm(dim=1).clamp(min=1e-300)
        unit_HK, out_HO = neurons_HK / size_H[:, None], w_next.T * size_H[:, None]
        opposite_HH = torch.cdist(unit_HK, -unit_HK) < OPPOSITE
        opposite_HH &= torch.cdist(out_HO, -out_HO) < OPPOSITE * out_HO.norm(dim=1)
        if opposite_HH.any():
            return layer, int(opposite_HH.any(1).sum())
    return 0, 0


def _never_bent(activation: Activation, weights: Weights, x_QI: Tensor) -> int:
    """Hidden neurons of a piecewise linear network that are linear at all queries; 0 for smooth activations."""
    if activation.symmetry != "scaled":
        return 0
    count, hidden_QH = 0, x_QI
    for w, b in weights[:-1]:
        pre_QH = hidden_QH @ w.T + b
        count += int(((pre_QH > 0).all(0) | (pre_QH < 0).all(0)).sum())
        hidden_QH = activation(pre_QH)
    return count


def _undetermined(activation: Activation, weights: Weights, x_QI: Tensor, z_QR: Tensor) -> int:
    """Hidden neurons with a weight that could be another without changing any answer, to first order.

    Where a neuron does not respond (a relu that is off) no weight of it shows. A neuron is determined when its inputs,
    weighted by its response, have the rank that they have without. The first layer's inputs are the relevant directions
    z: what the black box does not respond to was found before.
    """
    count, hidden_QH = 0, x_QI
    for w, b in weights[:-1]:
        inputs_QH = z_QR if hidden_QH is x_QI else hidden_QH
        design_QK = torch.cat([inputs_QH, inputs_QH.new_ones(len(inputs_QH), 1)], dim=1)
        design_QK = design_QK / design_QK.norm(dim=0).clamp(min=torch.finfo(design_QK.dtype).tiny)
        eigenvalue_K = torch.linalg.eigvalsh(design_QK.T @ design_QK)  # of unit columns: squares of singular values
        least = eigenvalue_K[eigenvalue_K > VANISHING * eigenvalue_K[-1]].min()
        rank = int((eigenvalue_K >= least).sum())
        pre_QH = hidden_QH @ w.T + b
        for response_Q in activation.derivative(pre_QH).T:
            weighted_QK = response_Q[:, None] * design_QK
            count += bool(torch.linalg.eigvalsh(weighted_QK.T @ weighted_QK)[-rank] <= VANISHING * least)
        hidden_QH = activation(pre_QH)
    return count
