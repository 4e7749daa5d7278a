"""Recovery of smooth networks of one hidden layer from derivatives of the black box, without students.

Derivatives at many points are sums of rank-one matrices, one for each neuron (derivatives.py). Their number is the
rank of the sample, and the matrices themselves are the only ones of rank one in its span (rank_one.py). So the
directions of all incoming weights are found at once, also of more neurons than inputs; the size of the terms along each
direction gives a neuron's slope and bias (profiles.py), least squares its outgoing weights, and the fit that follows
starts near rounding. Where derivatives are too noisy or neurons too many, students follow.

Legend: S points, R relevant input directions, O outputs, A rows of a derivative's matrix [A, R], H hidden, K = R + 1
coordinates of a neuron, D directions.
"""

import math

import torch
from torch import Tensor

from distrecon.expand_cluster.collapse import exact_network, reduced, takes_skip
from distrecon.expand_cluster.coordinates import Coordinates, numerical_rank
from distrecon.expand_cluster.derivatives import Derivatives, unfolded
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.profiles import fit_profile
from distrecon.expand_cluster.rank_one import rank_one_terms, span
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import RESPONDS
from distrecon.expand_cluster.verdict import conclude, polishable
from distrecon.nets.activations import Activation

FIRST_POINTS = 48  # beside one for each relevant direction; then twice as many, until the rank shows
ROUNDS = 4
DIRECTIONS = 8  # along which Jacobians are differentiated; all axes, where these are not many more
MOST_QUERIES = 1_000_000  # for third derivatives at a round's points; those of more than some 16 directions take more
TOO_NOISY = 1e-10  # relative noise: third derivatives then have errors of 1e-6 and more, which hide weak terms
RESERVED = 0.5  # share of the query budget that is left to probes, verification and students


def recover_from_derivatives(run: Run, coordinates: Coordinates) -> Recovery | None:
    """The network that first derivatives show, or else second or third ones; None where they show none."""
    if run.hidden_layers > 1 or run.activation.symmetry == "scaled":
        return None
    best: Recovery | None = None
    for order in (1, 2, 3):
        with run.timed("derivatives"):
            neurons_HK = neurons(run, coordinates, order)
        if neurons_HK is None or run.out_of_time():
            continue
        outgoing = run.box.outputs * (len(neurons_HK) + 1)
        weights = len(neurons_HK) * (run.box.inputs + 1) + outgoing
        polished = polishable(run, coordinates, weights)
        problem = run.problem(Probes(coordinates), weights if polished else neurons_HK.numel() + outgoing)
        with run.timed("collapse"):
            if order > 1 and takes_skip(run.activation):  # its second derivative is even: signs are open
                found = exact_network(problem, neurons_HK, neurons_HK[:0], problem.floor)
            else:
                found = reduced(problem, neurons_HK, fitted=not polished)
        recovery = conclude(run, problem, found, {"recover/students": 0})
        if recovery.verified:
            return recovery
        if best is None or found.loss < best.metrics["recover/train_loss"]:
            best = recovery
    return best


def neurons(run: Run, coordinates: Coordinates, order: int) -> Tensor | None:
    """[w, b] of all neurons [H, K] from derivatives of an order; None where these do not show them.

    The rank of the sample does not show where derivatives are too noisy.
    """
    sampled = _sampled(run, coordinates, order)
    if sampled is None:
        return None
    z_SR, samples_SAR, hidden = sampled
    return from_samples(z_SR, samples_SAR, hidden, run.activation, order, run.generator)


def from_samples(
    z_SR: Tensor, samples_SAR: Tensor, hidden: int, activation: Activation, order: int, generator: torch.Generator
) -> Tensor | None:
    """[w, b] of `hidden` neurons [H, K] from derivatives of an order at points z; None where they do not show them.

    Of more than (A - 1)(R - 1) neurons the terms are not the only rank-one matrices of their span.
    """
    if hidden > (samples_SAR.shape[1] - 1) * (z_SR.shape[1] - 1):
        return None
    left_HA, right_HR = rank_one_terms(span(samples_SAR, hidden), generator)
    if len(right_HR) < hidden:
        return None
    terms_FH = (left_HA[:, :, None] * right_HR[:, None, :]).flatten(1).T
    sizes_HS = torch.linalg.lstsq(terms_FH, samples_SAR.flatten(1).T).solution
    found = []
    for w_R, size_S in zip(right_HR, sizes_HS, strict=True):
        alpha, beta, loss = fit_profile(activation, order, z_SR @ w_R, size_S)
        if loss < RESPONDS:
            found.append(torch.cat([alpha * w_R, w_R.new_tensor([beta])]))
    return torch.stack(found) if found else None


def _sampled(run: Run, coordinates: Coordinates, order: int) -> tuple[Tensor, Tensor, int] | None:
    """Points z[S, R], derivatives [S, A, R] there and their rank, which is below S; None where no number of points is
    enough.
    """
    rank, box, reserved = coordinates.rank, run.box, RESERVED * run.box.left()
    directions_DR = torch.eye(rank, dtype=torch.float64)
    if rank > 2 * DIRECTIONS:
        normal_RD = torch.randn(rank, DIRECTIONS, generator=run.generator, dtype=torch.float64)
        directions_DR = torch.linalg.qr(normal_RD)[0].T
    if rank < 2 or (box.outputs < 2 and order == 1):
        return None
    symmetric = order == 3 or (order == 2 and len(directions_DR) == rank)
    most = _most_symmetric(box.outputs, rank, order)
    z_SR, samples_SAR, entries_SF = torch.empty(0, rank).double(), None, None
    count = rank + FIRST_POINTS
    for _ in range(ROUNDS):
        here = Derivatives(box, coordinates, count - len(z_SR), run.generator)
        if order == 3 and here.noise > TOO_NOISY:
            return None
        cost = here.cost(order, len(directions_DR))
        if cost > box.left() - reserved or (order == 3 and cost > MOST_QUERIES):
            return None
        if order == 3:
            thirds_SOE = here.thirds(run.generator)
            new_SAR, new_SF = unfolded(thirds_SOE, rank), thirds_SOE.flatten(1)
        else:
            new_SAR = here.jacobians() if order == 1 else here.along(directions_DR)
            new_SF = _upper(new_SAR) if symmetric else new_SAR.flatten(1)
        z_SR = torch.cat([z_SR, here.z_SR])
        samples_SAR = new_SAR if samples_SAR is None else torch.cat([samples_SAR, new_SAR])
        entries_SF = new_SF if entries_SF is None else torch.cat([entries_SF, new_SF])
        found = numerical_rank(entries_SF)
        if symmetric and found > most:
            return None
        if found < min(entries_SF.shape):
            return z_SR, samples_SAR, found
        if found < count:
            return None
        count *= 2
    return None


def _upper(hessians_SAR: Tensor) -> Tensor:
    """The distinct entries [S, F] of every output's symmetric matrix [R, R], which A stacks: the others are the same to
    the last digit, so that noise would end in a gap, too.
    """
    rank = hessians_SAR.shape[2]
    row_F, column_F = torch.triu_indices(rank, rank)
    return hessians_SAR.unflatten(1, (-1, rank))[:, :, row_F, column_F].flatten(1)


def _most_symmetric(outputs: int, rank: int, order: int) -> int:
    """Terms c w w^T [O, R, R], or c w w w [O, R, R, R], up to which a space of them holds no others in general: as many
    as leave it no room to meet the variety of all such terms, of O + R - 1 dimensions.
    """
    return outputs * math.comb(rank + order - 1, order) - (outputs + rank - 1)
