"""Several hidden layers, peeled one by one: cluster the first, carry the students over to it, go on with the rest.

Students of the full depth give the first layer's neurons by clustering, as for one hidden layer. Those neurons then
become the shared inputs of narrower students of one layer less, whose first pre-activations are carried over by least
squares; and so on to the last hidden layer. The assembled network is fitted as a whole, neurons that cost nothing are
dropped, and the fit is repeated. Extra neurons are kept until then: a missing one is fatal, an extra one is not.

Legend: N students, Q queries, R relevant input directions, H hidden, O outputs, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.clustering import LayerClustering, cluster
from distrecon.expand_cluster.collapse import drop_costs, pursue
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.fitting import Probed, fit, rows_needed
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.shallow import NEARLY_EXACT, neuron_pool, representatives
from distrecon.nets.activations import Activation

PURSUIT = 1e-4  # relative error of the next pre-activations at which the clustered neurons are enough
FREE = 0.1  # a neuron is free when dropping it raises the loss by less than this share of it

Train = Callable[[DenseNet, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peeled:
    """A deep network without skip in the relevant coordinates, its relative loss, and every layer's clustering."""

    net: DenseNet
    theta_1P: Tensor
    loss: float
    linkage: list[LayerClustering]


def peel(
    net: DenseNet,
    theta_NP: Tensor,
    data: Probed,
    activation: Activation,
    config: RecoveryConfig,
    floor: float,
    deadline: float | None,
    train: Train,
) -> Peeled | None:
    """Recover layer after layer from trained students of `net`; `train(net, theta, inputs, targets)` trains them on.

    None when a layer has no clusters.
    """
    inputs_QR, layers, linkage = data.z_QR, [], []
    while True:
        found = _layer(net, theta_NP, inputs_QR, data.y_QO, activation, config)
        if found is None:
            return None
        neurons_HK, clustering = found
        linkage.append(clustering)
        layers.append(neurons_HK[None])
        hidden_QH = activation(inputs_QR @ neurons_HK[:, :-1].T + neurons_HK[:, -1])
        smaller = DenseNet((len(neurons_HK), *net.sizes[2:]), activation)
        theta_NP = _carry_over(net, theta_NP, inputs_QR, hidden_QH)
        net, inputs_QR = smaller, hidden_QH
        if len(net.sizes) == 2:
            break
        theta_NP = train(net, theta_NP, inputs_QR, data.y_QO)
    best = int(net.loss(theta_NP, inputs_QR, data.y_QO).argmin())
    matrices = [*layers, net.matrices(theta_NP)[0][best : best + 1]]
    return assemble(matrices, data, activation, config, floor, deadline, linkage)


def assemble(
    matrices: list[Tensor],
    data: Probed,
    activation: Activation,
    config: RecoveryConfig,
    floor: float,
    deadline: float | None,
    linkage: list[LayerClustering],
) -> Peeled:
    """The whole network of all layers' matrices [1, out, in + 1], fitted and freed of the neurons that cost nothing."""
    matrices, loss = _fit(matrices, data, activation, config, deadline)
    matrices, loss = _prune(matrices, loss, data, activation, config, floor, deadline)
    full = DenseNet(_sizes(matrices), activation)
    return Peeled(full, full.flatten(matrices), loss, linkage)


def _layer(
    net: DenseNet, theta_NP: Tensor, inputs_QR: Tensor, y_QO: Tensor, activation: Activation, config: RecoveryConfig
) -> tuple[Tensor, LayerClustering] | None:
    """The first layer's neurons: clusters, and what the best student's next pre-activations still miss."""
    pool = neuron_pool(net, theta_NP, inputs_QR, y_QO)
    if len(pool.vectors_VK) < 2:
        return None
    settings = config.clustering
    clustering = cluster(
        pool.vectors_VK,
        pool.students,
        pool.neurons,
        activation.symmetry,
        pool.count,
        settings.gamma,
        settings.beta,
        settings.rule,
    )
    best = int(pool.loss_N.argmin())
    own_HK = pool.vectors_VK[torch.from_numpy(pool.students == best)]
    target_QH = net.trace(theta_NP[best : best + 1], inputs_QR)[1][1][0]
    target_QH = (target_QH - target_QH.mean(0)) / target_QH.std(0).clamp(min=1e-12)
    limit = max(PURSUIT, float(pool.loss_N[best]))
    chosen_HK = representatives(clustering, pool)
    return pursue(chosen_HK, own_HK, inputs_QR, target_QH, activation, False, limit), clustering


