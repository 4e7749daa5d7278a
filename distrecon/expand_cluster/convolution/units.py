"""Units of a layer as far as they are known, and points that show one of them.

Legend: O outputs, C units, K numbers that a unit reads, L positions, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PARALLEL = 1e-4  # distance of unit vectors that are one direction of the outputs
SHARED = 5  # weights that two rows must share
SAME = 1e-4  # of a unit's weights: how far two readings of them may differ


@dataclass
class Units:
    """What is known of the layer: weights and biases [C, K + 1] (0 where unseen), which weights were seen [C, K], what
    a unit adds to the outputs at each position [C, L, O] (0 where unseen)."""

    matrix_CK: Tensor
    seen_CK: Tensor
    outgoing_CLO: Tensor

    def __getitem__(self, number: int) -> Units:
        """One of them."""
        kept = slice(number, number + 1)
        return Units(self.matrix_CK[kept], self.seen_CK[kept], self.outgoing_CLO[kept])

    def __add__(self, other: Units) -> Units:
        mine, theirs = vars(self).values(), vars(other).values()
        return Units(*(torch.cat(pair) for pair in zip(mine, theirs, strict=True)))

    def __len__(self) -> int:
        return len(self.matrix_CK)

    def without(self, number: int) -> Units:
        kept_C = torch.arange(len(self)) != number
        return Units(*(part[kept_C] for part in vars(self).values()))

    def distinct(self) -> Units:
        """Without those whose outgoing vector is a larger one's, which a unit once stood for that was not known yet.

        Of two outputs or fewer that may be chance.
        """
        if self.outgoing_CLO.shape[2] <= 2:
            return self
        size_C = self.outgoing_CLO.flatten(1).norm(dim=1) * self.matrix_CK[:, :-1].norm(dim=1)
        unit_CE = torch.nn.functional.normalize(self.outgoing_CLO.flatten(1), dim=1)
        parallel_CC = (unit_CE @ unit_CE.T).abs() > 1 - PARALLEL**2
        kept_C = ~(parallel_CC & (size_C[:, None] < size_C)).any(1)
        return Units(*(part[kept_C] for part in vars(self).values()))

    def join(self, cause: Cause, off_C: Tensor) -> tuple[int, int] | None:
        """The unit that is the cause, and how many of its unknown weights the cause tells, which it gets; None where it
        is none of them. `off_C` says which of them count as off at the cause's point so far."""
        outgoing_CO = self.outgoing_CLO[:, cause.position]
        factor_C = (outgoing_CO @ cause.outgoing_O) / outgoing_CO.square().sum(1).clamp(min=1e-300)
        distance_C = (cause.outgoing_O - factor_C[:, None] * outgoing_CO).norm(dim=1)
        if not len(self) or distance_C.min() > PARALLEL:
            return None
        near = int(distance_C.argmin())
        change_K, row_K = factor_C[near] * cause.row_K, self.matrix_CK[near, :-1]
        shared_K, new_K = cause.told_K & self.seen_CK[near], cause.told_K & ~self.seen_CK[near]
        size, off = SAME * row_K.norm(), bool(off_C[near])
        if off and (change_K - row_K)[shared_K].norm() < size:
            row_K[new_K] = change_K[new_K]
        elif not off and change_K[shared_K].norm() < size:
            row_K[new_K] = change_K[new_K]
        else:
            return near, 0
        self.seen_CK[near] |= cause.told_K
        return near, int(new_K.sum())

    def at_other_position(self, cause: Cause) -> tuple[int, int] | None:
        """The same for a unit that was not seen at the cause's position yet: its weights tell it."""
        for number, row_K in enumerate(self.matrix_CK[:, :-1]):
            shared_K = cause.told_K & self.seen_CK[number]
            if int(shared_K.sum()) < SHARED or self.outgoing_CLO[number, cause.position].any():
                continue
            factor = float(row_K[shared_K] @ cause.row_K[shared_K] / row_K[shared_K].square().sum().clamp(min=1e-300))
            if (cause.row_K - factor * row_K)[shared_K].norm() < SAME * cause.row_K.norm() and factor > 0:
                self.outgoing_CLO[number, cause.position] = factor * cause.outgoing_O
                return number, 1
        return None


@dataclass(frozen=True)
class Cause:
    """One point at which a single unit is the cause of what is left: outgoing (weights x + bias), with a unit outgoing
    vector [O], the weights that are told there [K], and the unit's own map position."""

    x_I: Tensor
    row_K: Tensor
    told_K: Tensor
    bias: float
    position: int
    outgoing_O: Tensor

    def unit(self, positions: int) -> Units:
        """The unit that it shows, with weights of norm 1."""
        size, outgoing_1LO = self.row_K.norm(), self.row_K.new_zeros(1, positions, len(self.outgoing_O))
        outgoing_1LO[0, self.position] = size * self.outgoing_O
        row_K = torch.cat([self.row_K, self.row_K.new_tensor([self.bias])]) / size
        return Units(row_K[None], self.told_K[None].clone(), outgoing_1LO)
