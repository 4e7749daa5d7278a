"""The verdict on a collapsed network: its last digits, fresh queries that must agree, neurons that must be needed.

Legend: Q queries, I inputs, R relevant input directions, H hidden, O outputs.
"""

import itertools
import math
import time
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster.collapse import drop_costs, features, solve_outgoing
from distrecon.expand_cluster.deep import Peeled
from distrecon.expand_cluster.fitting import Probed, fit, from_weights, rows_needed, to_weights
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.result import Recovery, relative_rmse
from distrecon.expand_cluster.run import NOISE_MARGIN, Run
from distrecon.expand_cluster.shallow import Collapsed
from distrecon.expand_cluster.teachers import Weights
from distrecon.nets.activations import Activation

VANISHING = 1e-12  # share of a Gram matrix's largest eigenvalue that counts as zero
DETERMINING = 5000  # training queries that are asked, besides the fresh ones, whether they determine all weights
FRESH_SCALES = (1.0, 3.0, 10.0, 30.0)  # of the queries that verify a result, in turn


def conclude(run: Run, found: Collapsed | Peeled | None, data: Probed, metrics: dict[str, Any]) -> Recovery:
    """Polish and verify what a stage found; None: nothing, which is unverified."""
    if found is None:
        nothing = DenseNet((run.coordinates.rank, *[1] * run.hidden_layers, run.box.outputs), run.activation)
        theta_P = torch.zeros(nothing.num_parameters, dtype=torch.float64)
        weights = to_weights(nothing, theta_P, data, run.coordinates.to_RI)
        metrics = {**metrics, "recover/train_loss": 1.0}
        return Recovery(weights, run.activation.name, False, "no student has neurons that contribute", [], metrics)
    floor, rough = run.floors(data)
    weights = to_weights(found.net, found.theta_1P[0], data, run.coordinates.to_RI)
    polished = found.loss <= rough and _polishable(run, weights)
    if polished:
        weights = _polish(run, weights, data)
    verified, reason = _verify(run, weights, floor if polished else rough, found.loss, data)
    run.say("size", sum(found.net.sizes[1:-1]))
    linkage = found.linkage if isinstance(found, Peeled) else [found.linkage]
    metrics = {**metrics, "recover/train_loss": found.loss}
    return Recovery(weights, run.activation.name, verified, reason, linkage, metrics)


def _polishable(run: Run, weights: Weights) -> bool:
    unknowns = sum(w.numel() + b.numel() for w, b in weights)
    return run.coordinates.rank < run.box.inputs and unknowns <= run.config.solver.polish_parameters


def _polish(run: Run, weights: Weights, data: Probed) -> Weights:
    """The last digits, in all inputs at once: frees the first layer from the relevant directions' own rounding."""
    net = DenseNet((run.box.inputs, *(len(b) for _, b in weights)), run.activation)
    started = time.monotonic()
    rows = data.rows(rows_needed(net, run.config.solver.rows))
    before = from_weights(weights, data)
    solution = fit(net, before, rows.x_QI, rows.y_QO, run.config.solver.iterations, deadline=run.deadline)
    run.timed("polish", started)
    return to_weights(net, solution.theta_NP[0], data, None)


def _verify(run: Run, weights: Weights, floor: float, train_loss: float, data: Probed) -> tuple[bool, str]:
    """Fresh queries, most of them farther out than the training ones, must agree, and every neuron must be needed."""
    started = time.monotonic()
    x_QI = run.draw(run.config.probes.fresh, FRESH_SCALES)
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
    straight = _never_bent(run.activation, weights, x_QI)
    if straight:
        return False, f"{straight} neurons are on one side of their kink at all queries, which do not determine them"
    asked_QI = torch.cat([x_QI, data.x_QI[:DETERMINING]])
    loose = _undetermined(run.activation, weights, asked_QI, asked_QI @ run.coordinates.to_RI.T)
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
