"""From students' channels to one exact network of no channel too many.

A missing channel is fatal and an extra one is not, so channels are taken generously before the exact fit and dropped
one by one after it, as neurons of dense networks are (see collapse.py).

Legend: Q queries, I inputs, O outputs, C channels, K numbers that a channel reads, F features, P parameters.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.expand_cluster.collapse import takes_skip
from distrecon.expand_cluster.convolution.channels import drop_costs, read_by_next, rows_of, without
from distrecon.expand_cluster.convolution.network import ConvNet
from distrecon.expand_cluster.convolution.projection import Projected
from distrecon.expand_cluster.neurons import LayerClustering
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.signs import flip_constant
from distrecon.expand_cluster.thresholds import CONVERGED, FREE_DROP, KEEPS_FIT, NEARLY_EXACT

EQUATIONS = 3  # for every unknown of a fit
ENOUGH = 1e-4  # of the floor: where the fit of a relu network of several layers, whose steps cost more, stops
KINKED_STEPS = 15  # of the fit of a relu network of several layers


@dataclass(frozen=True)
class Fitted:
    """A network's hidden layers theta[P], its readout [O, F] and bias [O] for standardised answers, its relative loss
    on all of the problem's queries, and whether it has a linear path beside it."""

    net: ConvNet
    theta_P: Tensor
    readout_OF: Tensor
    bias_O: Tensor
    linear_OI: Tensor | None
    loss: float
    linkage: list[LayerClustering] = field(default_factory=list)


def needs_skip(net: ConvNet) -> bool:
    """Whether the sign of a channel is free but for a linear term, which then needs a path of its own.

    Behind other layers it has none, and max pooling tells a channel's sign.
    """
    (stage, *deeper) = net.hypothesis.stages
    return takes_skip(net.activation) and not deeper and (stage.pool == 1 or stage.average)


def projected(problem: Problem, net: ConvNet, skip: bool) -> Projected:
    """The fit of a network on as many of the problem's queries as it needs; they are in random order."""
    data = problem.data
    outputs, inputs = data.y_QO.shape[1], data.x_QI.shape[1] if skip else 0
    unknowns = net.num_features + inputs + 1 + math.ceil(net.num_parameters / outputs)
    rows = EQUATIONS * unknowns
    if net.activation.symmetry == "scaled":  # units that seldom respond show in some of many queries
        rows = max(rows, problem.config.solver.rows)
    return Projected(net, data.x_QI[:rows], data.y_QO[:rows], skip)


def fit(problem: Problem, net: ConvNet, theta_P: Tensor, skip: bool, tolerance: float = CONVERGED) -> Fitted:
    """All weights from theta, by variable projection."""
    target = projected(problem, net, skip)
    steps = problem.config.solver.iterations
    if net.activation.symmetry == "scaled" and len(net.widths) > 1:  # from where kinks put it, or not at all
        steps, tolerance = min(steps, KINKED_STEPS), max(tolerance, ENOUGH * problem.floor)
    theta_P = target.fit(theta_P, steps, tolerance, problem.deadline).theta_NP[0]
    return solved(problem, net, theta_P, skip)


def solved(problem: Problem, net: ConvNet, theta_P: Tensor, skip: bool) -> Fitted:
    """The hidden layers as they are, with the readout that fits best; the loss is that of all queries."""
    target, data = projected(problem, net, skip), problem.data
    coefficients_FO = target.readout(theta_P).coefficients_FO
    features_QF, count = net.features(theta_P, data.x_QI), net.num_features
    everywhere = replace(target, x_QI=data.x_QI, y_QO=data.y_QO)
    loss = float((everywhere.design(features_QF) @ coefficients_FO - data.y_QO).square().mean())
    linear_OI = coefficients_FO[count:-1].T if skip else None
    return Fitted(net, theta_P, coefficients_FO[:count].T, coefficients_FO[-1], linear_OI, loss)


