"""Students of a convolutional black box: wider networks fitted to its answers, and what most of them have in common.

Legend: N students, Q queries, C channels, K numbers that a channel reads, V vectors, P parameters.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from distrecon.expand_cluster.convolution.exact import Fitted, exact_network, fit, needs_skip
from distrecon.expand_cluster.convolution.network import ConvNet
from distrecon.expand_cluster.neurons import LayerClustering, Pool, cluster, representatives
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import LEAST_CONTRIBUTION, LOSS_MARGIN, NEARLY_EXACT


def random_layers(net: ConvNet, scale: float, generator: torch.Generator) -> list[Tensor]:
    """Matrices [C, K + 1] of every hidden layer, with unit-variance pre-activations for inputs of this scale."""
    matrices = []
    for number, (width, fan_in) in enumerate(zip(net.widths, net.fan_ins, strict=True)):
        m = torch.randn(width, fan_in + 1, generator=generator, dtype=torch.float64)
        m[:, :-1] /= math.sqrt(fan_in) * (scale if number == 0 else 1.0)
        m[:, -1] *= 0.5
        matrices.append(m)
    return matrices


def expand(run: Run, problem: Problem, net: ConvNet, first_CK: Tensor | None, count: int, stage: str) -> list[Fitted]:
    """Students fitted from random layers, but for the first where that is known."""
    found, skip = list[Fitted](), needs_skip(net)
    for _ in range(count):
        matrices = random_layers(net, problem.probes.coordinates.scale, run.generator)
        if first_CK is not None:
            matrices[0] = first_CK
        found.append(fit(problem, net, net.flatten(matrices), skip, problem.floor))
        run.progress(stage, found[-1].loss)
        if run.out_of_time():
            break
    run.history.append((stage, problem.config.solver.iterations, [student.loss for student in found]))
    return found


def pool_channels(problem: Problem, students: list[Fitted]) -> Pool:
    """The last hidden layer's channels of all students that contribute to the outputs."""
    vectors, of = [], []
    for number, student in enumerate(students):
        features_QF = student.net.features(student.theta_P, problem.data.x_QI[:500])
        shape = (student.net.widths[-1], -1)
        parts_QOC = torch.einsum(
            "qcm,ocm->qoc", features_QF.unflatten(1, shape), student.readout_OF.unflatten(1, shape)
        )
        contribution_C = parts_QOC.std(0).square().mean(0).sqrt()
        kept_C = contribution_C > max(LEAST_CONTRIBUTION, LOSS_MARGIN * math.sqrt(student.loss))
        vectors.append(student.net.matrices(student.theta_P)[-1][kept_C])
        of += [number] * int(kept_C.sum())
    return Pool(torch.cat(vectors), np.array(of), torch.tensor([student.loss for student in students]))


def collapse(problem: Problem, students: list[Fitted]) -> Fitted:
    """One exact network from the clusters of the students' channels, or else from the best student's."""
    pool, best = pool_channels(problem, students), min(students, key=lambda student: student.loss)
    linkage: list[LayerClustering] = []
    found: Fitted | None = None
    if len(pool.vectors_VK) > 1:
        clustering = cluster(pool, best.net.activation.symmetry, problem.config.clustering)
        linkage = [clustering]
        if clustering.clusters:
            found = exact_network(problem, *_with_last(best, representatives(clustering, pool)))
    if found is None or found.loss > max(problem.floor, NEARLY_EXACT):
        whole = exact_network(problem, best.net, best.theta_P)
        found = whole if found is None or whole.loss < found.loss else found
    return dataclasses.replace(found, linkage=linkage)


def _with_last(student: Fitted, last_CK: Tensor) -> tuple[ConvNet, Tensor]:
    """The student with other channels in its last hidden layer."""
    net = dataclasses.replace(student.net, widths=(*student.net.widths[:-1], len(last_CK)))
    return net, net.flatten([*student.net.matrices(student.theta_P)[:-1], last_CK])
