"""Expand-and-Cluster for convolutional black boxes: filters, students, clusters, an exact fit, the verdict.

With one hidden layer students come first, which take few queries; behind more of them the first layer's filters are
read from places far out, and students learn what is left.

Legend: Q queries, I inputs, O outputs, C channels, K numbers that a filter reads.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox, OutOfQueries
from distrecon.expand_cluster.convolution.exact import Fitted, exact_network
from distrecon.expand_cluster.convolution.filters import find_filters
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.convolution.kinks import first_layer, known_layers, next_layer, signs_by_pooling
from distrecon.expand_cluster.convolution.network import Chain, ConvNet
from distrecon.expand_cluster.convolution.rows import Layer
from distrecon.expand_cluster.convolution.search import Search
from distrecon.expand_cluster.convolution.students import collapse, expand
from distrecon.expand_cluster.convolution.weakness import weakness
from distrecon.expand_cluster.coordinates import Coordinates, isotropic
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.result import Recovery, better
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import UNDERFIT_SOLVED
from distrecon.expand_cluster.verdict import agreement, judge_network
from distrecon.nets.activations import activation as find_activation

STUDENTS = 2  # of a round, unless the settings say how many
LEAST_GUESS = 4  # channels that a layer is taken to have at first
NO_BETTER = (
    0.1  # of the best loss of students half as wide: where wider ones leave more, the network is of another kind
)
SCALE_ROUNDS = (1.0, 1.0, 2.0, 2.0, 0.5, 0.5)  # of the probes in the rounds, in turn


def recover_layers(run: Run, hypothesis: Hypothesis) -> Recovery:
    """The best recovery of a network of these layers; what there is when the queries run out."""
    best: Recovery | None = None
    try:
        for recovery in _rounds(run, hypothesis):
            best = better(recovery, best)
            if best.verified or run.out_of_time():
                break
    except OutOfQueries as error:
        if best is None and run.candidates:
            best = run.candidates[-1]
        best = best or nothing(run.box, run.activation.name, hypothesis, "")
        best = dataclasses.replace(best, verified=False, reason=f"{error}; the best network so far")
    assert best is not None
    return dataclasses.replace(best, history=run.history, seconds=dict(run.seconds))


def _rounds(run: Run, hypothesis: Hypothesis) -> Iterator[Recovery]:
    """Recoveries, one a round: students from scratch, or from the first layer's filters, in turn."""
    deep = len(hypothesis.stages) > 1
    with run.timed("queries"):
        coordinates = isotropic(run.box, run.generator)
    if deep and run.activation.name == "relu":
        yield _from_kinks(run, hypothesis, coordinates)
        return
    guess, first_CK = run.config.students.width or LEAST_GUESS, None
    count, least = run.config.students.count or STUDENTS, math.inf
    for attempt in range(run.config.budget.attempts):
        used = coordinates.rescaled(SCALE_ROUNDS[attempt % len(SCALE_ROUNDS)])
        if attempt == (0 if deep else 1):
            with run.timed("filters"):
                found_filters = find_filters(run.box, hypothesis, run.activation, run.generator, coordinates.scale)
            first_CK = None if found_filters is None else found_filters.first_CK
            if first_CK is not None and not deep:
                yield _from_filters(run, hypothesis, used, first_CK)
                continue
        wide = math.ceil(run.config.students.rho * guess)
        widths = [wide] * len(hypothesis.stages)
        if deep and first_CK is not None:
            widths[0] = len(first_CK)
        net = ConvNet(hypothesis, tuple(widths), run.activation)
        problem = _problem(run, net, used)
        with run.timed("students"):
            students = expand(run, problem, net, first_CK if deep else None, count, f"students {attempt + 1}")
        with run.timed("collapse"):
            found = collapse(problem, students)
        losses = [student.loss for student in students]
        metrics = {
            "recover/students": len(students),
            "recover/student_loss_best": min(losses),
            "recover/student_loss_median": sorted(losses)[len(losses) // 2],
            "recover/width": wide,
        }
        yield conclude(run, problem, hypothesis, found, metrics)
        if deep and first_CK is None:
            break
        if min(losses) > UNDERFIT_SOLVED and not run.config.students.width:
            if min(losses) > NO_BETTER * least:
                break
            least, guess = min(losses), 2 * guess


def _from_kinks(run: Run, hypothesis: Hypothesis, coordinates: Coordinates) -> Recovery:
    """Several layers of relu, one after the other from where they bend; the last one completed, then all fitted."""
    with run.timed("kinks"):
        known, layer = _peeled(run, hypothesis, coordinates.scale)
    if layer is None or len(known) < len(hypothesis.stages):
        reason = f"no kinks of hidden layer {len(known) + 1} show a unit of such a network"
        return nothing(run.box, run.activation.name, hypothesis, reason, known)
    points_SI = torch.cat(layer.bends_CSI)
    if hypothesis.stages[-1].pool == 1:
        with run.timed("completion"):
            search = Search(run.box, hypothesis, known[:-1], layer, run.activation, coordinates.scale, run.generator)
            search.run(run.progress, run.out_of_time)
            known = [*search.known, search.units.matrix_CK]
            points_SI = torch.cat([points_SI, search.witnesses()])
    net, theta_P = known_layers(hypothesis, known, run.activation)
    problem = _problem(run, net, coordinates, points_SI)
    with run.timed("collapse"):
        found = exact_network(problem, net, theta_P)
    return conclude(run, problem, hypothesis, found, {"recover/students": 0})


def _peeled(run: Run, hypothesis: Hypothesis, unit: float) -> tuple[list[Tensor], Layer | None]:
    """The matrices of as many layers as show, and the last of them as it was found."""
    filters = find_filters(run.box, hypothesis, run.activation, run.generator, unit)
    layer = None if filters is None else first_layer(filters)
    known: list[Tensor] = []
    while layer is not None:
        known.append(layer.matrix_CK)
        run.progress(f"layer {len(known)}", len(layer.matrix_CK))
        last = hypothesis.stages[len(known) - 1]
        if last.pool > 1 and not last.average:
            sign_C = signs_by_pooling(*known_layers(hypothesis, known, run.activation), layer.bends_CSI)
            known[-1] = sign_C[:, None] * known[-1]
        if len(known) == len(hypothesis.stages) or run.out_of_time():
            break
        layer = next_layer(run.box, hypothesis, known, run.activation, unit, run.generator)
    return known, layer


def _from_filters(run: Run, hypothesis: Hypothesis, coordinates: Coordinates, first_CK: Tensor) -> Recovery:
    """One hidden layer whose filters are known, nearly and up to their signs."""
    pooled = hypothesis.stages[0].pool > 1 and not hypothesis.stages[0].average
    filters_CK = torch.cat([first_CK, -first_CK]) if pooled else first_CK  # pooling tells the signs
    net = ConvNet(hypothesis, (len(filters_CK),), run.activation)
    problem = _problem(run, net, coordinates)
    with run.timed("collapse"):
        found = exact_network(problem, net, net.flatten([filters_CK]))
    return conclude(run, problem, hypothesis, found, {"recover/students": 0})


def _problem(run: Run, net: ConvNet, coordinates: Coordinates, bends_SI: Tensor | None = None) -> Problem:
    unknowns = net.num_parameters + run.box.outputs * (net.num_features + 1)
    return run.problem(Probes(coordinates, bends_SI), unknowns)


def conclude(run: Run, problem: Problem, hypothesis: Hypothesis, found: Fitted, metrics: dict[str, Any]) -> Recovery:
    """The verdict on what was found."""
    data = problem.data
    weights = found.net.weights(found.theta_P, found.readout_OF * data.scale, found.bias_O * data.scale + data.mean_O)
    recovery = Recovery(
        weights,
        run.activation.name,
        False,
        "",
        found.linkage,
        {**metrics, "recover/train_loss": found.loss},
        hypothesis=hypothesis,
    )
    run.candidates.append(recovery)
    run.progress("size", sum(found.net.widths))
    chain = Chain(hypothesis, weights, run.activation)
    verdict = judge_network(run, problem, chain, partial(weakness, problem, found), False, found.loss)
    return dataclasses.replace(
        recovery,
        verified=not verdict.objection,
        reason=verdict.objection or agreement(verdict.certificate),
        metrics={**recovery.metrics, **verdict.certificate.metrics()},
        certificate=verdict.certificate,
        contradictions_QI=verdict.contradictions_QI,
    )


def nothing(
    box: BlackBox, activation: str, hypothesis: Hypothesis, reason: str, known: Sequence[Tensor] = ()
) -> Recovery:
    """The first layers as far as they are known, and one channel for each of the others: a network that answers 0."""
    stages = len(hypothesis.stages)
    net = ConvNet(hypothesis, (*map(len, known), *[1] * (stages - len(known))), find_activation(activation))
    unknown = net.matrices(torch.zeros(net.num_parameters, dtype=torch.float64))[len(known) :]
    theta_P = net.flatten([*known, *unknown])
    outputs = torch.zeros(box.outputs, net.num_features, dtype=torch.float64)
    weights = net.weights(theta_P, outputs, outputs[:, 0])
    metrics = {"recover/train_loss": 1.0, "recover/students": 0}
    return Recovery(weights, activation, False, reason, [], metrics, hypothesis=hypothesis)