def exact_network(problem: Problem, net: ConvNet, theta_P: Tensor) -> Fitted:
    """Fitted, freed of channels that are not needed, and turned round where that leaves no linear path."""
    skip = needs_skip(net)
    found = eliminated(problem, fit(problem, net, theta_P, skip))
    if skip and found.loss <= max(problem.floor, NEARLY_EXACT):
        turned_P = _turned(found)
        found = eliminated(problem, fit(problem, found.net, turned_P, False))
    elif skip:
        found = solved(problem, found.net, found.theta_P, False)
    return found


def eliminated(problem: Problem, found: Fitted) -> Fitted:
    """Drops channels, the cheapest first, as long as the fit stays exact, or as good as it was.

    A fit far from exact misses something: dropping is of no use then.
    """
    limit = max(FREE_DROP, math.sqrt(problem.floor))
    while found.loss <= max(problem.floor, NEARLY_EXACT):
        layer, channel, cost = cheapest(problem, found)
        if cost > limit:
            break
        net, theta_P = without(found.net, found.theta_P, layer, channel)
        fewer = fit(problem, net, theta_P, found.linear_OI is not None)
        if fewer.loss > max(problem.floor, KEEPS_FIT * found.loss):
            break
        found = fewer
    return found


def cheapest(problem: Problem, found: Fitted) -> tuple[int, int, float]:
    """Layer, number and cost of the channel that is needed least, of layers that have others."""
    best = (0, 0, math.inf)
    for layer, width in enumerate(found.net.widths):
        if width > 1:
            costs_C = channel_costs(problem, found, layer)
            channel = int(costs_C.argmin())
            best = min(best, (layer, channel, float(costs_C[channel])), key=lambda entry: entry[2])
    return best


def channel_costs(problem: Problem, found: Fitted, layer: int) -> Tensor:
    """What dropping each channel of a hidden layer costs the next layer's standardised pre-activations, [C]."""
    net, target = found.net, projected(problem, found.net, found.linear_OI is not None)
    passed = net.trace(found.theta_P, target.x_QI)
    read_NK = read_by_next(net, passed, layer)
    width, each = net.widths[layer], read_NK.shape[1] // net.widths[layer]
    if layer + 1 == len(net.widths):
        coefficients_KO = target.readout(found.theta_P).coefficients_FO
        return drop_costs(target.design(read_NK), coefficients_KO, width, each)
    matrix = net.matrices(found.theta_P)[layer + 1]
    spread_C = rows_of(passed[layer + 1].before_QCL).std(0).clamp(min=1e-300)
    design_NK = torch.cat([read_NK, read_NK.new_ones(len(read_NK), 1)], dim=1)
    return drop_costs(design_NK, (matrix / spread_C[:, None]).T, width, each)


def _turned(found: Fitted) -> Tensor:
    """theta with those channels turned round that explain the linear path.

    With f(u) - f(-u) = kappa u, turning the channels of a set S round leaves -kappa sum_S readout(u): as many equations
    as outputs times inputs for a few signs, so least squares and rounding find the set.
    """
    net, (stage, *_) = found.net, found.net.hypothesis.stages
    (matrix,) = net.matrices(found.theta_P)
    assert found.linear_OI is not None
    inputs = found.linear_OI.shape[1]
    images = torch.eye(inputs, dtype=torch.float64).unflatten(1, net.hypothesis.input_shape)
    read_IKL = F.unfold(images, stage.kernel, padding=stage.padding, stride=stage.stride)
    linear = torch.matmul(matrix[:, :-1], read_IKL).unflatten(2, stage.before)
    linear_ICM = (F.avg_pool2d(linear, stage.pool) if stage.pool > 1 else linear).flatten(2)
    readout_OCM = found.readout_OF.unflatten(1, (net.widths[-1], -1))
    terms_CE = -flip_constant(net.activation) * torch.einsum("icm,ocm->coi", linear_ICM, readout_OCM).flatten(1)
    shares_C = torch.linalg.lstsq(terms_CE.T, found.linear_OI.flatten()[:, None], driver="gelsd").solution[:, 0]
    return net.flatten([torch.where(shares_C[:, None] > 0.5, -matrix, matrix)])
