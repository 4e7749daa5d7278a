"""The neurons of many students, clustered: a teacher's neuron is found by most students, a redundant one is not.

Average linkage over symmetry-invariant distances, then the height of the tree at which the number of valid clusters is
largest (Expand-and-Cluster, arXiv 2304.12794, sec. 4). A cluster is valid when it has members from at least gamma N
*distinct* students and its members are aligned within the angle beta; the published rule counts members instead.
All heights are examined in one pass over the merges.

Legend: V vectors, K coordinates of a vector ([weights, bias] of a neuron), N students, Q queries, R layer inputs,
H hidden, O outputs, P parameters.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from distrecon.expand_cluster.config import ClusteringConfig
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.thresholds import LEAST_CONTRIBUTION, LOSS_MARGIN
from distrecon.expand_cluster.tree import Tree, mean_cosine, roots

ROWS = 32  # of the distances, computed at a time
SIGN_FREE = frozenset({"odd", "odd_constant", "even_linear", "scaled"})


@dataclass(frozen=True)
class Pool:
    """Neurons of N students that contribute to the outputs: vectors, the student of each [V], the students' losses."""

    vectors_VK: Tensor
    students: np.ndarray
    loss_N: Tensor

    @property
    def count(self) -> int:
        """Number of students N."""
        return len(self.loss_N)

    def of_best(self) -> Tensor:
        """The neurons of the student of the lowest loss, [H, K]."""
        return self.vectors_VK[torch.from_numpy(self.students == int(self.loss_N.argmin()))]


def pool_neurons(net: DenseNet, theta_NP: Tensor, z_QR: Tensor, y_QO: Tensor) -> Pool:
    """First-layer neurons [w, b] of all students whose contribution |a| std(h) exceeds the fit's own error.

    The threshold is max(1e-5, 3 sqrt(loss)) of the standardised outputs. The students must be finite.
    """
    matrices = net.matrices(theta_NP)
    first = DenseNet(net.sizes[:2], net.activation)
    # one student at a time, as there may be many wide ones
    deviation_NH = torch.stack([net.activation(first(m_HK.flatten()[None], z_QR)[0]).std(0) for m_HK in matrices[0]])
    loss_N = net.loss(theta_NP, z_QR, y_QO)
    outgoing_NH = matrices[1][..., : net.sizes[1]].norm(dim=1)
    contribution_NH = outgoing_NH * deviation_NH
    threshold_N = (LOSS_MARGIN * loss_N.sqrt()).clamp(min=LEAST_CONTRIBUTION)
    students, neurons = (contribution_NH > threshold_N[:, None]).nonzero().T
    return Pool(matrices[0][students, neurons], students.numpy(), loss_N)


@dataclass(frozen=True)
class LayerClustering:
    """The clustered vectors of one layer: enough to draw the dendrogram, the cut and the similarity matrix.

    `merges` is scipy's linkage matrix [V - 1, 4], `cut` the height of the cut, `clusters` the vectors' indices of every
    valid cluster, `students` which student (of bends: which line) each vector comes from.
    """

    vectors_VK: Tensor
    students: np.ndarray
    merges: np.ndarray
    cut: float
    clusters: list[np.ndarray]
    sign_free: bool

    def similarity(self) -> Tensor:
        """Cosine of every two vectors, [V, V]; its absolute value where a neuron's sign is free."""
        unit_VK = torch.nn.functional.normalize(self.vectors_VK, dim=1)
        cosine_VV = unit_VK @ unit_VK.T
        return cosine_VV.abs() if self.sign_free else cosine_VV


