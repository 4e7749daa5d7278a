"""Clustering the neurons of many students: a teacher's neuron is found by most students, a redundant one is not.

Average linkage over symmetry-invariant distances, then the height of the tree at which the number of valid clusters is
largest (Expand-and-Cluster, arXiv 2304.12794, sec. 4). A cluster is valid when it has members from at least gamma N
*distinct* students and its members are aligned within the angle beta; the published rule counts members instead.
All heights are examined in one pass over the merges.

Legend: V vectors, K coordinates of a vector ([weights, bias] of a neuron), N students.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

SIGN_FREE = frozenset({"odd", "odd_constant", "even_linear", "scaled"})


@dataclass(frozen=True)
class LayerClustering:
    """The clustered neurons of one layer: enough to draw the dendrogram, the cut and the similarity matrix.

    `merges` is scipy's linkage matrix [V - 1, 4], `cut` the height of the cut, `clusters` the vectors' indices of every
    valid cluster, `alignment` the mean cosine inside each, `students` and `neurons` where each vector comes from.
    """

    vectors_VK: Tensor
    students: np.ndarray
    neurons: np.ndarray
    merges: np.ndarray
    cut: float
    clusters: list[np.ndarray]
    alignment: list[float]
    gamma: float
    sign_free: bool

    def similarity(self) -> Tensor:
        """Cosine of every two vectors, [V, V]; its absolute value where a neuron's sign is free."""
        unit_VK = torch.nn.functional.normalize(self.vectors_VK, dim=1)
        cosine_VV = unit_VK @ unit_VK.T
        return cosine_VV.abs() if self.sign_free else cosine_VV


def distances(vectors_VK: Tensor, symmetry: str) -> Tensor:
    """Pairwise distances [V, V]: min(|u - v|, |u + v|) where the sign is free, of unit vectors where the scale is."""
    if symmetry == "scaled":
        vectors_VK = torch.nn.functional.normalize(vectors_VK, dim=1)
    norms_V = vectors_VK.square().sum(1)
    dot_VV = vectors_VK @ vectors_VK.T
    if symmetry in SIGN_FREE:
        dot_VV = dot_VV.abs()
    squared_VV = norms_V[:, None] + norms_V[None, :] - 2 * dot_VV
    distance_VV = squared_VV.clamp(min=0).sqrt()
    return (distance_VV + distance_VV.T).fill_diagonal_(0) / 2


def average_linkage(vectors_VK: Tensor, symmetry: str) -> np.ndarray:
    """scipy's linkage matrix [V - 1, 4] of the vectors; V >= 2."""
    distance_VV = distances(vectors_VK, symmetry).numpy()
    return linkage(distance_VV[np.triu_indices(len(distance_VV), 1)], method="average")


def best_cut(
    merges: np.ndarray,
    students: np.ndarray,
    vectors_VK: Tensor,
    sign_free: bool,
    count: int,
    gamma: float,
    beta: float,
    rule: str = "distinct",
) -> float:
    """The height with most valid clusters, found in one pass over the merges; the middle of the widest such interval.

    `rule` is "distinct" (members from at least gamma N distinct students, aligned within beta) or "published" (at
    least gamma N members, wherever they come from; the angle is left to a later filter).
    """
    heights = merges[:, 2]
    need = math.ceil(gamma * count - 1e-9)
    total = len(merges) + 1
    unit = torch.nn.functional.normalize(vectors_VK, dim=1).numpy()
    sums = np.zeros((2 * total - 1, unit.shape[1]))
    sums[:total] = unit
    owners = [1 << int(s) for s in students] + [0] * (total - 1)
    sizes = np.ones(2 * total - 1, dtype=int)

    def valid(node: int) -> bool:
        if rule == "published":
            return bool(sizes[node] >= need)
        return owners[node].bit_count() >= need and mean_cosine(sums[node], sizes[node]) >= math.cos(beta)

    valid_nodes = np.zeros(2 * total - 1, dtype=bool)
    valid_nodes[:total] = [valid(i) for i in range(total)]
    counts = np.empty(total, dtype=int)  # counts[k]: valid clusters after k merges
    counts[0] = valid_nodes[:total].sum()
    for k, (a, b) in enumerate(merges[:, :2].astype(int)):
        node = total + k
        sign = -1.0 if sign_free and sums[a] @ sums[b] < 0 else 1.0
        sums[node] = sums[a] + sign * sums[b]
        owners[node] = owners[a] | owners[b]
        sizes[node] = sizes[a] + sizes[b]
        valid_nodes[node] = valid(node)
        counts[k + 1] = counts[k] + int(valid_nodes[node]) - int(valid_nodes[a]) - int(valid_nodes[b])
    edges = np.concatenate([[0.0], heights, [heights[-1] * 2 + 1e-12]])
    # cuts between merges of equal height are not cuts: their interval is empty
    widths = np.log(edges[1:] + 1e-12) - np.log(edges[:-1] + 1e-12)
    possible = np.flatnonzero(edges[1:] > edges[:-1])
    most = possible[counts[possible] == counts[possible].max()]
    chosen = most[np.argmax(widths[most])]
    return float(np.sqrt((edges[chosen] + 1e-12) * (edges[chosen + 1] + 1e-12)))


def mean_cosine(total_K: np.ndarray, size: int) -> float:
    """Mean cosine over the pairs of `size` unit vectors that sum to `total_K`; 1 for a single vector."""
    return 1.0 if size == 1 else float((total_K @ total_K - size) / (size * (size - 1)))


def members(merges: np.ndarray, cut: float) -> list[np.ndarray]:
    """Indices of the vectors of every cluster below the height `cut`, in the order of their first members."""
    total = len(merges) + 1
    parent = np.arange(2 * total - 1)
    for k, (a, b, height, _) in enumerate(merges):
        if height <= cut:
            parent[int(a)] = parent[int(b)] = total + k
    for node in range(2 * total - 2, -1, -1):
        parent[node] = parent[parent[node]]
    _, first, label = np.unique(parent[:total], return_index=True, return_inverse=True)
    order = np.argsort(first)
    return [np.flatnonzero(label == group) for group in order]


def cluster(
    vectors_VK: Tensor,
    students: np.ndarray,
    neurons: np.ndarray,
    symmetry: str,
    count: int,
    gamma: float,
    beta: float,
    rule: str = "distinct",
) -> LayerClustering:
    """Cluster vectors[V, K] of `count` students; `students` and `neurons` [V] say where each comes from. V >= 2."""
    sign_free = symmetry in SIGN_FREE
    merges = average_linkage(vectors_VK, symmetry)
    cut = best_cut(merges, students, vectors_VK, sign_free, count, gamma, beta, rule)
    need = math.ceil(gamma * count - 1e-9)
    unit = torch.nn.functional.normalize(vectors_VK, dim=1).numpy()
    kept, alignment = [], []
    for group in members(merges, cut):
        size = len(group) if rule == "published" else len(set(students[group].tolist()))
        rows = unit[group]
        signs = np.where(rows @ rows[0] < 0, -1.0, 1.0) if sign_free else np.ones(len(rows))
        cosine = mean_cosine((signs[:, None] * rows).sum(0), len(rows))
        if size >= need and cosine >= math.cos(beta):
            kept.append(group)
            alignment.append(cosine)
    return LayerClustering(vectors_VK, students, neurons, merges, cut, kept, alignment, gamma, sign_free)
