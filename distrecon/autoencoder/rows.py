"""A tensor per row of a zoo, computed when first asked for and kept: models' weights, originals' outputs.

A zoo may have millions of states and a worker sees its share of them only, so storage grows as rows come, up to a
limit, beyond which values are computed anew. It lies on the device that works with it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY_LIMIT = 1 << 30  # bytes


class RowCache:
    """`get(row_B, compute)` is [B, *shape]; `compute(missing)` makes the values at those positions of the batch.

    The two halves of `get`, for who brings other indices to the device with its own: `find` and `values`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.slots: dict[int, int] = {}
        self.used = 0
        self.storage = torch.empty(0, *shape, dtype=dtype, device=device)
        size = torch.empty(shape, device="meta").numel() * dtype.itemsize
        self.capacity = MEMORY_LIMIT // max(1, size)

    def get(self, row_B: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        place_B, missing = self.find(row_B)
        return self.values(place_B.to(self.storage.device), row_B, missing, compute)

    def find(self, row_B: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's place in the storage [B] and the positions of those that are not there yet, both on the CPU."""
        rows = row_B.tolist()
        missing = [i for i, row in enumerate(rows) if row not in self.slots]
        place_B = [self.slots.get(row, 0) for row in rows]
        for place, i in enumerate(missing, self.used):
            place_B[i] = place
        return torch.tensor(place_B, dtype=torch.long), torch.tensor(missing, dtype=torch.long)

    def values(self, place_B: Tensor, row_B: Tensor, missing: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, *shape] of what `find` said of these rows, `place_B` being on the storage's device by now."""
        if len(missing):
            end = self.used + len(missing)
            fresh = compute(missing).to(self.storage, non_blocking=True)
            self._grow(end)
            self.storage[self.used : end] = fresh
            # what does not fit lies behind the kept rows until the next batch
            kept = max(0, min(len(missing), self.capacity - self.used))
            self.slots.update(zip(row_B[missing[:kept]].tolist(), range(self.used, self.used + kept), strict=True))
            self.used += kept
        return self.storage.index_select(0, place_B)

    def _grow(self, rows: int) -> None:
        if rows > len(self.storage):
            larger = self.storage.new_empty(max(rows, min(2 * len(self.storage), self.capacity)), *self.shape)
            larger[: self.used] = self.storage[: self.used]
            self.storage = larger
