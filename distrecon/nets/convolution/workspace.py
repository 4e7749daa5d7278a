"""Memory of one batched pass, taken once instead of block by block.

Fresh memory costs a page fault every 4 KB, more than the arithmetic of a small network; so what is saved for the
backward pass lies in one buffer, and what only one block needs is overwritten by the next.
"""

from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes


class Workspace:
    """Hands out memory that stays, from a buffer of `saved_bytes` (when full, another is taken), and scratch memory.

    `backward`: whether a backward pass will follow, which needs the indices of each pool's maximum.
    """

    def __init__(self, like: Tensor, saved_bytes: int = 0, backward: bool = True) -> None:
        self.dtype, self.device, self.backward = like.dtype, like.device, backward
        self._buffer, self._used = self._bytes(saved_bytes), 0
        self._scratch: dict[str, Tensor] = {}

    def _bytes(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that stays, of this shape and (if not the workspace's) type."""
        dtype = dtype or self.dtype
        size = prod(shape) * dtype.itemsize
        if self._used + size > len(self._buffer):
            self._buffer, self._used = self._bytes(max(size, 2**20)), 0
        memory = self._buffer[self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return memory

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that the next call with this name overwrites."""
        dtype = dtype or self.dtype
        size = prod(shape) * dtype.itemsize
        if name not in self._scratch or len(self._scratch[name]) < size:
            self._scratch[name] = self._bytes(size)
        return self._scratch[name][:size].view(dtype).view(shape)

    def reset(self) -> None:
        """Allocate from the buffer's beginning again."""
        self._used = 0
