"""A tensor per row of a zoo, computed when first asked for and kept: originals' outputs, aligned weights.

A zoo may have millions of states and a worker sees its share of them only, so storage grows by blocks. Blocks lie in a
folder when one is given (memory-mapped; the caller removes the folder); without one they lie in memory, up to a
limit, beyond which values are computed anew.
"""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

BLOCK = 256  # rows
MEMORY_LIMIT = 1 << 30  # bytes held without a folder


class RowCache:
    """`get(row_B, compute)` is [B, *shape]; `compute(missing)` makes the values at those positions of the batch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None) -> None:
        self.shape, self.dtype, self.folder = shape, dtype, folder
        self.slots: dict[int, int] = {}
        self.blocks: list[Tensor] = []
        size = torch.empty(shape, device="meta").numel() * dtype.itemsize
        self.capacity = None if folder is not None else MEMORY_LIMIT // max(1, size)
        self.name = uuid4().hex  # workers of one machine may share the folder

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
        if row in self.slots or (self.capacity is not None and len(self.slots) >= self.capacity):
            return
        block, place = divmod(len(self.slots), BLOCK)
        if block == len(self.blocks):
            self.blocks.append(self._new_block(block))
        self.blocks[block][place] = value
        self.slots[row] = len(self.slots)

    def _new_block(self, number: int) -> Tensor:
        shape = (BLOCK, *self.shape)
        if self.folder is None:
            return torch.empty(shape, dtype=self.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}-{number}.bin"
        count = torch.empty(shape, device="meta").numel()
        return torch.from_file(str(path), shared=True, size=count, dtype=self.dtype).view(shape)
