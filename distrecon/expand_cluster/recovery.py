"""Expand-and-Cluster, start to end: query, train students, cluster, collapse, fit exactly, verify on fresh queries.

After Martinelli, Simsek, Gerstner, Brea: "Expand-and-Cluster: Parameter Recovery of Neural Networks" (ICML 2024,
arXiv 2304.12794); students are trained by a second-order method, piecewise linear networks are recovered from their
bends where they can be, and the result is accepted only by the rule in verdict.py.

Legend: N students, Q queries, I inputs, P parameters.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distrecon.config import flatten
from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox, Function
from distrecon.expand_cluster.collapse import collapse, takes_skip
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.coordinates import Coordinates, find_coordinates
from distrecon.expand_cluster.from_bends import recover_from_bends
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import pool_neurons
from distrecon.expand_cluster.peel import peel
from distrecon.expand_cluster.probes import Committee, Probes
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Progress, Run
from distrecon.expand_cluster.scores import compare
from distrecon.expand_cluster.stages import Stages
from distrecon.expand_cluster.students import solved, train, train_on
from distrecon.expand_cluster.thresholds import NEARLY_EXACT, UNDERFIT, UNDERFIT_SOLVED
from distrecon.expand_cluster.verdict import conclude
from distrecon.nets.activations import ACTIVATIONS
from distrecon.nets.activations import activation as find_activation

LEAST_GUESS = 4  # neurons that a black box is taken to have at first
SCALE_ROUNDS = (1.0, 2.0, 0.5)  # of the probes in the rounds of students, in turn

UNKNOWN = "unknown"
BRIEF_STUDENTS, BRIEF_ITERATIONS = 3, 40  # of the trial fits with every activation
CANDIDATES = 2  # activations that get a full recovery after the trial


def recover_network(
    black_box: Function,
    input_size: int,
    activation: str = UNKNOWN,
    hidden_layers: int = 1,
    seed: int = 0,
    data: Tensor | None = None,
    *,
    config: RecoveryConfig | None = None,
    progress: Progress | None = None,
    stages: Path | None = None,
) -> Recovery:
    """Recover the layer sizes and weights of a black box from its answers alone.

    `black_box` is any deterministic function [Q, I] -> [Q, O]; `data` [Q, I] are inputs of interest, queried too;
    `progress` sees (stage, value). `seed` is combined with `config.seed`. The same arguments give the same result.
    `activation` "unknown" tries all and goes on with the best two. `stages` is a folder for trained students: an
    interrupted recovery called again with the same arguments and folder continues after the last of them, to the same
    result.

    Raises UserError for a wrong request: an unknown activation, answers of a wrong shape, not finite or not repeatable,
    a query budget that is too small, fewer probes than unknowns. A recovery that fails is no error: its `verified` is
    False and its `reason` says why.
    """
    config = config or RecoveryConfig()
    if activation == UNKNOWN:
        return _try_all(black_box, input_size, hidden_layers, seed, data, config, progress, stages)
    act = find_activation(activation)
    if hidden_layers < 1:
        raise UserError(f"hidden_layers must be at least 1, not {hidden_layers}")
    if data is not None and (data.ndim != 2 or data.shape[1] != input_size):
        raise UserError(f"data has shape {list(data.shape)}, not [Q, {input_size}]")
    started = time.monotonic()
    run = Run(
        box=BlackBox(black_box, input_size, config.budget.queries),
        activation=act,
        hidden_layers=hidden_layers,
        config=config,
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + seed),
        data_QI=data.double() if data is not None else None,
        deadline=started + config.budget.seconds if config.budget.seconds else None,
        progress=progress or (lambda stage, value: None),
        stages=Stages(stages, [input_size, activation, hidden_layers, seed, flatten(config)]) if stages else None,
        seconds={"queries": time.monotonic() - started},
    )
    with run.timed("queries"):
        coordinates = find_coordinates(run.box, act, config.probes.subspace, run.generator)
    run.progress("directions", coordinates.rank)
    return _with_totals(run, *_attempts(run, coordinates))


def _try_all(
    black_box: Function,
    input_size: int,
    hidden_layers: int,
    seed: int,
    data: Tensor | None,
    config: RecoveryConfig,
    progress: Progress | None,
    stages: Path | None,
) -> Recovery:
    """A few students a short fit with every activation, then all rounds with the best of them, best first."""
    brief = dataclasses.replace(
        config,
        students=dataclasses.replace(config.students, count=BRIEF_STUDENTS),
        solver=dataclasses.replace(config.solver, iterations=BRIEF_ITERATIONS),
        budget=dataclasses.replace(config.budget, attempts=1),
    )

    def recover_as(name: str, config: RecoveryConfig, folder: str) -> Recovery:
        kept = stages / folder if stages else None
        return recover_network(
            black_box, input_size, name, hidden_layers, seed, data, config=config, progress=progress, stages=kept
        )

    losses, queries = {}, 0
    for name in ACTIVATIONS:
        trial = recover_as(name, brief, f"{name}-brief")
        losses[name] = trial.metrics["recover/train_loss"]
        queries += trial.metrics["recover/queries"]
    best: Recovery | None = None
    for name in sorted(losses, key=losses.__getitem__)[:CANDIDATES]:
        recovery = recover_as(name, config, name)
        queries += recovery.metrics["recover/queries"]
        best = _better(recovery, best)
        if best.verified:
            break
    assert best is not None
    return dataclasses.replace(best, metrics={**best.metrics, "recover/queries": queries})


def _better(new: Recovery, old: Recovery | None) -> Recovery:
    """Verified beats unverified; then the later of two verified ones, or the lower loss."""
    if old is None:
        return new
    if new.verified or old.verified:
        return new if new.verified else old
    return new if new.metrics["recover/train_loss"] < old.metrics["recover/train_loss"] else old


def _attempts(run: Run, coordinates: Coordinates) -> tuple[Recovery, Coordinates]:
    """From the bends of a piecewise linear black box, or rounds of students until one is verified.

    Each round takes fresh probes of another scale. After an underfit the next students are wider; else, now and again,
    they train longer on more probes. Returns the best recovery and the coordinates that were used last.
    """
    guess = run.config.students.width or max(coordinates.rank, LEAST_GUESS)
    patience, committee = 1, None
    bends = recover_from_bends(run, coordinates)
    if bends is not None and (bends.recovery.verified or bends.loss <= NEARLY_EXACT):  # no student fits better
        return bends.recovery, bends.problem.probes.coordinates
    best = bends.recovery if bends is not None else None
    for attempt in range(run.config.budget.attempts):
        used = coordinates.rescaled(SCALE_ROUNDS[attempt % len(SCALE_ROUNDS)])
        outcome = _round(run, Probes(used, committee=committee), guess, patience, attempt)
        best, committee = _better(outcome.recovery, best), outcome.committee
        if outcome.recovery.verified or run.out_of_time():
            break
        loss = outcome.recovery.metrics["recover/student_loss_best"]
        if outcome.underfit and not run.config.students.width and (loss > UNDERFIT or attempt % 2 == 0):
            guess *= 2
        elif attempt % 2:
            patience *= 2
    assert best is not None
    return best, used


@dataclass(frozen=True)
class _Outcome:
    """Of one round: its best recovery, whether its students were too narrow, and the better half of them."""

    recovery: Recovery
    underfit: bool
    committee: Committee | None


def _round(run: Run, probes: Probes, guess: int, patience: int, attempt: int) -> _Outcome:
    """Students of one width: a fixed number, or batches until two in a row give the same verified size."""
    settings = run.config.students
    widths = [math.ceil(settings.rho * guess)] * run.hidden_layers
    skip = run.hidden_layers == 1 and takes_skip(run.activation)
    net = DenseNet((probes.coordinates.rank, *widths, run.box.outputs), run.activation, skip)
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
        best = _better(recovery, best)
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


def _with_totals(run: Run, recovery: Recovery, coordinates: Coordinates) -> Recovery:
    """The recovery with the run's totals among its metrics, and how it compares on the data or on probes."""
    x_QI = coordinates.draw(run.config.probes.fresh, run.generator) if run.data_QI is None else run.data_QI
    metrics = {
        **recovery.metrics,
        "recover/layer_sizes": recovery.layer_sizes,
        **{f"recover/size_layer{i + 1}": size for i, size in enumerate(recovery.layer_sizes)},
        **compare(recovery, run.box(x_QI), x_QI),
        "recover/verified": int(recovery.verified),
        "recover/noise": run.box.noise,
        "recover/queries": run.box.queries,
        "time/seconds": sum(run.seconds.values()),
    }
    return dataclasses.replace(recovery, metrics=metrics, history=run.history, seconds=dict(run.seconds))