def _carry_over(net: DenseNet, theta_NP: Tensor, inputs_QR: Tensor, hidden_QH: Tensor) -> Tensor:
    """theta of the students without their first layer: the next matrix by least squares on the shared activations."""
    target_NQH = net.trace(theta_NP, inputs_QR)[1][1]
    design_QK = torch.cat([hidden_QH, hidden_QH.new_ones(len(hidden_QH), 1)], dim=1)
    solution_NKH = torch.linalg.lstsq(design_QK.expand(len(theta_NP), -1, -1), target_NQH, driver="gelsd").solution
    return net.flatten([solution_NKH.transpose(1, 2), *net.matrices(theta_NP)[2:]])


def _sizes(matrices: list[Tensor]) -> tuple[int, ...]:
    return (matrices[0].shape[2] - 1, *(m.shape[1] for m in matrices))


def _fit(
    matrices: list[Tensor], data: Probed, activation: Activation, config: RecoveryConfig, deadline: float | None
) -> tuple[list[Tensor], float]:
    net = DenseNet(_sizes(matrices), activation)
    rows = data.rows(rows_needed(net, config.solver.rows))
    start = net.flatten(matrices)
    solution = fit(net, start, rows.z_QR, rows.y_QO, config.solver.iterations, deadline=deadline)
    return net.matrices(solution.theta_NP), float(net.loss(solution.theta_NP, data.z_QR, data.y_QO)[0])


def _prune(
    matrices: list[Tensor],
    loss: float,
    data: Probed,
    activation: Activation,
    config: RecoveryConfig,
    floor: float,
    deadline: float | None,
) -> tuple[list[Tensor], float]:
    """Drop the neuron that costs its next layer least, refit, and go on while the fit stays as good."""
    while loss <= max(floor, NEARLY_EXACT):
        candidates = [_cheapest(matrices, layer, data, activation) for layer in range(len(matrices) - 1)]
        layer = min(range(len(candidates)), key=lambda i: candidates[i][0])
        cost, neuron = candidates[layer]
        if cost > 1e-8 or matrices[layer].shape[1] == 1:
            break
        smaller, new_loss = _fit(
            _without(matrices, layer, neuron, data, activation), data, activation, config, deadline
        )
        if new_loss > max(floor, FREE * loss):
            break
        matrices, loss = smaller, new_loss
    return matrices, loss


def _trace(matrices: list[Tensor], layer: int, data: Probed, activation: Activation) -> tuple[Tensor, Tensor]:
    """[h_layer, 1] and the next pre-activations on the training queries."""
    net = DenseNet(_sizes(matrices), activation)
    inputs, pre = net.trace(net.flatten(matrices), data.z_QR)
    return inputs[layer + 1][0], pre[layer + 1][0]


def _cheapest(matrices: list[Tensor], layer: int, data: Probed, activation: Activation) -> tuple[float, int]:
    """Least rise of the next pre-activations' relative error over the neurons of a layer, and which neuron it is."""
    design_QK, target_QH = _trace(matrices, layer, data, activation)
    costs_H = drop_costs(design_QK, matrices[layer + 1][0].T, matrices[layer].shape[1]) / target_QH.var()
    return float(costs_H.min()), int(costs_H.argmin())


def _without(matrices: list[Tensor], layer: int, neuron: int, data: Probed, activation: Activation) -> list[Tensor]:
    """The matrices with one neuron dropped and the next layer solved again."""
    design_QK, target_QH = _trace(matrices, layer, data, activation)
    kept = [i for i in range(design_QK.shape[1]) if i != neuron]
    solution_KH = torch.linalg.lstsq(design_QK[:, kept], target_QH, driver="gelsd").solution
    rows = [i for i in range(matrices[layer].shape[1]) if i != neuron]
    return [*matrices[:layer], matrices[layer][:, rows], solution_KH.T[None], *matrices[layer + 2 :]]
