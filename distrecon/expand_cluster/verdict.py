"""The verdict on a network that was found, after its last digits were polished. Verified means, on fresh queries:

1. the answers agree to the numerical floor (relative RMSE); most of these queries lie farther out than the training
   ones, and the user's data are among them;
2. no hidden neuron can be dropped;
3. no neuron of a piecewise linear network is on one side of its kink at all of them;
4. every weight shows in some answer: neurons respond to each of their inputs (training queries count here, too).

Legend: Q queries, I inputs, R relevant input directions, H hidden, O outputs.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.outgoing import drop_costs, features, solve_outgoing
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.result import Recovery, relative_rmse
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import AGREEMENT, NEEDED, VANISHING
from distrecon.expand_cluster.weights import Weights, from_theta, to_theta
from distrecon.nets.activations import Activation

DETERMINING = 5000  # training queries that are asked, besides the fresh ones, whether they determine all weights
FRESH_SCALES = (1.0, 3.0, 10.0, 30.0)  # of the queries that verify a result, in turn


def conclude(run: Run, problem: Problem, found: Found | None, metrics: dict[str, Any]) -> Recovery:
    """Polish and verify what was found for a problem; None: nothing, which is unverified."""
    data, coordinates = problem.data, problem.probes.coordinates
    if found is None:
        nothing = DenseNet((coordinates.rank, *[1] * run.hidden_layers, run.box.outputs), run.activation)
        theta_P = torch.zeros(nothing.num_parameters, dtype=torch.float64)
        weights = from_theta(nothing, theta_P, data.mean_O, data.scale, coordinates.to_RI)
        metrics = {**metrics, "recover/train_loss": 1.0}
        return Recovery(weights, run.activation.name, False, "no student has neurons that contribute", [], metrics)
    weights = from_theta(found.net, found.theta_1P[0], data.mean_O, data.scale, coordinates.to_RI)
    polished = found.loss <= problem.floor and _polishable(run, problem, weights)
    if polished:
        with run.timed("polish"):
            weights = _polish(run, problem, weights)
    floor = problem.polished_floor if polished else problem.floor
    verified, reason = _verify(run, problem, weights, floor, found.loss)
    run.progress("size", sum(found.net.sizes[1:-1]))
    metrics = {**metrics, "recover/train_loss": found.loss}
    reason = f"{reason}; {found.note}" if found.note else reason
    return Recovery(weights, run.activation.name, verified, reason, found.linkage, metrics)


def _polishable(run: Run, problem: Problem, weights: Weights) -> bool:
    unknowns = sum(w.numel() + b.numel() for w, b in weights)
    return problem.probes.coordinates.rank < run.box.inputs and unknowns <= run.config.solver.polish_parameters


def _polish(run: Run, problem: Problem, weights: Weights) -> Weights:
    """The last digits, in all inputs at once: frees the first layer from the relevant directions' own rounding."""
    net, data = DenseNet((run.box.inputs, *(len(b) for _, b in weights)), run.activation), problem.data
    solution = problem.fit(net, to_theta(weights, data.mean_O, data.scale), data.x_QI)
    return from_theta(net, solution.theta_NP[0], data.mean_O, data.scale)


def _verify(run: Run, problem: Problem, weights: Weights, floor: float, train_loss: float) -> tuple[bool, str]:
    """Whether all of the rule holds, and what was measured or which part fails."""
    activation, probes = run.activation, problem.probes
    with run.timed("queries"):
        x_QI = probes.draw(run.config.probes.fresh, run.generator, FRESH_SCALES)
        if run.data_QI is not None:
            x_QI = torch.cat([x_QI, run.data_QI[: run.config.probes.fresh]])
        answers_QO = run.box(x_QI)
        error = relative_rmse(answers_QO, Recovery(weights, activation.name, False, "")(x_QI))
    allowed = AGREEMENT * math.sqrt(floor)
    if not error <= allowed:
        if train_loss > floor:
            left = f"{math.sqrt(train_loss):.1e} (floor {math.sqrt(floor):.1e})"
            return False, f"the best fit leaves a relative error of {left}"
        return False, f"fresh queries differ by {error:.1e} (relative RMSE; allowed {allowed:.1e})"
    needed = _least_needed(activation, weights, x_QI)
    if needed <= NEEDED * floor:
        return False, f"a neuron can be dropped without leaving the floor (cost {needed:.1e})"
    straight = _never_bent(activation, weights, x_QI)
    if straight:
        return False, f"{straight} neurons are on one side of their kink at all queries, which do not determine them"
    asked_QI = torch.cat([x_QI, problem.data.x_QI[:DETERMINING]])
    loose = _undetermined(activation, weights, asked_QI, asked_QI @ probes.coordinates.to_RI.T)
    if loose:
        return False, f"{loose} neurons respond to an input at none of the queries, which do not determine its weight"
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
