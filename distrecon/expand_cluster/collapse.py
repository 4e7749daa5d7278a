"""One hidden layer: clusters of students' neurons -> an exact, irreducible network.

A missing neuron is fatal and an extra one is not, so neurons are added generously before the exact fit and dropped one
by one after it.

Legend: Q queries, R relevant input directions, H hidden, K = R + 1, O outputs, P parameters.
"""

import dataclasses
import math

import torch
from torch import Tensor

from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import LayerClustering, Pool, cluster, representatives
from distrecon.expand_cluster.outgoing import drop_costs, features, pursue, solve_outgoing
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.signs import Flips, carried_term, carriers, choose_flips, flip_constant, open_signs
from distrecon.expand_cluster.thresholds import (
    FREE_DROP,
    KEEPS_FIT,
    LINEAR_SHARES,
    NEARLY_EXACT,
    PROMISING,
    STILL_FALLS,
)
from distrecon.nets.activations import Activation

FALLBACK_GAMMAS = (0.5, 0.3)  # shares of the students that are tried when the settings' fails
CONTINUED = 4  # fits in a row, at most, of one that still falls
BEST_STUDENT = 4.0  # x its mean squared error: what the completed clusters are to reach


def takes_skip(activation: Activation) -> bool:
    """Whether a sign flip leaves a linear term, so that students need a linear path round the layer."""
    return activation.symmetry in ("even_linear", "scaled")


def collapse(problem: Problem, pool: Pool) -> Found | None:
    """The best exact fit over gamma and its fallbacks; the best inexact one if none reaches the floor.

    None when no student has two neurons that contribute.
    """
    if len(pool.vectors_VK) < 2:
        return None
    settings = problem.config.clustering
    best: Found | None = None
    previous: list[tuple[int, ...]] = []
    for gamma in (settings.gamma, *(g for g in FALLBACK_GAMMAS if g < settings.gamma)):
        clustering = cluster(pool, problem.activation.symmetry, dataclasses.replace(settings, gamma=gamma))
        clusters = [tuple(group) for group in clustering.clusters]
        if best is not None and clusters == previous:
            continue  # a lower share that finds the same clusters fits no better
        previous = clusters
        target = max(BEST_STUDENT * float(pool.loss_N.min()), problem.floor)
        found = exact_network(problem, representatives(clustering, pool), pool.of_best(), target, clustering)
        if best is None or found.loss < best.loss:
            best = found
        if best.loss <= problem.floor or problem.out_of_time():
            break
    return best


def exact_network(
    problem: Problem,
    neurons_HK: Tensor,
    candidates_HK: Tensor,
    target: float,
    clustering: LayerClustering | None = None,
    carry: bool = True,
) -> Found:
    """Clustered neurons, fitted to the floor, then reduced to an irreducible network.

    Where the clusters are not enough, they are completed by candidates (neurons of the best student) until the mean
    squared error is at most `target`. What no signs explain of a linear skip is carried by further neurons, unless
    `carry` is off: it is of use where the neurons are all that there are.
    """
    data, activation, skip = problem.data, problem.activation, takes_skip(problem.activation)
    linkage = [clustering] if clustering is not None else []
    refitted_HK, loss = _refit(problem, neurons_HK, skip)
    if loss > max(problem.floor, NEARLY_EXACT):  # the clusters alone are not enough
        neurons_HK = pursue(neurons_HK, candidates_HK, data.z_QR, data.y_QO, activation, skip, target)
        neurons_HK, loss = _refit(problem, neurons_HK, skip)
    else:
        neurons_HK = refitted_HK
    objection = ""
    if skip:
        neurons_HK, loss = _eliminate(problem, neurons_HK, loss, True)
        neurons_HK, loss, objection = _without_skip(problem, neurons_HK, loss, carry)
    return _reduced(problem, neurons_HK, loss, linkage, objection)


def reduced(problem: Problem, neurons_HK: Tensor, fitted: bool = True) -> Found:
    """The neurons without a skip, freed of those that are not needed; not `fitted` where they are nearly exact."""
    theta_1P, data = _with_outgoing(problem, neurons_HK, False), problem.data
    loss = float(problem.net(len(neurons_HK)).loss(theta_1P, data.z_QR, data.y_QO)[0])
    if fitted or loss > NEARLY_EXACT:
        neurons_HK, loss = _refit(problem, neurons_HK, False)
    return _reduced(problem, neurons_HK, loss, [])


def _reduced(
    problem: Problem, neurons_HK: Tensor, loss: float, linkage: list[LayerClustering], objection: str = ""
) -> Found:
    data, (neurons_HK, loss) = problem.data, _eliminate(problem, neurons_HK, loss, False)
    net, theta_1P = problem.net(len(neurons_HK)), _with_outgoing(problem, neurons_HK, False)
    loss = float(net.loss(theta_1P, data.z_QR, data.y_QO)[0])
    return Found(net, theta_1P, loss, linkage, objection)


