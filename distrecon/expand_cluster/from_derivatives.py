"""Recovery of smooth networks of one hidden layer from derivatives of the black box, without students.

Derivatives at many points are sums of rank-one matrices, one for each neuron (derivatives.py). Their number is the
rank of the sample, and the matrices themselves are the only ones of rank one in its span (rank_one.py). So the
directions of all incoming weights are found at once, also of more neurons than inputs; the size of the terms along each
direction gives a neuron's slope and bias (profiles.py), least squares its outgoing weights, and the fit that follows
starts near rounding. Where derivatives are too noisy or neurons too many, students follow.

Legend: S points, R relevant input directions, O outputs, H hidden, K = R + 1 coordinates of a neuron, F = A R numbers
of a matrix [A, R].
"""

import torch
from torch import Tensor

from distrecon.expand_cluster.collapse import reduced
from distrecon.expand_cluster.coordinates import Coordinates, numerical_rank
from distrecon.expand_cluster.derivatives import Derivatives
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.profiles import fit_profile
from distrecon.expand_cluster.rank_one import rank_one_terms, span
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.verdict import conclude

LEAST_POINTS, MORE_POINTS = 48, 2  # at first, over the relevant directions; then times that
DIRECTIONS = 8  # along which Jacobians are differentiated
ROUNDS = 4


def recover_from_derivatives(run: Run, coordinates: Coordinates) -> Recovery | None:
    """The network that the black box's derivatives show, verified or not; None where they show none."""
    if run.hidden_layers > 1 or run.activation.symmetry == "scaled":
        return None
    for order in (1, 2):
        with run.timed("derivatives"):
            neurons_HK = neurons(run, coordinates, order)
        if neurons_HK is None:
            continue
        unknowns = neurons_HK.numel() + run.box.outputs * (len(neurons_HK) + 1)
        problem = run.problem(Probes(coordinates), unknowns)
        with run.timed("collapse"):
            found = reduced(problem, neurons_HK, [])
        recovery = conclude(run, problem, found, {"recover/students": 0})
        if recovery.verified:
            return recovery
    return None


def neurons(run: Run, coordinates: Coordinates, order: int) -> Tensor | None:
    """[w, b] of all neurons [H, K] from derivatives of an order; None where these are too noisy, or neurons too many."""
    rank, outputs, generator = coordinates.rank, run.box.outputs, run.generator
    directions_DR = torch.eye(rank, dtype=torch.float64)
    if rank > 2 * DIRECTIONS:
        directions_DR = torch.linalg.qr(torch.randn(rank, DIRECTIONS, generator=generator, dtype=torch.float64))[0].T
    factors = outputs * (1 if order == 1 else len(directions_DR))
    z_SR, samples_SAR = coordinates.back_IR.new_empty(0, rank), coordinates.back_IR.new_empty(0, factors, rank)
    count = rank + LEAST_POINTS
    for _ in range(ROUNDS):
        here = Derivatives(run.box, coordinates, count - len(z_SR), generator)
        matrices_SAR = here.jacobians() if order == 1 else here.along(directions_DR)
        z_SR, samples_SAR = torch.cat([z_SR, here.z_SR]), torch.cat([samples_SAR, matrices_SAR])
        hidden = numerical_rank(samples_SAR.flatten(1))
        if hidden < min(count, factors * rank):
            break
        if hidden < count:
            return None
        count *= MORE_POINTS
    else:
        return None
    if hidden > (factors - 1) * (rank - 1):
        return None
    left_HA, right_HR = rank_one_terms(span(samples_SAR, hidden), generator)
    if len(right_HR) < hidden:
        return None
    terms_HF = (left_HA[:, :, None] * right_HR[:, None, :]).flatten(1)
    sizes_SH = torch.linalg.lstsq(terms_HF.T, samples_SAR.flatten(1).T).solution.T
    fits = [
        fit_profile(run.activation, order, t_S, size_S)
        for t_S, size_S in zip((z_SR @ right_HR.T).T, sizes_SH.T, strict=True)
    ]
    alpha_H1, beta_H1, loss_H1 = torch.tensor(fits, dtype=torch.float64)[:, :, None].unbind(1)
    print("profiles", loss_H1.sort(0).values[:, 0])
    return torch.cat([alpha_H1 * right_HR, beta_H1], dim=1)
