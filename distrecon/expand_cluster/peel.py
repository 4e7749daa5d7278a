"""Several hidden layers, peeled one by one: cluster the first, carry the students over to it, go on with the rest.

Students of the full depth give the first layer's neurons by clustering, as for one hidden layer. Those neurons then
become the shared inputs of narrower students of one layer less, whose first pre-activations are carried over by least
squares; and so on to the last hidden layer. The assembled network is fitted as a whole, neurons that cost nothing are
dropped, and the fit is repeated. Extra neurons are kept until then: a missing one is fatal, an extra one is not.

Legend: N students, Q queries, R relevant input directions, H hidden, O outputs, P parameters, K inputs of a layer + 1.
"""

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import LayerClustering, cluster, pool_neurons, representatives
from distrecon.expand_cluster.outgoing import drop_costs, pursue
from distrecon.expand_cluster.problem import Found, Problem
from distrecon.expand_cluster.thresholds import FREE_DROP, KEEPS_FIT, NEARLY_EXACT, PURSUED, STILL_FALLS, UNFINISHED

FIRST_STEPS, STEPS = 30, 15  # of the fit before neurons are dropped, and after each

TrainOn = Callable[[DenseNet, Tensor, Tensor, Tensor], Tensor]


def peel(problem: Problem, net: DenseNet, theta_NP: Tensor, train_on: TrainOn) -> Found | None:
    """Recover layer after layer from trained students of `net`; None when a layer has no clusters.

    `train_on(net, theta, inputs, targets)` goes on with the students of the layers that are left.
    """
    inputs_QR, y_QO, layers, linkage = problem.data.z_QR, problem.data.y_QO, [], []
    while True:
        found = _layer(problem, net, theta_NP, inputs_QR)
        if found is None:
            return None
        neurons_HK, clustering = found
        linkage.append(clustering)
        layers.append(neurons_HK[None])
        hidden_QH = problem.activation(inputs_QR @ neurons_HK[:, :-1].T + neurons_HK[:, -1])
        smaller = DenseNet((len(neurons_HK), *net.sizes[2:]), problem.activation)
        theta_NP = _carry_over(net, theta_NP, inputs_QR, hidden_QH)
        net, inputs_QR = smaller, hidden_QH
        if len(net.sizes) == 2:
            break
        theta_NP = train_on(net, theta_NP, inputs_QR, y_QO)
    best = int(net.loss(theta_NP, inputs_QR, y_QO).argmin())
    return assemble(problem, [*layers, net.matrices(theta_NP)[0][best : best + 1]], linkage, early=True)


def assemble(problem: Problem, matrices: list[Tensor], linkage: list[LayerClustering], early: bool = False) -> Found:
    """The whole network of all layers' matrices [1, out, in + 1], fitted and freed of the neurons that cost nothing.

    With `early` these are dropped before the fit has converged, as far as it comes.
    """
    limit = max(problem.floor, UNFINISHED if early else NEARLY_EXACT)
    matrices, loss = _fit(problem, matrices, FIRST_STEPS if early else None)
    if early and loss > limit:
        matrices, loss = _fit(problem, matrices)
    if loss <= limit:
        matrices, loss = _prune(problem, matrices, loss)
    net = _net(problem, matrices)
    return Found(net, net.flatten(matrices), loss, linkage)


def _layer(
    problem: Problem, net: DenseNet, theta_NP: Tensor, inputs_QR: Tensor
) -> tuple[Tensor, LayerClustering] | None:
    """The first layer's neurons: clusters, and what the best student's next pre-activations still miss."""
    pool = pool_neurons(net, theta_NP, inputs_QR, problem.data.y_QO)
    if len(pool.vectors_VK) < 2:
        return None
    clustering = cluster(pool, problem.activation.symmetry, problem.config.clustering)
    best = int(pool.loss_N.argmin())
    target_QH = net.trace(theta_NP[best : best + 1], inputs_QR)[1][1][0]
    target_QH = (target_QH - target_QH.mean(0)) / target_QH.std(0).clamp(min=1e-12)
    enough = max(PURSUED, float(pool.loss_N[best]))
    chosen_HK, candidates_HK = representatives(clustering, pool), pool.of_best()
    return pursue(chosen_HK, candidates_HK, inputs_QR, target_QH, problem.activation, False, enough), clustering