def _with_outgoing(problem: Problem, neurons_HK: Tensor, skip: bool, rows: int | None = None) -> Tensor:
    """theta[1, P] of the neurons and their least-squares outgoing weights, on the first `rows` queries (or all)."""
    z_QR, y_QO = problem.data.z_QR[:rows], problem.data.y_QO[:rows]
    coefficients_FO, _ = solve_outgoing(features(neurons_HK, z_QR, problem.activation, skip), y_QO)
    return DenseNet.flatten([neurons_HK[None], coefficients_FO.T[None]])


def _refit(problem: Problem, neurons_HK: Tensor, skip: bool) -> tuple[Tensor, float]:
    """All weights by Levenberg-Marquardt from the neurons and their least-squares outgoing weights."""
    net = problem.net(len(neurons_HK), skip)
    theta_1P, loss = _with_outgoing(problem, neurons_HK, skip, problem.rows(net)), math.inf
    for _ in range(CONTINUED):
        solution = problem.fit(net, theta_1P)
        theta_1P, before, loss = solution.theta_NP, loss, float(solution.loss_N[0])
        falls = problem.config.solver.floor < loss < min(PROMISING, STILL_FALLS * before)
        if solution.status != ["iterations"] or not falls:
            break
    return net.matrices(theta_1P)[0][0], loss


def _eliminate(problem: Problem, neurons_HK: Tensor, loss: float, skip: bool) -> tuple[Tensor, float]:
    """Drop neurons, the cheapest first, as long as the fit stays exact (or, if it nearly is, as good after a refit).

    Redundant neurons keep a fit from converging, so it often becomes exact on the way. A fit far from exact misses
    something: dropping is of no use then.
    """
    data, floor = problem.data, problem.floor
    while len(neurons_HK) > 1 and loss <= max(floor, NEARLY_EXACT):
        design_QF = features(neurons_HK, data.z_QR, problem.activation, skip)
        coefficients_FO, _ = solve_outgoing(design_QF, data.y_QO)
        costs_H = drop_costs(design_QF, coefficients_FO, len(neurons_HK))
        cheapest = int(costs_H.argmin())
        if costs_H[cheapest] > max(FREE_DROP, math.sqrt(floor)):  # the root: see FREE_DROP
            break
        kept_HK = torch.cat([neurons_HK[:cheapest], neurons_HK[cheapest + 1 :]])
        if costs_H[cheapest] > floor or loss > floor:
            kept_HK, kept_loss = _refit(problem, kept_HK, skip)
            if kept_loss > max(floor, KEEPS_FIT * loss):
                break
            loss = kept_loss
        neurons_HK = kept_HK
    return neurons_HK, loss


def _without_skip(problem: Problem, neurons_HK: Tensor, loss: float, carry: bool) -> tuple[Tensor, float, str]:
    """Neurons turned round, and fitted, so that no linear skip is left; the loss; what keeps them from being right.

    The fit decides how exactly the skip is known: signs that explain it to ever fewer digits are tried. Where an exact
    fit with the skip is left by all of them, neurons are added that carry what is left of it (with `carry`).
    """
    activation, data = problem.activation, problem.data
    hidden, inputs = len(neurons_HK), data.z_QR.shape[1]
    kappa = flip_constant(activation)
    coefficients_FO, _ = solve_outgoing(features(neurons_HK, data.z_QR, activation, True), data.y_QO)
    outgoing_OH, linear_OR = coefficients_FO[:hidden].T, coefficients_FO[hidden : hidden + inputs].T
    size = float((outgoing_OH.norm(dim=0) * neurons_HK[:, :-1].norm(dim=1)).norm())
    allowed = max(problem.floor, KEEPS_FIT * loss)
    for share in LINEAR_SHARES:
        flips = choose_flips(neurons_HK, outgoing_OH, linear_OR, kappa, share * size)
        if not flips.rest_OR.any():
            refitted_HK, refitted_loss = _refit(problem, _turned(neurons_HK, flips), False)
            if refitted_loss <= allowed:
                return refitted_HK, refitted_loss, "" if flips.determined else open_signs(hidden)
    nearest = choose_flips(neurons_HK, outgoing_OH, linear_OR, kappa, LINEAR_SHARES[0] * size)
    turned_HK = _turned(neurons_HK, nearest)
    refitted_HK, refitted_loss = _refit(problem, turned_HK, False)
    if not carry or refitted_loss <= allowed or loss > max(problem.floor, NEARLY_EXACT):
        return refitted_HK, refitted_loss, ""
    extra_DK, _ = carriers(nearest.rest_OR, kappa, LINEAR_SHARES[0] * size)
    neurons_HK, loss = _refit(problem, torch.cat([turned_HK, extra_DK]), False)
    return neurons_HK, loss, carried_term(hidden, len(extra_DK))


def _turned(neurons_HK: Tensor, flips: Flips) -> Tensor:
    return torch.where(flips.flips_H[:, None], -neurons_HK, neurons_HK)
