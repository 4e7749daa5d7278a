"""What queries do not determine of a convolutional network that agrees with all answers (see verdict.py).

Legend: Q queries, I inputs, O outputs, C channels, K numbers that a channel reads, L positions, P parameters.
"""

import torch
from torch import Tensor

from distrecon.expand_cluster.convolution.channels import drop_costs, read_by_next, rows_of, without
from distrecon.expand_cluster.convolution.exact import Fitted, fit
from distrecon.expand_cluster.convolution.network import ConvNet, Passed
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.thresholds import NEEDED, VANISHING

DETERMINING = 3000  # training queries that are asked, besides the fresh ones, whether they determine all weights


def weakness(problem: Problem, found: Fitted, x_QI: Tensor, relative_O: Tensor) -> str:
    """The first thing that is not determined; "" if everything is.

    Each output may be off by the share `relative_O` of its deviation.
    """
    needed, layer, channel = _least_needed(found, x_QI, relative_O)
    if not needed > NEEDED:
        return f"a channel can be dropped: that costs {needed:.1e} times what a fit may leave (needed: {NEEDED:g})"
    if needed < 1 / float(relative_O.min()) and found.net.widths[layer] > 1:
        fewer = fit(problem, *without(found.net, found.theta_P, layer, channel), False)
        if fewer.loss <= problem.floor:
            return f"a channel can be dropped: the others of hidden layer {layer + 1}, fitted again, do without it"
    asked_QI = torch.cat([x_QI, problem.data.x_QI[:DETERMINING]])
    passed = found.net.trace(found.theta_P, asked_QI)
    if found.net.activation.symmetry == "scaled":
        straight = sum(int(_one_sided(here.before_QCL).sum()) for here in passed)
        if straight:
            return f"{straight} channels are on one side of their kink at all queries, which do not determine them"
    loose = sum(_undetermined(found.net, here) for here in passed)
    if loose:
        return f"{loose} channels respond to an input at none of the queries, which do not determine its weight"
    unread = _unread(passed[-1].after.flatten(1))
    if unread:
        return f"{unread} combinations of features are 0 at all queries, which do not determine the last layer"
    return ""


def _least_needed(found: Fitted, x_QI: Tensor, relative_O: Tensor) -> tuple[float, int, int]:
    """Smallest cost of dropping a channel, in units of what a fit may leave of the next pre-activations squared; its
    layer and number."""
    net, passed = found.net, found.net.trace(found.theta_P, x_QI)
    matrices, least = net.matrices(found.theta_P), (torch.inf, 0, 0)
    for layer, width in enumerate(net.widths):
        read_NK = read_by_next(net, passed, layer)
        design_NK = torch.cat([read_NK, read_NK.new_ones(len(read_NK), 1)], dim=1)
        last = layer + 1 == len(net.widths)
        matrix = torch.cat([found.readout_OF, found.bias_O[:, None]], dim=1) if last else matrices[layer + 1]
        spread_O = (design_NK @ matrix.T).std(0).clamp(min=1e-300)
        due_O = relative_O if last else relative_O.min()
        costs_C = drop_costs(design_NK, (matrix / (due_O * spread_O)[:, None]).T, width, read_NK.shape[1] // width)
        least = min(least, (float(costs_C.min()), layer, int(costs_C.argmin())))
    return least


def _one_sided(before_QCL: Tensor) -> Tensor:
    """[C]: whether a channel is on one side of its kink at all positions of all queries."""
    return (before_QCL > 0).all(2).all(0) | (before_QCL < 0).all(2).all(0)


def _undetermined(net: ConvNet, here: Passed) -> int:
    """Channels with a weight that could be another without changing any answer, to first order.

    What a channel reads, weighted by its response, has the rank that it has without.
    """
    read_NK, before_NC = rows_of(here.read_QKL), rows_of(here.before_QCL)
    design_NK = torch.cat([read_NK, read_NK.new_ones(len(read_NK), 1)], dim=1)
    design_NK = design_NK / design_NK.norm(dim=0).clamp(min=torch.finfo(design_NK.dtype).tiny)
    values_K = torch.linalg.eigvalsh(design_NK.T @ design_NK)
    least = values_K[values_K > VANISHING * values_K[-1]].min()
    rank, count = int((values_K >= least).sum()), 0
    for response_N in net.activation.derivative(before_NC).T:
        weighted_NK = response_N[:, None] * design_NK
        count += bool(torch.linalg.eigvalsh(weighted_NK.T @ weighted_NK)[-rank] <= VANISHING * least)
    return count


def _unread(features_QF: Tensor) -> int:
    """Dimensions of the features, and one, in which they do not vary."""
    design_QF = torch.cat([features_QF, features_QF.new_ones(len(features_QF), 1)], dim=1)
    design_QF = design_QF / design_QF.norm(dim=0).clamp(min=torch.finfo(design_QF.dtype).tiny)
    values_F = torch.linalg.eigvalsh(design_QF.T @ design_QF)
    return int((values_F <= VANISHING * values_F[-1]).sum())
