"""A tensor per row of a zoo, computed when first asked for and kept: originals' outputs, aligned weights.

A zoo may have millions of states and a worker sees its share of them only, so storage grows by blocks, in memory, up to
a limit, beyond which values are computed anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256  # rows
MEMORY_LIMIT = 1 << 30  # bytes


class RowCache:
    """`get(row_B, compute)` is [B, *shape]; `compute(missing)` makes the values at those positions of the batch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.slots: dict[int, int] = {}
        self.blocks: list[Tensor] = []
        size = torch.empty(shape, device="meta").numel() * dtype.itemsize
        self.capacity = MEMORY_LIMIT // max(1, size)

    def get(self, row_B: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        rows = row_B.tolist()
        missing = [i for i, row in enumerate(rows) if row not in self.slots]
        fresh = compute(torch.tensor(missing)).to("cpu", self.dtype) if missing else None
        result = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        for i, row in enumerate(rows):
            if row in self.slots:
                block, place = divmod(self.slots[row], BLOCK)
                result[i] = self.blocks[block][place]
        if fresh is not None:
            result[missing] = fresh
            for i, value in zip(missing, fresh, strict=True):
                self._keep(rows[i], value)
        return result

    def _keep(self, row: int, value: Tensor) -> None:
        if row in self.slots or len(self.slots) >= self.capacity:
            return
        block, place = divmod(len(self.slots), BLOCK)
        if block == len(self.blocks):
            self.blocks.append(torch.empty((BLOCK, *self.shape), dtype=self.dtype))
        self.blocks[block][place] = value
        self.slots[row] = len(self.slots)