def distances(vectors_VK: Tensor, symmetry: str) -> Tensor:
    """Distance of every two vectors, [V (V - 1) / 2] in scipy's order of pairs.

    min(|u - v|, |u + v|) where the sign is free, of unit vectors where the scale is. A few rows are done at a time, so
    that they stay in cache on the way from the matrix product to the result.
    """
    if symmetry == "scaled":
        vectors_VK = torch.nn.functional.normalize(vectors_VK, dim=1)
    total, norms_V = len(vectors_VK), vectors_VK.square().sum(1)
    found = vectors_VK.new_empty(total * (total - 1) // 2)
    scratch, end = vectors_VK.new_empty(ROWS * total), 0
    for start in range(0, total, ROWS):
        rows, others = slice(start, start + ROWS), slice(start, total)
        shape = norms_V[rows].shape + norms_V[others].shape
        block = scratch[: math.prod(shape)].view(shape)
        torch.mm(vectors_VK[rows], vectors_VK[others].T, out=block)
        if symmetry in SIGN_FREE:
            block.abs_()
        block.mul_(-2).add_(norms_V[rows, None]).add_(norms_V[others]).clamp_(min=0).sqrt_()
        for i, row in enumerate(block):
            begin, end = end, end + len(row) - i - 1
            found[begin:end] = row[i + 1 :]
    return found


def average_linkage(vectors_VK: Tensor, symmetry: str) -> np.ndarray:
    """scipy's linkage matrix [V - 1, 4] of the vectors; V >= 2."""
    return linkage(distances(vectors_VK, symmetry).numpy(), method="average")


def best_cut(merges: np.ndarray, pool: Pool, sign_free: bool, settings: ClusteringConfig) -> float:
    """The height with most valid clusters, found in one pass over the merges; the middle of the widest such interval.

    The rule is "distinct" (members from at least gamma N distinct students, aligned within beta) or "published" (at
    least gamma N members, wherever they come from; the angle is left to a later filter).
    """
    heights, tree = merges[:, 2], Tree(merges)
    need = _members_needed(pool, settings)
    if settings.rule == "published":
        valid = tree.size >= need
    else:
        valid = tree.distinct(pool.students) >= need
        cosines = tree.mean_cosine(pool.vectors_VK, sign_free, np.flatnonzero(valid))
        valid[valid] = cosines >= math.cos(settings.beta)
    valid = valid.astype(int)
    gained = valid[tree.total :] - valid[tree.left] - valid[tree.right]
    counts = np.cumsum(np.concatenate([[valid[: tree.total].sum()], gained]))  # after 0, 1, ... merges
    edges = np.concatenate([[0.0], heights, [heights[-1] * 2 + 1e-12]])
    # cuts between merges of equal height are not cuts: their interval is empty
    possible = np.flatnonzero(edges[1:] > edges[:-1])
    most = possible[counts[possible] == counts[possible].max()]
    chosen = most[np.argmax((edges[most + 1] + 1e-12) / (edges[most] + 1e-12))]  # the widest, as a ratio
    return float(np.sqrt((edges[chosen] + 1e-12) * (edges[chosen + 1] + 1e-12)))


def members(merges: np.ndarray, cut: float) -> list[np.ndarray]:
    """Indices of the vectors of every cluster below the height `cut`, in the order of their first members."""
    total = len(merges) + 1
    above = np.arange(2 * total - 1)
    below = np.flatnonzero(merges[:, 2] <= cut)
    above[merges[below, :2].astype(int)] = total + below[:, None]
    _, first, label, sizes = np.unique(roots(above)[:total], return_index=True, return_inverse=True, return_counts=True)
    groups = np.split(np.argsort(label, kind="stable"), np.cumsum(sizes)[:-1])
    return [groups[i] for i in np.argsort(first)]


def _members_needed(pool: Pool, settings: ClusteringConfig) -> int:
    """gamma N, rounded up but for rounding errors."""
    return math.ceil(settings.gamma * pool.count - 1e-9)


def cluster(pool: Pool, symmetry: str, settings: ClusteringConfig) -> LayerClustering:
    """Cluster the vectors of a pool, at least two."""
    sign_free = symmetry in SIGN_FREE
    merges = average_linkage(pool.vectors_VK, symmetry)
    cut = best_cut(merges, pool, sign_free, settings)
    need = _members_needed(pool, settings)
    unit = torch.nn.functional.normalize(pool.vectors_VK, dim=1).numpy()
    kept = []
    for group in members(merges, cut):
        if len(group) < need or (settings.rule == "distinct" and len(set(pool.students[group].tolist())) < need):
            continue
        rows = unit[group]
        signs = np.where(rows @ rows[0] < 0, -1.0, 1.0) if sign_free else np.ones(len(rows))
        if mean_cosine((signs[:, None] * rows).sum(0), len(rows)) >= math.cos(settings.beta):
            kept.append(group)
    return LayerClustering(pool.vectors_VK, pool.students, merges, cut, kept, sign_free)


def representatives(clustering: LayerClustering, pool: Pool) -> Tensor:
    """One neuron for every cluster, its member in the student of the lowest loss, [H, K]."""
    loss_N = pool.loss_N.numpy()
    return pool.vectors_VK[[group[np.argmin(loss_N[pool.students[group]])] for group in clustering.clusters]]
