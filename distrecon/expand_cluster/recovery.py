"""Expand-and-Cluster, start to end: query, train students, cluster, collapse, fit exactly, verify on fresh queries.

After Martinelli, Simsek, Gerstner, Brea: "Expand-and-Cluster: Parameter Recovery of Neural Networks" (ICML 2024,
arXiv 2304.12794); students are trained by a second-order method and the result is accepted only if fresh queries agree
to the numerical floor.

Legend: N students, Q queries, I inputs, R relevant input directions, H hidden, O outputs, P parameters.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distrecon.config import flatten
from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox, Teacher
from distrecon.expand_cluster.collapse import drop_costs, features, solve_outgoing
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.deep import Peeled, peel
from distrecon.expand_cluster.fitting import Probed, fit, from_weights, rows_needed, to_weights
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.probes import Coordinates, find_coordinates
from distrecon.expand_cluster.result import Recovery, relative_rmse
from distrecon.expand_cluster.scores import compare
from distrecon.expand_cluster.shallow import Collapsed, collapse, neuron_pool, takes_skip
from distrecon.expand_cluster.stages import Stages
from distrecon.expand_cluster.teachers import Weights
from distrecon.expand_cluster.warm_start import warm_start
from distrecon.nets.activations import ACTIVATIONS, Activation
from distrecon.nets.activations import activation as find_activation

UNDERFIT = 1e-4  # a best student worse than this (relative loss) is too narrow
UNDERFIT_SOLVED = 1e-12  # the same after the least-squares solver
NOISE_MARGIN = 10.0  # the floor lies this far above the teacher's rounding noise
DIRECTION_MARGIN = 100.0  # likewise for a fit in relevant directions that are known to a relative error
LEAST_GUESS = 4
SCALE_ROUNDS = (1.0, 2.0, 0.5)

UNKNOWN = "unknown"
BRIEF_ITERATIONS = 40  # of the trial fits with every activation
CANDIDATES = 2  # activations that get a full recovery after the trial

Progress = Callable[[str, float], None]


@dataclass
class _Run:
    """What every stage of one recovery shares."""

    box: BlackBox
    activation: Activation
    config: RecoveryConfig
    generator: torch.Generator
    data_QI: Tensor | None
    progress: Progress | None
    deadline: float | None
    coordinates: Coordinates
    hidden_layers: int = 1
    memory: Stages | None = None
    history: list[tuple[str, int, list[float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def floors(self, data: Probed) -> tuple[float, float]:
        """The relative loss of an exact fit, and of one in relevant directions that carry an error of their own."""
        floor = max(self.config.solver.floor, (NOISE_MARGIN * self.box.noise / data.scale) ** 2)
        return floor, max(floor, (DIRECTION_MARGIN * self.coordinates.error) ** 2)

    def timed(self, stage: str, started: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started

    def say(self, stage: str, value: float) -> None:
        if self.progress is not None:
            self.progress(stage, value)

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


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
    run = _Run(box, act, config, generator, data, progress, deadline, coordinates, hidden_layers, memory)
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


def _attempts(run: _Run) -> Recovery:
    """Rounds of students until one is verified, each on fresh probes of another scale.

    After an underfit the next students are wider; else, now and again, they train longer on more probes.
    """
    guess = run.config.students.width or max(run.coordinates.rank, LEAST_GUESS)
    patience, coordinates = 1, run.coordinates
    best: Recovery | None = None
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


def _round(run: _Run, guess: int, patience: int, attempt: int) -> tuple[Recovery, bool]:
    """Students of one width: a fixed number, or batches until two in a row give the same verified size."""
    settings = run.config.students
    widths = [math.ceil(settings.rho * guess)] * run.hidden_layers
    skip = run.hidden_layers == 1 and takes_skip(run.activation)
    net = DenseNet((run.coordinates.rank, *widths, run.box.outputs), run.activation, skip)
    data = _probe(run, net, patience)
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
    assert best is not None
    return best, underfit


def _probe(run: _Run, net: DenseNet, patience: int) -> Probed:
    """Training queries for students of this shape, some of them the user's data, in random order."""
    settings, unknowns = run.config.probes, net.num_parameters
    if settings.count and settings.count * net.sizes[-1] < unknowns:
        raise UserError(
            f"probes.count = {settings.count} gives {settings.count * net.sizes[-1]} equations, "
            f"fewer than the students' {unknowns} unknowns"
        )
    started = time.monotonic()
    count = settings.count * patience or patience * max(2000, 4 * unknowns // net.sizes[-1])
    own = 0 if run.data_QI is None else min(len(run.data_QI), int(settings.data_share * count))
    x_QI = run.coordinates.draw(count - own, run.generator)
    if run.data_QI is not None and own:
        rows = torch.randperm(len(run.data_QI), generator=run.generator)[:own]
        x_QI = torch.cat([x_QI, run.data_QI[rows]])
    x_QI = x_QI[torch.randperm(count, generator=run.generator)]
    data = Probed.of(x_QI, x_QI @ run.coordinates.to_RI.T, run.box(x_QI))
    run.timed("queries", started)
    return data


def _train(run: _Run, net: DenseNet, count: int, data: Probed, patience: int, stage: str) -> Tensor:
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
    theta_NP = warm_start(
        net,
        theta_NP,
        data.z_QR,
        data.y_QO,
        run.generator,
        settings.optimiser,
        settings.steps * patience,
        settings.learning_rate,
        settings.batch,
        run.deadline,
        note,
    )
    run.timed("students", started)
    return theta_NP


def _train_on(run: _Run, net: DenseNet, theta_NP: Tensor, inputs_QH: Tensor, y_QO: Tensor) -> Tensor:
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


def _collapse(run: _Run, net: DenseNet, theta_NP: Tensor, data: Probed) -> Recovery:
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
    floor, rough = run.floors(data)
    found: Collapsed | Peeled | None = None
    if finite_N.any() and run.hidden_layers > 1:
        train = partial(_train_on, run)
        found = peel(net, theta_NP[finite_N], data, run.activation, run.config, rough, run.deadline, train)
    elif finite_N.any():
        pool = neuron_pool(net, theta_NP[finite_N], data.z_QR, data.y_QO)
        found = collapse(pool, data, run.activation, run.config, rough, run.deadline)
    if found is None:
        nothing = DenseNet((run.coordinates.rank, *[1] * run.hidden_layers, run.box.outputs), run.activation)
        theta_P = torch.zeros(nothing.num_parameters, dtype=torch.float64)
        weights = to_weights(nothing, theta_P, data, run.coordinates.to_RI)
        metrics["recover/train_loss"] = 1.0
        return Recovery(weights, run.activation.name, False, "no student has neurons that contribute", [], metrics)
    run.timed("collapse", started)
    metrics["recover/train_loss"] = found.loss
    weights = to_weights(found.net, found.theta_1P[0], data, run.coordinates.to_RI)
    polished = found.loss <= rough and _polishable(run, weights)
    if polished:
        weights = _polish(run, weights, data)
    verified, reason = _verify(run, weights, floor if polished else rough, found.loss)
    run.say("size", sum(found.net.sizes[1:-1]))
    linkage = found.linkage if isinstance(found, Peeled) else [found.linkage]
    return Recovery(weights, run.activation.name, verified, reason, linkage, metrics)


def _polishable(run: _Run, weights: Weights) -> bool:
    unknowns = sum(w.numel() + b.numel() for w, b in weights)
    return run.coordinates.rank < run.box.inputs and unknowns <= run.config.solver.polish_parameters


def _polish(run: _Run, weights: Weights, data: Probed) -> Weights:
    """The last digits, in all inputs at once: frees the first layer from the relevant directions' own rounding."""
    net = DenseNet((run.box.inputs, *(len(b) for _, b in weights)), run.activation)
    started = time.monotonic()
    rows = data.rows(rows_needed(net, run.config.solver.rows))
    before = from_weights(weights, data)
    solution = fit(net, before, rows.x_QI, rows.y_QO, run.config.solver.iterations, deadline=run.deadline)
    run.timed("polish", started)
    return to_weights(net, solution.theta_NP[0], data, None)


def _verify(run: _Run, weights: Weights, floor: float, train_loss: float) -> tuple[bool, str]:
    """Fresh queries at two scales must agree to the floor, and every neuron must be needed."""
    started = time.monotonic()
    x_QI = run.coordinates.draw(run.config.probes.fresh, run.generator)
    if run.data_QI is not None:
        x_QI = torch.cat([x_QI, run.data_QI[: run.config.probes.fresh]])
    answers_QO = run.box(x_QI)
    recovered = Recovery(weights, run.activation.name, False, "")
    error = relative_rmse(answers_QO, recovered(x_QI))
    allowed = NOISE_MARGIN * math.sqrt(floor)
    run.timed("queries", started)
    if not error <= allowed:
        if train_loss > floor:
            left = f"{math.sqrt(train_loss):.1e} (floor {math.sqrt(floor):.1e})"
            return False, f"the best fit leaves a relative error of {left}"
        return False, f"fresh queries differ by {error:.1e} (relative RMSE; allowed {allowed:.1e})"
    needed = _least_needed(run.activation, weights, x_QI)
    if needed <= 100 * floor:
        return False, f"a neuron can be dropped without leaving the floor (cost {needed:.1e})"
    return True, f"{len(x_QI)} fresh queries agree to {error:.1e} (relative RMSE) and every neuron is needed"


def _least_needed(activation: Activation, weights: Weights, x_QI: Tensor) -> float:
    """Smallest relative cost, to the next layer's pre-activations, of dropping any hidden neuron."""
    least, hidden_QH = math.inf, x_QI
    for (w, b), (w_next, b_next) in itertools.pairwise(weights):
        design_QF = features(torch.cat([w, b[:, None]], dim=1), hidden_QH, activation, False)
        next_QH = design_QF @ torch.cat([w_next, b_next[:, None]], dim=1).T
        coefficients_FH, _ = solve_outgoing(design_QF, next_QH)
        least = min(least, float((drop_costs(design_QF, coefficients_FH, len(b)) / next_QH.var()).min()))
        hidden_QH = design_QF[:, :-1]
    return least


def _finish(run: _Run, recovery: Recovery) -> Recovery:
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
