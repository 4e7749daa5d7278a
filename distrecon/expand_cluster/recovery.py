"""Expand-and-Cluster, start to end: query, train students, cluster, collapse, fit exactly, verify on fresh queries.

After Martinelli, Simsek, Gerstner, Brea: "Expand-and-Cluster: Parameter Recovery of Neural Networks" (ICML 2024,
arXiv 2304.12794); students are trained by a second-order method, piecewise linear networks are recovered from their
bends where they can be, and the result is accepted only by the rule in verdict.py.

Legend: N students, Q queries, I inputs, P parameters.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.config import flatten
from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox, OutOfQueries
from distrecon.expand_cluster.collapse import collapse, takes_skip
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis, read_request
from distrecon.expand_cluster.convolution.recovery import nothing, recover_layers
from distrecon.expand_cluster.coordinates import Coordinates, find_coordinates
from distrecon.expand_cluster.diagnosis import PIECEWISE_LINEAR, SMOOTH
from distrecon.expand_cluster.examination import Examined, examine
from distrecon.expand_cluster.from_bends import recover_from_bends
from distrecon.expand_cluster.from_derivatives import recover_from_derivatives
from distrecon.expand_cluster.from_saturation import recover_from_saturation
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import pool_neurons
from distrecon.expand_cluster.peel import peel
from distrecon.expand_cluster.probes import Committee, Probes
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.result import Recovery, better
from distrecon.expand_cluster.run import Progress, Run
from distrecon.expand_cluster.scores import compare
from distrecon.expand_cluster.stages import Stages
from distrecon.expand_cluster.students import solved, train, train_on
from distrecon.expand_cluster.surroundings import Bound
from distrecon.expand_cluster.thresholds import NONLINEAR, NONLINEAR_DEEP, UNDERFIT, UNDERFIT_SOLVED
from distrecon.expand_cluster.verdict import conclude, confirm
from distrecon.nets.activations import ACTIVATIONS
from distrecon.nets.activations import activation as find_activation

Rows = Tensor | np.ndarray
Start = Callable[[str, RecoveryConfig, str], Run]

LEAST_GUESS = 4  # neurons that a black box is taken to have at first
SCALE_ROUNDS = (1.0, 2.0, 0.5)  # of the probes in the rounds of students, in turn
REACH = 100.0  # of the probes' deviations: where probes still learn more than slopes

UNKNOWN = "unknown"
BRIEF_STUDENTS, BRIEF_ITERATIONS = 3, 40  # of the trial fits with every activation
CANDIDATES = 2  # activations that get a full recovery after the trial


def recover_network(
    black_box: Any,
    input_size: int | Sequence[int],
    activation: str = UNKNOWN,
    hidden_layers: int = 1,
    seed: int = 0,
    data: Rows | None = None,
    domain: tuple[Bound, Bound] | None = None,
    outputs: str = "values",
    max_rows: int | None = None,
    retries: int = 0,
    answers: str | Path | None = None,
    *,
    layers: str | None = None,
    config: RecoveryConfig | None = None,
    progress: Progress | None = None,
    stages: Path | None = None,
) -> Recovery:
    """Recover the layer sizes and weights of a black box from its answers alone.

    `black_box` is a deterministic function of [Q, I] with answers [Q, O] or [Q] (torch or numpy), a `torch.nn.Module`,
    or a method of a scikit-learn estimator. `activation` "unknown" tries those that fit what the black box shows and
    goes on with the best two.

    - `layers`: what a convolutional network is taken to be, such as "conv3p1 pool2 conv3 linear" (see
      convolution/hypothesis.py), or "unknown", which tries the usual ones. Its `input_size` is [C, H, W], and it is
      asked [Q, C, H, W];
    - `data` [Q, I]: inputs of interest, which set the centre and the scale of the queries and are asked, too;
    - `domain` (low, high), numbers or [I]: no query leaves it;
    - `outputs` "probabilities": rows that add up to 1, or one column of a sigmoid's. The weights then give log-odds
      relative to one class (see odds.py) and `result(inputs)` probabilities. Rows that add up to 1 are recognised;
    - `max_rows` of one call; `retries` of a call that raises, after 1, 2, 4, ... seconds;
    - `answers`: a folder that keeps every answer at once, so that a run that starts again pays for none twice (one or
      two queries are asked again, to see that it is the same black box);
    - `progress` sees (stage, value); `seed` is combined with `config.seed`. The same arguments give the same result;
    - `stages`: a folder for trained students: an interrupted recovery called again with the same arguments and folder
      continues after the last of them, to the same result.

    Raises UserError for a wrong request: an unknown activation, answers of a wrong shape or not finite, a black box
    that raises, fewer probes than unknowns. A recovery that fails is no error: its `verified` is False, its `reason`
    says why, its `findings` what the black box was found to be. When the query budget runs out, the best network so far
    is returned, unverified.
    """
    config = config or RecoveryConfig()
    names = list(ACTIVATIONS) if activation == UNKNOWN else [find_activation(activation).name]
    if hidden_layers < 1:
        raise UserError(f"hidden_layers must be at least 1, not {hidden_layers}")
    image, hypotheses = read_request(input_size, layers)
    input_size = input_size if isinstance(input_size, int) else math.prod(input_size)
    own_QI = None if data is None else _rows(data, input_size)
    started = time.monotonic()
    seeded = config.seed * 1_000_003 + seed
    generator = torch.Generator().manual_seed(seeded)
    budget = config.budget.queries
    pooled = any(stage.pool > 1 and not stage.average for taken in hypotheses for stage in taken.stages)
    examined = examine(
        black_box,
        input_size,
        own_QI,
        domain,
        outputs,
        max_rows,
        retries,
        answers,
        budget,
        generator,
        None if hypotheses else hidden_layers,
        image,
        pooled,
    )
    request = [input_size, layers or hidden_layers, seed, flatten(config)]
    possible = _possible(examined, names)
    reason = str(examined.stopped or "") or ("" if possible else _impossible(examined, names[0]))
    if reason and hypotheses:
        return _finish(examined, nothing(examined.box, names[0], hypotheses[0], reason), own_QI)
    if reason:
        return _finish(examined, _empty(examined.box, names[0], hidden_layers, reason), own_QI)

    def start(name: str, config: RecoveryConfig, folder: str) -> Run:
        kept = stages / folder if stages and folder else stages
        return Run(
            box=examined.box,
            activation=find_activation(name),
            hidden_layers=hidden_layers,
            config=config,
            generator=torch.Generator().manual_seed(seeded),
            data_QI=None if own_QI is None else examined.around.standard(own_QI),
            deadline=started + config.budget.seconds if config.budget.seconds else None,
            progress=progress or (lambda stage, value: None),
            stages=Stages(kept, [*request, name]) if kept else None,
            seconds={"examination": time.monotonic() - started},
        )

    if hypotheses:
        recovery = _try_layers(start, hypotheses, possible, config)
    elif activation == UNKNOWN:
        recovery = _try_all(start, possible, config)
    else:
        recovery = _recover(start(activation, config, ""))
    return _finish(examined, recovery, own_QI)


def _rows(data: Rows, input_size: int) -> Tensor:
    rows_QI = torch.as_tensor(data)
    rows_QI = rows_QI.flatten(1) if rows_QI.ndim > 2 else rows_QI
    if rows_QI.ndim != 2 or rows_QI.shape[1] != input_size or not len(rows_QI):
        raise UserError(f"data has shape {list(rows_QI.shape)}, not [Q, {input_size}]")
    if not torch.isfinite(rows_QI).all():
        raise UserError("data has values that are not finite")
    return rows_QI.double()


def _possible(examined: Examined, names: list[str]) -> list[str]:
    """The activations that a piecewise linear, or smooth, function may have, where it was found to be one; else all."""
    if examined.named(PIECEWISE_LINEAR) is not None:
        return [name for name in names if ACTIVATIONS[name].symmetry == "scaled"]
    if examined.named(SMOOTH) is not None:
        return [name for name in names if ACTIVATIONS[name].symmetry != "scaled"]
    return names


def _impossible(examined: Examined, name: str) -> str:
    """Why a network of this activation is not looked for."""
    return f"not a network of {name}: {examined.named(PIECEWISE_LINEAR) or examined.named(SMOOTH)}"


def _recover(run: Run) -> Recovery:
    """The best recovery with one activation, in standard inputs and scores; what there is when the queries run out."""
    try:
        recovery = _attempts(run)
    except OutOfQueries as error:
        best: Recovery | None = None
        for candidate in run.candidates:
            best = better(candidate, best)
        if best is None:
            recovery = _empty(run.box, run.activation.name, run.hidden_layers, str(error))
        else:
            recovery = dataclasses.replace(best, verified=False, reason=f"{error}; the best network so far")
    return dataclasses.replace(recovery, history=run.history, seconds=dict(run.seconds))


def _empty(box: BlackBox, activation: str, hidden_layers: int, reason: str) -> Recovery:
    """A network of one neuron a layer that gives the mean of the answers: nothing was found."""
    sizes = [box.inputs, *[1] * hidden_layers, box.outputs]
    weights = [
        (torch.zeros(out, cols, dtype=torch.float64), torch.zeros(out, dtype=torch.float64))
        for cols, out in itertools.pairwise(sizes)
    ]
    return Recovery(weights, activation, False, reason, [], {"recover/train_loss": 1.0, "recover/students": 0})


def _brief(config: RecoveryConfig, students: int) -> RecoveryConfig:
    """A few students a short fit, in one round."""
    return dataclasses.replace(
        config,
        students=dataclasses.replace(config.students, count=students),
        solver=dataclasses.replace(config.solver, iterations=BRIEF_ITERATIONS),
        budget=dataclasses.replace(config.budget, attempts=1),
    )


def _best_first(trials: dict[Any, Recovery], recover: Callable[[Any], Recovery]) -> Recovery:
    """All rounds with the best of what was tried, best first."""
    best: Recovery | None = None
    for key in sorted(trials, key=lambda key: trials[key].metrics["recover/train_loss"])[:CANDIDATES]:
        best = better(recover(key), best)
        if best.verified:
            break
    assert best is not None
    return best


def _try_all(start: Start, names: list[str], config: RecoveryConfig) -> Recovery:
    """A few students a short fit with every activation, then all rounds with the best of them, best first."""
    brief = _brief(config, BRIEF_STUDENTS)
    trials = {name: _recover(start(name, brief, f"{name}-brief")) for name in names}
    return _best_first(trials, lambda name: _recover(start(name, config, name)))


def _try_layers(start: Start, hypotheses: list[Hypothesis], names: list[str], config: RecoveryConfig) -> Recovery:
    """One student a short fit with every hypothesis and activation, the cheapest hypotheses first, until one is
    verified; else all rounds with the best of them."""
    pairs, trials = list(itertools.product(hypotheses, names)), dict[tuple[Hypothesis, str], Recovery]()
    if len(pairs) == 1:
        return recover_layers(start(names[0], config, ""), hypotheses[0])
    for hypothesis, name in pairs:
        trials[hypothesis, name] = recover_layers(start(name, _brief(config, 1), ""), hypothesis)
        if trials[hypothesis, name].verified:
            return trials[hypothesis, name]
    return _best_first(trials, lambda pair: recover_layers(start(pair[1], config, ""), pair[0]))


def _coordinates(run: Run, contradictions_QI: Tensor | None = None) -> Coordinates:
    """The relevant directions, also those that show only where answers contradict what was found without them."""
    with run.timed("queries"):
        subspace, generator = run.config.probes.subspace, run.generator
        coordinates = find_coordinates(run.box, run.activation, subspace, generator, contradictions_QI)
    run.progress("directions", coordinates.rank)
    return coordinates


def _attempts(run: Run) -> Recovery:
    """From the bends of a piecewise linear black box, or rounds of students until one is verified.

    Each round takes fresh probes of another scale, a share of them round inputs whose answers contradicted an exact fit
    before; these may show directions that were not seen. Derivatives are tried before students that need a warm start,
    and before the second round of others. After an underfit the next students are wider; else, now and
    again, they train longer on more probes.
    """
    coordinates = _coordinates(run)
    bends = recover_from_bends(run, coordinates)
    contradictions_QI = bends.recovery.contradictions_QI if bends is not None else None
    if contradictions_QI is not None:
        coordinates = _coordinates(run, contradictions_QI)
        bends = recover_from_bends(run, coordinates) or bends
    if bends is not None and (bends.recovery.verified or bends.loss <= bends.problem.floor):  # no student fits better
        return bends.recovery
    best = bends.recovery if bends is not None else None
    guess = run.config.students.width or max(coordinates.rank, LEAST_GUESS)
    patience, committee, derivatives = 1, None, run.config.probes.derivatives
    share = NONLINEAR if run.hidden_layers == 1 else NONLINEAR_DEEP
    if derivatives:
        recovery = recover_from_saturation(run, coordinates)
        if recovery is not None and recovery.verified:
            return recovery
        best = better(recovery, best) if recovery is not None else best
    for attempt in range(run.config.budget.attempts):
        if derivatives and (attempt or not solved(run, _students(run, coordinates.rank, guess))):
            recovery, derivatives = recover_from_derivatives(run, coordinates), False
            best = better(recovery, best) if recovery is not None else best
            if best is not None and best.verified:
                break
        used = coordinates.excited(share).rescaled(SCALE_ROUNDS[attempt % len(SCALE_ROUNDS)])
        outcome = _round(run, Probes(used, contradictions_QI, committee), guess, patience, attempt)
        best, committee = better(outcome.recovery, best), outcome.committee
        if outcome.recovery.verified or run.out_of_time():
            break
        if (within_QI := _within_reach(outcome.recovery.contradictions_QI, coordinates)) is not None:
            contradictions_QI = within_QI
            coordinates = _coordinates(run, contradictions_QI)
        loss = outcome.recovery.metrics["recover/student_loss_best"]
        if outcome.underfit and not run.config.students.width and (loss > UNDERFIT or attempt % 2 == 0):
            guess *= 2
        elif attempt % 2:
            patience *= 2
    assert best is not None
    return best


def _within_reach(x_QI: Tensor | None, coordinates: Coordinates) -> Tensor | None:
    """Those inputs from which probes learn more than slopes far out; None where there is none."""
    if x_QI is None:
        return None
    distance_Q = (x_QI @ coordinates.to_RI.T).norm(dim=1) / coordinates.rank**0.5
    return x_QI[distance_Q < REACH] if (distance_Q < REACH).any() else None


def _students(run: Run, rank: int, guess: int) -> DenseNet:
    """Students of a black box of `rank` relevant directions whose layers are taken to be `guess` wide."""
    widths = [math.ceil(run.config.students.rho * guess)] * run.hidden_layers
    skip = run.hidden_layers == 1 and takes_skip(run.activation)
    return DenseNet((rank, *widths, run.box.outputs), run.activation, skip)


@dataclass(frozen=True)
class _Outcome:
    """Of one round: its best recovery, whether its students were too narrow, and the better half of them."""

    recovery: Recovery
    underfit: bool
    committee: Committee | None


def _round(run: Run, probes: Probes, guess: int, patience: int, attempt: int) -> _Outcome:
    """Students of one width: a fixed number, or batches until two in a row give the same verified size."""
    settings = run.config.students
    net = _students(run, probes.coordinates.rank, guess)
    problem = run.problem(probes, net.num_parameters, patience)
    batches = [settings.count] if settings.count else [settings.batch] * math.ceil(settings.maximum / settings.batch)
    theta_NP = torch.empty(0, net.num_parameters, dtype=torch.float64)
    best: Recovery | None = None
    verified: list[int] = []
    underfit = False
    limit = UNDERFIT_SOLVED if solved(run, net) else UNDERFIT
    for count in batches:
        stage = f"students {attempt + 1}"
        compute = partial(train, run, net, count, problem, patience, stage)
        kept = f"{stage} from {len(theta_NP)}"
        new_NP = run.stages.keep(kept, run.generator, compute) if run.stages else compute()
        theta_NP = torch.cat([theta_NP, new_NP])
        recovery = _collapse(run, problem, net, theta_NP)
        best = better(recovery, best)
        if recovery.verified:
            verified.append(recovery.layer_sizes[0])
        underfit = not recovery.verified and recovery.metrics["recover/student_loss_best"] > limit
        if (len(verified) > 1 and verified[-1] == verified[-2]) or underfit or run.out_of_time():
            break
        if not recovery.verified and len(theta_NP) >= 2 * settings.batch:
            break
    assert best is not None
    return _Outcome(best, underfit, _committee(problem, net, theta_NP))


def _committee(problem: Problem, net: DenseNet, theta_NP: Tensor) -> Committee | None:
    """The better half of the students, at least two; None of fewer."""
    loss_N = net.loss(theta_NP, problem.data.z_QR, problem.data.y_QO).nan_to_num(torch.inf)
    better_N = loss_N.argsort()[: max(2, len(loss_N) // 2)]
    return Committee(net, theta_NP[better_N], problem.probes.coordinates.to_RI) if len(loss_N) > 1 else None


def _collapse(run: Run, problem: Problem, net: DenseNet, theta_NP: Tensor) -> Recovery:
    """Cluster, collapse, polish and verify all students so far."""
    data = problem.data
    with run.timed("collapse"):
        loss_N = net.loss(theta_NP, data.z_QR, data.y_QO)
        finite_N = torch.isfinite(loss_N)
        found: Found | None = None
        if finite_N.any() and run.hidden_layers > 1:
            found = peel(problem, net, theta_NP[finite_N], partial(train_on, run))
        elif finite_N.any():
            found = collapse(problem, pool_neurons(net, theta_NP[finite_N], data.z_QR, data.y_QO))
    metrics = {
        "recover/students": len(theta_NP),
        "recover/students_not_finite": int((~finite_N).sum()),
        "recover/student_loss_best": float(loss_N[finite_N].min()) if finite_N.any() else math.inf,
        "recover/student_loss_median": float(loss_N[finite_N].median()) if finite_N.any() else math.inf,
        "recover/width": net.sizes[1],
    }
    return conclude(run, problem, found, metrics)


def _finish(examined: Examined, recovery: Recovery, own_QI: Tensor | None) -> Recovery:
    """The recovery in the black box's own inputs and answers, with totals, and how it compares on data or draws."""
    box, standard = examined.box, examined.box.standard
    assert standard is not None
    x_QI = standard.inputs(examined.sample.u_QI) if own_QI is None or len(own_QI) > box.left() else own_QI
    answers_QO = box.memory(x_QI)
    recovery = confirm(box, recovery)
    certificate, contradictions_QI = recovery.certificate, recovery.contradictions_QI
    own = dataclasses.replace(
        recovery,
        weights=standard.own(recovery.weights),
        odds=standard.odds,
        findings=examined.findings,
        certificate=certificate.own(standard) if certificate is not None else None,
        contradictions_QI=standard.inputs(contradictions_QI) if contradictions_QI is not None else None,
    )
    own.metrics = {
        **recovery.metrics,
        "recover/layer_sizes": recovery.layer_sizes,
        **{f"recover/size_layer{i + 1}": size for i, size in enumerate(recovery.layer_sizes)},
        **compare(own, answers_QO, x_QI),
        "recover/verified": int(recovery.verified),
        "recover/noise": box.noise,
        "recover/queries": box.queries,
        "time/seconds": sum(recovery.seconds.values()),
    }
    return own
