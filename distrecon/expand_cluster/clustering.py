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

from distrecon.expand_cluster.tree import Tree, mean_cosine, roots

ROWS = 32  # of the distances, computed at a time
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
    heights, tree = merges[:, 2], Tree(merges)
    need = math.ceil(gamma * count - 1e-9)
    if rule == "published":
        valid = tree.size >= need
    else:
        valid = tree.distinct(students) >= need
        valid[valid] = tree.mean_cosine(vectors_VK, sign_free, np.flatnonzero(valid)) >= math.cos(beta)
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
        if len(group) < need or (rule == "distinct" and len(set(students[group].tolist())) < need):
            continue
        rows = unit[group]
        signs = np.where(rows @ rows[0] < 0, -1.0, 1.0) if sign_free else np.ones(len(rows))
        cosine = mean_cosine((signs[:, None] * rows).sum(0), len(rows))
        if cosine >= math.cos(beta):
            kept.append(group)
            alignment.append(cosine)
    return LayerClustering(vectors_VK, students, neurons, merges, cut, kept, alignment, gamma, sign_free)
