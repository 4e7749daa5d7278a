"""In which order a zoo's rows are seen: pure arithmetic, the same on every worker, whatever their number.

The rows of a split are cut into V lanes, contiguous and equal to within one row. One pass over the zoo shuffles the
pieces (row groups) of each lane, then the rows inside windows of several steps; the global batch of a step is the next
`batch_size / V` rows of every lane, lane after lane. Worker r of W <= V owns the lanes r V/W to (r+1) V/W: it always
sees the same rows, reads no others, and the global batch does not depend on W.

Every row appears once a pass: the last batch has what is left.

Legend: G row groups, V lanes, W workers, S rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distrecon.errors import UserError


@dataclass(frozen=True)
class Order:
    """`spans_G2`: first row and number of rows of each row group of the split, in order; `key`: seeds the shuffles."""

    spans_G2: np.ndarray
    batch_size: int
    lanes: int
    window_steps: int
    key: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.batch_size < 1 or self.batch_size % self.lanes:
            raise UserError(f"batch size {self.batch_size} is not a multiple of the {self.lanes} virtual shards")

    @cached_property
    def total(self) -> int:
        return int(self.spans_G2[:, 1].sum())

    @property
    def per_lane(self) -> int:
        """Rows that each lane gives to a batch."""
        return self.batch_size // self.lanes

    @property
    def steps(self) -> int:
        """Steps of a pass."""
        return -(-self.total // self.batch_size)

    @property
    def windows(self) -> int:
        """Windows of a pass, of `window_steps` steps each, the last one of what is left."""
        return -(-self.steps // self.window_steps)

    def owned(self, rank: int, world_size: int) -> range:
        """The lanes of one worker."""
        if not 0 <= rank < world_size <= self.lanes:
            raise UserError(f"worker {rank} of {world_size}: there are only {self.lanes} virtual shards")
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def _bounds(self, lane: int) -> tuple[int, int]:
        """Where the lane begins and ends among the rows of the split."""
        return lane * self.total // self.lanes, (lane + 1) * self.total // self.lanes

    def lane_rows(self, lane: int) -> np.ndarray:
        """The rows of a lane, in the zoo's order."""
        return np.concatenate([np.empty(0, np.int64), *self._pieces(lane)])

    def _pieces(self, lane: int) -> list[np.ndarray]:
        """The rows of a lane, row group by row group."""
        low, high = self._bounds(lane)
        ends_G = self.spans_G2[:, 1].cumsum()
        pieces = []
        for group in range(int(np.searchsorted(ends_G, low, side="right")), len(ends_G)):
            first, rows = self.spans_G2[group]
            begin = int(ends_G[group] - rows)
            if begin >= high:
                break
            pieces.append(np.arange(first + max(low - begin, 0), first + min(high - begin, rows)))
        return pieces

    def lane_window(self, lane: int, number: int, window: int) -> np.ndarray:
        """Rows [S] that a lane gives to the steps of one window of pass `number`, in order."""
        pieces = self._pieces(lane)
        order = np.random.default_rng([*self.key, number, lane]).permutation(len(pieces))
        rows = np.concatenate([np.empty(0, np.int64), *(pieces[i] for i in order)])
        size = self.window_steps * self.per_lane
        chosen = rows[window * size : (window + 1) * size]
        return np.random.default_rng([*self.key, number, lane, window]).permutation(chosen)

    def window(self, number: int, window: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The rows of each step of a window for one worker, in batch order."""
        lanes = [self.lane_window(lane, number, window) for lane in self.owned(rank, world_size)]
        size, empty = self.per_lane, np.empty(0, np.int64)
        steps = min(self.window_steps, self.steps - window * self.window_steps)
        return [np.concatenate([empty, *(rows[s * size : (s + 1) * size] for rows in lanes)]) for s in range(steps)]

    def sizes(self, step: int) -> list[int]:
        """Rows that each lane gives to a step of a pass."""
        if step + 1 < self.steps:
            return [self.per_lane] * self.lanes
        taken = step * self.per_lane
        lengths = [high - low for low, high in map(self._bounds, range(self.lanes))]
        return [min(max(length - taken, 0), self.per_lane) for length in lengths]


def spans(groups: Sequence[tuple[int, int]]) -> np.ndarray:
    """(first row, rows) of row groups as [G, 2]."""
    return np.array(groups, np.int64).reshape(-1, 2)
