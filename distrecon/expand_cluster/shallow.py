"""One hidden layer: clusters of students' neurons -> an exact, irreducible network.

Legend: N students, Q queries, R relevant input directions, H hidden, K = R + 1, O outputs, P parameters.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.expand_cluster.clustering import LayerClustering, cluster
from distrecon.expand_cluster.collapse import (
    choose_flips,
    drop_costs,
    features,
    flip_constant,
    pursue,
    solve_outgoing,
)
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.fitting import Probed, fit, rows_needed
from distrecon.expand_cluster.networks import DenseNet
from distrecon.nets.activations import Activation

LEAST_CONTRIBUTION = 1e-5  # of a neuron to the standardised outputs
FALLBACK_GAMMAS = (0.5, 0.3)
NEARLY_EXACT = 1e-12  # a fit worse than this (relative) misses a neuron
PROMISING = 1e-10  # a fit below this that still falls when its iterations are over is continued
CONTINUED = 4  # times at most
FREE_DROP = 1e-8  # neurons whose loss costs less than this (relative) are candidates for elimination


def takes_skip(activation: Activation) -> bool:
    """Whether a sign flip leaves a linear term, so that students need a linear path round the layer."""
    return activation.symmetry in ("even_linear", "scaled")


@dataclass(frozen=True)
class Pool:
    """The neurons of a group of students that contribute to the outputs: vectors[V, K] and where each comes from."""

    vectors_VK: Tensor
    students: np.ndarray
    neurons: np.ndarray
    loss_N: Tensor

    @property
    def count(self) -> int:
        """Number of students N."""
        return len(self.loss_N)


def neuron_pool(net: DenseNet, theta_NP: Tensor, z_QR: Tensor, y_QO: Tensor) -> Pool:
    """First-layer neurons [w, b] of all finite students whose contribution |a| std(h) exceeds the fit's own error.

    The threshold is max(1e-5, 3 sqrt(loss)) of the standardised outputs; students that are not finite are left out
    here and reported in the metrics.
    """
    matrices = net.matrices(theta_NP)
    hidden_NQH = net.activation(net.trace(theta_NP, z_QR)[1][0])
    loss_N = net.loss(theta_NP, z_QR, y_QO)
    outgoing_NH = matrices[1][..., : net.sizes[1]].norm(dim=1)
    contribution_NH = outgoing_NH * hidden_NQH.std(1)
    threshold_N = (3 * loss_N.sqrt()).clamp(min=LEAST_CONTRIBUTION)
    students, neurons = (contribution_NH > threshold_N[:, None]).nonzero().T
    return Pool(matrices[0][students, neurons], students.numpy(), neurons.numpy(), loss_N)


def representatives(found: LayerClustering, pool: Pool) -> Tensor:
    """One neuron for every cluster, its member in the student of the lowest loss, [H, K]."""
    chosen = [group[np.argmin(pool.loss_N.numpy()[found.students[group]])] for group in found.clusters]
    return found.vectors_VK[chosen]


@dataclass(frozen=True)
class Collapsed:
    """A network without skip in the relevant coordinates and its relative loss on the training queries."""

    net: DenseNet
    theta_1P: Tensor
    loss: float
    linkage: LayerClustering


def collapse(
    pool: Pool, data: Probed, activation: Activation, config: RecoveryConfig, floor: float, deadline: float | None
) -> Collapsed | None:
    """The best exact fit over gamma and its fallbacks; the best inexact one if none reaches the floor.

    None when no student has two neurons that contribute.
    """
    if len(pool.vectors_VK) < 2:
        return None
    settings = config.clustering
    best: Collapsed | None = None
    previous: list[tuple[int, ...]] = []
    for gamma in (settings.gamma, *(g for g in FALLBACK_GAMMAS if g < settings.gamma)):
        found = cluster(
            pool.vectors_VK,
            pool.students,
            pool.neurons,
            activation.symmetry,
            pool.count,
            gamma,
            settings.beta,
            settings.rule,
        )
        key = [tuple(group) for group in found.clusters]
        if best is not None and key == previous:
            continue  # a lower share that finds the same clusters fits no better
        previous = key
        own_HK = pool.vectors_VK[torch.from_numpy(pool.students == int(pool.loss_N.argmin()))]
        target = max(4 * float(pool.loss_N.min()), floor)
        chosen_HK = representatives(found, pool)
        result = exact_network(chosen_HK, own_HK, target, data, activation, config, floor, deadline, found)
        if best is None or result.loss < best.loss:
            best = result
        if best.loss <= floor or (deadline is not None and time.monotonic() > deadline):
            break
    return best


def exact_network(
    neurons_HK: Tensor,
    own_HK: Tensor,
    target: float,
    data: Probed,
    activation: Activation,
    config: RecoveryConfig,
    floor: float,
    deadline: float | None,
    found: LayerClustering,
) -> Collapsed:
    """Clustered neurons, fitted to the floor, then reduced to an irreducible network.

    Where the clusters are not enough, they are completed by neurons of the best student (`own_HK`) until the mean
    squared error is at most `target`.
    """
    skip = takes_skip(activation)
    alone_HK, loss = _refit(neurons_HK, data, activation, skip, config, deadline)
    if loss > max(floor, NEARLY_EXACT):  # the clusters alone are not enough
        neurons_HK = pursue(neurons_HK, own_HK, data.z_QR, data.y_QO, activation, skip, target)
        neurons_HK, loss = _refit(neurons_HK, data, activation, skip, config, deadline)
    else:
        neurons_HK = alone_HK
    if skip:
        neurons_HK = _eliminate(neurons_HK, loss, data, activation, True, config, floor, deadline)[0]
        neurons_HK = _unflip(neurons_HK, data, activation)
        neurons_HK, loss = _refit(neurons_HK, data, activation, False, config, deadline)
    neurons_HK, loss = _eliminate(neurons_HK, loss, data, activation, False, config, floor, deadline)
    net = DenseNet((data.z_QR.shape[1], len(neurons_HK), data.y_QO.shape[1]), activation)
    theta_1P = _pack(neurons_HK, data, activation, False)
    loss = float(net.loss(theta_1P, data.z_QR, data.y_QO)[0])
    return Collapsed(net, theta_1P, loss, found)


def _pack(neurons_HK: Tensor, data: Probed, activation: Activation, skip: bool) -> Tensor:
    coefficients_FO, _ = solve_outgoing(features(neurons_HK, data.z_QR, activation, skip), data.y_QO)
    return DenseNet.flatten([neurons_HK[None], coefficients_FO.T[None]])


def _refit(
    neurons_HK: Tensor,
    data: Probed,
    activation: Activation,
    skip: bool,
    config: RecoveryConfig,
    deadline: float | None,
) -> tuple[Tensor, float]:
    """All weights by Levenberg-Marquardt from the neurons and their least-squares outgoing weights."""
    net = DenseNet((data.z_QR.shape[1], len(neurons_HK), data.y_QO.shape[1]), activation, skip)
    rows = data.rows(rows_needed(net, config.solver.rows))
    theta_1P, loss = _pack(neurons_HK, rows, activation, skip), math.inf
    for _ in range(CONTINUED):
        solution = fit(net, theta_1P, rows.z_QR, rows.y_QO, config.solver.iterations, deadline=deadline)
        theta_1P, before, loss = solution.theta_NP, loss, float(solution.loss_N[0])
        if solution.status != ["iterations"] or not config.solver.floor < loss < min(PROMISING, 0.1 * before):
            break
    return net.matrices(theta_1P)[0][0], loss


def _eliminate(
    neurons_HK: Tensor,
    loss: float,
    data: Probed,
    activation: Activation,
    skip: bool,
    config: RecoveryConfig,
    floor: float,
    deadline: float | None,
) -> tuple[Tensor, float]:
    """Drop neurons, the cheapest first, as long as the fit stays exact (or, if it nearly is, as good after a refit).

    Redundant neurons keep a fit from converging, so it often becomes exact on the way. A fit far from exact misses
    something: dropping is of no use then.
    """
    while len(neurons_HK) > 1 and loss <= max(floor, NEARLY_EXACT):
        design_QF = features(neurons_HK, data.z_QR, activation, skip)
        coefficients_FO, _ = solve_outgoing(design_QF, data.y_QO)
        costs_H = drop_costs(design_QF, coefficients_FO, len(neurons_HK))
        cheapest = int(costs_H.argmin())
        if costs_H[cheapest] > FREE_DROP:
            break
        kept_HK = torch.cat([neurons_HK[:cheapest], neurons_HK[cheapest + 1 :]])
        if costs_H[cheapest] > floor or loss > floor:
            kept_HK, kept_loss = _refit(kept_HK, data, activation, skip, config, deadline)
            if kept_loss > max(floor, 2 * loss):
                break
            loss = kept_loss
        neurons_HK = kept_HK
    return neurons_HK, loss


def _unflip(neurons_HK: Tensor, data: Probed, activation: Activation) -> Tensor:
    """Turn round the neurons whose flips the linear skip stands for, so that no skip is needed."""
    hidden, inputs = len(neurons_HK), data.z_QR.shape[1]
    coefficients_FO, _ = solve_outgoing(features(neurons_HK, data.z_QR, activation, True), data.y_QO)
    outgoing_OH, linear_OR = coefficients_FO[:hidden].T, coefficients_FO[hidden : hidden + inputs].T
    flips_H = choose_flips(neurons_HK, outgoing_OH, linear_OR, flip_constant(activation))
    return torch.where(flips_H[:, None], -neurons_HK, neurons_HK)