def _carry_over(net: DenseNet, theta_NP: Tensor, inputs_QR: Tensor, hidden_QH: Tensor) -> Tensor:
    """theta of the students without their first layer: the next matrix by least squares on the shared activations."""
    target_NQH = net.trace(theta_NP, inputs_QR)[1][1]
    design_QK = torch.cat([hidden_QH, hidden_QH.new_ones(len(hidden_QH), 1)], dim=1)
    solution_NKH = torch.linalg.lstsq(design_QK.expand(len(theta_NP), -1, -1), target_NQH, driver="gelsd").solution
    return net.flatten([solution_NKH.transpose(1, 2), *net.matrices(theta_NP)[2:]])


def _net(problem: Problem, matrices: list[Tensor]) -> DenseNet:
    return DenseNet((matrices[0].shape[2] - 1, *(m.shape[1] for m in matrices)), problem.activation)


def _fit(problem: Problem, matrices: list[Tensor], steps: int | None = None) -> tuple[list[Tensor], float]:
    """All weights after at most so many steps (None: the settings' number), and the loss on all training queries."""
    net, data = _net(problem, matrices), problem.data
    theta_1P = problem.fit(net, net.flatten(matrices), iterations=steps).theta_NP
    return net.matrices(theta_1P), float(net.loss(theta_1P, data.z_QR, data.y_QO)[0])


def _prune(problem: Problem, matrices: list[Tensor], loss: float) -> tuple[list[Tensor], float]:
    """Drop the neuron that costs its next layer least, fit again, and go on while the fit stays as good.

    Redundant neurons keep a fit from converging, so they are dropped before it has, with a few steps in between: it
    becomes exact on the way. Until then a drop may leave twice what there was at the start; the layers' cheapest
    neurons are tried in turn, and where none can go the fit has all its steps. What no drops make exact is given back
    as it fitted best.
    """
    start, best, settled = loss, (loss, matrices), False
    while not problem.out_of_time():
        exact = loss <= problem.floor
        limit, allowed = (FREE_DROP, problem.floor) if exact else (PURSUED, KEEPS_FIT * start)
        candidates = sorted(_cheapest(problem, matrices, layer) for layer in range(len(matrices) - 1))
        for cost, layer, neuron in candidates[: 1 if exact else None]:
            if cost > limit or matrices[layer].shape[1] == 1:
                continue
            smaller, left = _fit(problem, _without(problem, matrices, layer, neuron), STEPS)
            if left <= allowed:
                matrices, loss, settled = smaller, left, False
                break
        else:
            if exact or settled:
                break
            before = loss
            matrices, loss = _fit(problem, matrices)
            settled = loss > STILL_FALLS * before
        best = min(best, (loss, matrices), key=itemgetter(0)) if loss > problem.floor else (loss, matrices)
    return best[1], best[0]


def _trace(problem: Problem, matrices: list[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """[h_layer, 1] and the next pre-activations on the training queries."""
    net = _net(problem, matrices)
    inputs, pre = net.trace(net.flatten(matrices), problem.data.z_QR)
    return inputs[layer + 1][0], pre[layer + 1][0]


def _cheapest(problem: Problem, matrices: list[Tensor], layer: int) -> tuple[float, int, int]:
    """Least rise of the next pre-activations' relative error over the neurons of a layer; the layer; the neuron."""
    design_QK, target_QH = _trace(problem, matrices, layer)
    costs_H = drop_costs(design_QK, matrices[layer + 1][0].T, matrices[layer].shape[1]) / target_QH.var()
    return float(costs_H.min()), layer, int(costs_H.argmin())


def _without(problem: Problem, matrices: list[Tensor], layer: int, neuron: int) -> list[Tensor]:
    """The matrices with one neuron dropped and the next layer solved again."""
    design_QK, target_QH = _trace(problem, matrices, layer)
    kept = [i for i in range(design_QK.shape[1]) if i != neuron]
    solution_KH = torch.linalg.lstsq(design_QK[:, kept], target_QH, driver="gelsd").solution
    rows = [i for i in range(matrices[layer].shape[1]) if i != neuron]
    return [*matrices[:layer], matrices[layer][:, rows], solution_KH.T[None], *matrices[layer + 2 :]]
