"""Expand-and-Cluster, start to end: query, train students, cluster, collapse, fit exactly, verify on fresh queries.

After Martinelli, Simsek, Gerstner, Brea: "Expand-and-Cluster: Parameter Recovery of Neural Networks" (ICML 2024,
arXiv 2304.12794); students are trained by a second-order method and the result is accepted only if fresh queries agree
to the numerical floor.

Legend: N students, Q queries, I inputs, R relevant input directions, H hidden, O outputs, P parameters.
"""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distrecon.config import flatten
from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox, Teacher
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.deep import Peeled, peel
from distrecon.expand_cluster.fitting import Committee, Probed, fit, rows_needed
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.piecewise import recover_from_bends
from distrecon.expand_cluster.probes import find_coordinates
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Progress, Run
from distrecon.expand_cluster.scores import compare
from distrecon.expand_cluster.shallow import Collapsed, collapse, neuron_pool, takes_skip
from distrecon.expand_cluster.stages import Stages
from distrecon.expand_cluster.verdict import conclude
from distrecon.expand_cluster.warm_start import warm_start
from distrecon.nets.activations import ACTIVATIONS
from distrecon.nets.activations import activation as find_activation

UNDERFIT = 1e-4  # a best student worse than this (relative loss) is too narrow
UNDERFIT_SOLVED = 1e-12  # the same after the least-squares solver
TRAINED = 1e-6  # students of several layers train on, each time twice as long, until their median is below this loss
PASSES = 4  # at most
LEAST_GUESS = 4
SCALE_ROUNDS = (1.0, 2.0, 0.5)

UNKNOWN = "unknown"
BRIEF_ITERATIONS = 40  # of the trial fits with every activation
CANDIDATES = 2  # activations that get a full recovery after the trial


def recover(
    teacher: Teacher,
    input_size: int,
    activation: str = "tanh",
    hidden_layers: int = 1,
    seed: int = 0,
    config: RecoveryConfig | None = None,
    data_QI: Tensor | None = None,
    progress: Progress | None = None,
    stages: Path | None = None,
) -> Recovery:
    """Recover the layer sizes and weights of a black box from its answers alone.

    `teacher` is any deterministic function [Q, I] -> [Q, O]; `data_QI` are inputs of interest, queried too; `progress`
    sees (stage, value). `seed` is combined with `config.seed`. The same arguments give the same result. `activation`
    "unknown" tries all and goes on with the best two. `stages` is a folder for trained students: an interrupted one
    called again with the same arguments and folder continues after the last of them, to the same result.

    Raises UserError for a wrong request: an unknown activation, answers of a wrong shape, not finite or not repeatable,
    a query budget that is too small, fewer probes than unknowns. A recovery that fails is no error: its `verified` is
    False and its `reason` says why.
    """
    config = config or RecoveryConfig()
    if activation == UNKNOWN:
        return _try_all(teacher, input_size, hidden_layers, seed, config, data_QI, progress, stages)
    act = find_activation(activation)
    if hidden_layers < 1:
        raise UserError(f"hidden_layers must be at least 1, not {hidden_layers}")
    if data_QI is not None and (data_QI.ndim != 2 or data_QI.shape[1] != input_size):
        raise UserError(f"data_QI has shape {list(data_QI.shape)}, not [Q, {input_size}]")
    started = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + seed)
    box = BlackBox(teacher, input_size, config.budget.queries)
    coordinates = find_coordinates(box, act, config.probes.subspace, generator)
    deadline = started + config.budget.seconds if config.budget.seconds else None
    data = data_QI.double() if data_QI is not None else None
    memory = Stages(stages, [input_size, activation, hidden_layers, seed, flatten(config)]) if stages else None
    run = Run(box, act, config, generator, data, progress, deadline, coordinates, hidden_layers, memory)
    run.timed("queries", started)
    run.say("directions", coordinates.rank)
    return _finish(run, _attempts(run))


