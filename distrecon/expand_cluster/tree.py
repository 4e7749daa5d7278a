"""A tree of merges, all of its nodes at once: what lies below each, without walking the tree.

- Ordered as a dendrogram draws them, the vectors below a node are neighbours. A sum over them is then the difference of
  two running sums, and the merges below a node are those at the gaps between its vectors.
- Whatever follows a path (to the root, to the first vector) doubles its stride at every step.

Legend: V vectors, K coordinates, nodes 0 to V - 1 are the vectors and V + k is the k-th merge, as in scipy.
"""

import numpy as np
import torch
from torch import Tensor

FEW = 8  # merges of a round that are not worth its operations on arrays


def roots(above: np.ndarray) -> np.ndarray:
    """Where each node's path ends, if `above` says where it goes next (and of an end: to itself)."""
    while True:
        further = above[above]
        if np.array_equal(further, above):
            return above
        above = further


def mean_cosine(total_K: np.ndarray, size: int) -> float:
    """Mean cosine over the pairs of `size` unit vectors that sum to `total_K`; 1 for one vector."""
    return 1.0 if size == 1 else float((total_K @ total_K - size) / (size * (size - 1)))


class Tree:
    """scipy's linkage matrix [V - 1, 4], read once.

    `left`, `right` [V - 1] are the nodes that each merge joins, `size` [2 V - 1] how many vectors lie below each node,
    `start` [2 V - 1] the first of their places in the order of the dendrogram, `order` [V] the vector at each place.
    """

    def __init__(self, merges: np.ndarray) -> None:
        self.total = total = len(merges) + 1
        self.left, self.right = merges[:, :2].astype(int).T
        self.size = np.concatenate([np.ones(total, dtype=int), merges[:, 3].astype(int)])
        above, self.start = np.arange(2 * total - 1), np.zeros(2 * total - 1, dtype=int)
        above[self.left] = above[self.right] = np.arange(total, 2 * total - 1)
        self.start[self.right] = self.size[self.left]  # from the start of the merge
        while (above != 2 * total - 2).any():
            self.start += self.start[above]
            above = above[above]
        self.order = np.argsort(self.start[:total])
        # the merge at the gap before each place, the last of all merges before the first
        self.gap = np.full(total, total - 2)
        self.gap[self.start[self.right]] = np.arange(total - 1)

    def distinct(self, students: np.ndarray) -> np.ndarray:
        """How many different students the vectors below each node come from, [2 V - 1]; `students` [V] are integers.

        Each pair of a student's neighbouring vectors counts as one too many in the merge that brings them together,
        the latest of those at the gaps between them, and in all above.
        """
        by_student = np.argsort(students[self.order], kind="stable")
        same = np.diff(students[self.order][by_student]) == 0
        together = _latest(self.gap, by_student[:-1][same] + 1, by_student[1:][same] + 1)
        excess = np.bincount(together, minlength=self.total - 1)[self.gap]
        excess[0] = 0
        running = np.concatenate([[0], np.cumsum(excess)])
        return self.size - running[self.start + self.size] + running[self.start + 1]

    def mean_cosine(self, vectors_VK: Tensor, sign_free: bool, nodes: np.ndarray) -> np.ndarray:
        """Mean cosine over the pairs of vectors below each of the nodes; 1 below a vector.

        Where the sign is free, every merge takes one side's vectors for their negatives if the sums of the two sides
        then agree better.
        """
        unit_VK, size = torch.nn.functional.normalize(vectors_VK, dim=1), self.size[nodes]
        if sign_free:
            sums = self._agreeing_sums(unit_VK.numpy())[nodes]
        else:
            running = torch.nn.functional.pad(unit_VK[self.order].cumsum(0), (0, 0, 1, 0)).numpy()
            sums = running[self.start[nodes] + size] - running[self.start[nodes]]
        return np.where(size == 1, 1.0, (np.einsum("ik,ik->i", sums, sums) - size) / np.maximum(size * (size - 1), 1))

    def _agreeing_sums(self, unit_VK: np.ndarray) -> np.ndarray:
        """[2 V - 1, K], each up to its sign: in every round all merges whose two sides are known, and one by one those
        that are left when a round has few, as above the clusters."""
        sums, known = np.empty((2 * self.total - 1, unit_VK.shape[1])), np.arange(2 * self.total - 1) < self.total
        sums[: self.total], pending = unit_VK, np.arange(self.total - 1)
        now = pending
        while len(now) >= FEW:
            ready = known[self.left[pending]] & known[self.right[pending]]
            now, pending = pending[ready], pending[~ready]
            left, right = sums[self.left[now]], sums[self.right[now]]
            right *= np.where(np.einsum("ik,ik->i", left, right) < 0, -1.0, 1.0)[:, None]
            right += left
            sums[self.total + now] = right
            known[self.total + now] = True
        for merge in pending.tolist():  # in their order, in which both sides come first
            one, other = sums[self.left[merge]], sums[self.right[merge]]
            sums[self.total + merge] = one - other if one @ other < 0 else one + other
        return sums


def _latest(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Maximum of values[start:end] for each of the ranges, none of them empty."""
    if not len(starts):
        return starts
    power = np.frexp(ends - starts)[1] - 1  # of two, the greatest within the length
    table = [values]
    for level in range(power.max()):
        table.append(np.maximum(table[-1][: -(2**level)], table[-1][2**level :]))
    offsets = np.cumsum([0, *(len(row) for row in table[:-1])])[power]
    flat = np.concatenate(table)
    return np.maximum(flat[offsets + starts], flat[offsets + ends - 2**power])