def _try_all(
    teacher: Teacher,
    input_size: int,
    hidden_layers: int,
    seed: int,
    config: RecoveryConfig,
    data_QI: Tensor | None,
    progress: Progress | None,
    stages: Path | None,
) -> Recovery:
    """A few students a short fit with every activation, then all rounds with the best of them, best first."""
    brief = dataclasses.replace(
        config,
        students=dataclasses.replace(config.students, count=3),
        solver=dataclasses.replace(config.solver, iterations=BRIEF_ITERATIONS),
        budget=dataclasses.replace(config.budget, attempts=1),
    )
    losses, queries = {}, 0
    for name in ACTIVATIONS:
        folder = stages / f"{name}-brief" if stages else None
        trial = recover(teacher, input_size, name, hidden_layers, seed, brief, data_QI, progress, folder)
        losses[name] = trial.metrics["recover/train_loss"]
        queries += trial.metrics["recover/queries"]
    found: Recovery | None = None
    for name in sorted(losses, key=losses.__getitem__)[:CANDIDATES]:
        folder = stages / name if stages else None
        result = recover(teacher, input_size, name, hidden_layers, seed, config, data_QI, progress, folder)
        queries += result.metrics["recover/queries"]
        found = result if found is None or _better(result, found) else found
        if found.verified:
            break
    assert found is not None
    return dataclasses.replace(found, metrics={**found.metrics, "recover/queries": queries})


def _better(new: Recovery, old: Recovery) -> bool:
    """Verified beats unverified; then the later of two verified ones, or the lower loss."""
    if new.verified or old.verified:
        return new.verified
    return bool(new.metrics["recover/train_loss"] < old.metrics["recover/train_loss"])


def _attempts(run: Run) -> Recovery:
    """From the bends of a piecewise linear black box, or rounds of students until one is verified.

    Each round takes fresh probes of another scale. After an underfit the next students are wider; else, now and again,
    they train longer on more probes.
    """
    guess = run.config.students.width or max(run.coordinates.rank, LEAST_GUESS)
    patience, coordinates = 1, run.coordinates
    best = recover_from_bends(run)
    if best is not None and best.verified:
        return best
    run.places_SI = None
    for attempt in range(run.config.budget.attempts):
        run.coordinates = coordinates.rescaled(SCALE_ROUNDS[attempt % len(SCALE_ROUNDS)])
        recovery, underfit = _round(run, guess, patience, attempt)
        if best is None or _better(recovery, best):
            best = recovery
        if recovery.verified or run.late():
            break
        loss = recovery.metrics["recover/student_loss_best"]
        if underfit and not run.config.students.width and (loss > UNDERFIT or attempt % 2 == 0):
            guess *= 2
        elif attempt % 2:
            patience *= 2
    assert best is not None
    return best


def _round(run: Run, guess: int, patience: int, attempt: int) -> tuple[Recovery, bool]:
    """Students of one width: a fixed number, or batches until two in a row give the same verified size."""
    settings = run.config.students
    widths = [math.ceil(settings.rho * guess)] * run.hidden_layers
    skip = run.hidden_layers == 1 and takes_skip(run.activation)
    net = DenseNet((run.coordinates.rank, *widths, run.box.outputs), run.activation, skip)
    data = run.probe(net.num_parameters, patience)
    batches = [settings.count] if settings.count else [settings.batch] * math.ceil(settings.maximum / settings.batch)
    theta_NP = torch.empty(0, net.num_parameters, dtype=torch.float64)
    best: Recovery | None = None
    verified: list[int] = []
    underfit = False
    limit = UNDERFIT_SOLVED if net.num_parameters <= run.config.solver.student_parameters else UNDERFIT
    for count in batches:
        stage = f"students {attempt + 1}"
        train = partial(_train, run, net, count, data, patience, stage)
        new_NP = run.memory.keep(f"{stage} from {len(theta_NP)}", run.generator, train) if run.memory else train()
        theta_NP = torch.cat([theta_NP, new_NP])
        recovery = _collapse(run, net, theta_NP, data)
        if best is None or _better(recovery, best):
            best = recovery
        if recovery.verified:
            verified.append(recovery.layer_sizes[0])
        underfit = not recovery.verified and recovery.metrics["recover/student_loss_best"] > limit
        if (len(verified) > 1 and verified[-1] == verified[-2]) or underfit or run.late():
            break
        if not recovery.verified and len(theta_NP) >= 2 * settings.batch:
            break
    loss_N = net.loss(theta_NP, data.z_QR, data.y_QO).nan_to_num(torch.inf)
    better_N = loss_N.argsort()[: max(2, len(loss_N) // 2)]
    run.committee = Committee(net, theta_NP[better_N], run.coordinates.to_RI) if len(loss_N) > 1 else None
    assert best is not None
    return best, underfit


def _train(run: Run, net: DenseNet, count: int, data: Probed, patience: int, stage: str) -> Tensor:
    """`count` students: by the least-squares solver where they are small enough, else by the first-order optimiser."""
    started, settings = time.monotonic(), run.config.warm_start

    def note(step: int, loss_N: Tensor) -> None:
        run.history.append((stage, step, loss_N.tolist()))
        run.say(stage, float(loss_N.min()))

    theta_NP = net.random(count, run.generator)
    if net.num_parameters <= run.config.solver.student_parameters:  # the solver finds better minima from a random start
        rows = data.rows(rows_needed(net, run.config.solver.rows))
        _, enough = run.floors(data)
        solution = fit(net, theta_NP, rows.z_QR, rows.y_QO, run.config.solver.iterations, enough, run.deadline)
        note(solution.iterations, solution.loss_N)
        run.timed("students", started)
        return solution.theta_NP
    for number in range(PASSES if run.hidden_layers > 1 else 1):
        theta_NP = warm_start(
            net,
            theta_NP,
            data.z_QR,
            data.y_QO,
            run.generator,
            settings.optimiser,
            settings.steps * patience * 2**number,
            settings.learning_rate,
            settings.batch,
            run.deadline,
            note,
        )
        if run.late() or float(net.loss(theta_NP, data.z_QR, data.y_QO).nan_to_num(torch.inf).median()) < TRAINED:
            break
    run.timed("students", started)
    return theta_NP


def _train_on(run: Run, net: DenseNet, theta_NP: Tensor, inputs_QH: Tensor, y_QO: Tensor) -> Tensor:
    """Students of the layers that are left, trained on from where they were carried over to."""
    settings = run.config.warm_start
    return warm_start(
        net,
        theta_NP,
        inputs_QH,
        y_QO,
        run.generator,
        settings.optimiser,
        settings.steps,
        settings.learning_rate / 2,
        settings.batch,
        run.deadline,
    )


def _collapse(run: Run, net: DenseNet, theta_NP: Tensor, data: Probed) -> Recovery:
    """Cluster, collapse, polish and verify all students so far."""
    started = time.monotonic()
    loss_N = net.loss(theta_NP, data.z_QR, data.y_QO)
    finite_N = torch.isfinite(loss_N)
    metrics = {
        "recover/students": len(theta_NP),
        "recover/students_not_finite": int((~finite_N).sum()),
        "recover/student_loss_best": float(loss_N[finite_N].min()) if finite_N.any() else math.inf,
        "recover/student_loss_median": float(loss_N[finite_N].median()) if finite_N.any() else math.inf,
        "recover/width": net.sizes[1],
    }
    run.losses = loss_N.tolist()
    _, rough = run.floors(data)
    found: Collapsed | Peeled | None = None
    if finite_N.any() and run.hidden_layers > 1:
        train = partial(_train_on, run)
        found = peel(net, theta_NP[finite_N], data, run.activation, run.config, rough, run.deadline, train)
    elif finite_N.any():
        pool = neuron_pool(net, theta_NP[finite_N], data.z_QR, data.y_QO)
        found = collapse(pool, data, run.activation, run.config, rough, run.deadline)
    run.timed("collapse", started)
    return conclude(run, found, data, metrics)


def _finish(run: Run, recovery: Recovery) -> Recovery:
    """Put the totals into the metrics."""
    x_QI = run.coordinates.draw(run.config.probes.fresh, run.generator) if run.data_QI is None else run.data_QI
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
