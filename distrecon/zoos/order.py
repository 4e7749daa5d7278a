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
        return rows_of(self.lane_spans(lane))

    def lane_spans(self, lane: int) -> np.ndarray:
        """(first row, rows) [L, 2] of the pieces of a lane: row groups, cut where it begins and ends."""
        low, high = self._bounds(lane)
        ends_G = self._ends_G
        if low == high:
            return np.empty((0, 2), np.int64)
        begin, end = _touching(ends_G, low, high)
        spans_L2 = self.spans_G2[begin:end].copy()
        spans_L2[-1, 1] -= ends_G[end - 1] - high
        cut = low - (ends_G[begin] - self.spans_G2[begin, 1])
        spans_L2[0] += [cut, -cut]
        return spans_L2

    @cached_property
    def _ends_G(self) -> np.ndarray:
        return self.spans_G2[:, 1].cumsum()

    @cached_property
    def _passes(self) -> dict[int, tuple[int, np.ndarray, np.ndarray]]:
        """By lane, the pass that was asked for last: its number, its pieces in order, and where each ends."""
        return {}

    def _pass(self, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        known = self._passes.get(lane)
        if known is None or known[0] != number:
            spans_L2 = self.lane_spans(lane)
            spans_L2 = spans_L2[np.random.default_rng([*self.key, number, lane]).permutation(len(spans_L2))]
            self._passes[lane] = known = number, spans_L2, spans_L2[:, 1].cumsum()
        return known[1:]

    def _touched(self, lane: int, number: int, window: int) -> tuple[np.ndarray, int, int]:
        """The pieces that a window takes a lane's rows from, and from where to where in their rows."""
        spans_L2, ends_L = self._pass(lane, number)
        size = self.window_steps * self.per_lane
        total = int(ends_L[-1]) if len(ends_L) else 0
        low, high = min(window * size, total), min((window + 1) * size, total)
        if low == high:
            return spans_L2[:0], 0, 0
        begin, end = _touching(ends_L, low, high)
        before = int(ends_L[begin] - spans_L2[begin, 1])
        return spans_L2[begin:end], low - before, high - before

    def lane_window(self, lane: int, number: int, window: int) -> np.ndarray:
        """Rows [S] that a lane gives to the steps of one window of pass `number`, in order."""
        spans_N2, low, high = self._touched(lane, number, window)
        return np.random.default_rng([*self.key, number, lane, window]).permutation(rows_of(spans_N2)[low:high])

    def window_spans(self, number: int, window: int, rank: int, world_size: int) -> np.ndarray:
        """The pieces (first row, rows) [N, 2] that a worker's rows of a window lie in; the next window's may be some
        of them again."""
        lanes = self.owned(rank, world_size)
        return np.concatenate([spans([]), *(self._touched(lane, number, window)[0] for lane in lanes)])

    def window(self, number: int, window: int, rank: int, world_size: int) -> list[np.ndarray]:
        """The rows of each step of a window for one worker, in batch order."""
        lanes = [self.lane_window(lane, number, window) for lane in self.owned(rank, world_size)]
        size, empty = self.per_lane, np.empty(0, np.int64)
        steps = min(self.window_steps, self.steps - window * self.window_steps)
        return [np.concatenate([empty, *(rows[s * size : (s + 1) * size] for rows in lanes)]) for s in range(steps)]

    def share(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Rows of a step's global batch, and how many of them the workers before this one have."""
        owned = self.owned(rank, world_size)
        if step + 1 < self.steps:
            return self.batch_size, owned.start * self.per_lane
        sizes = self.sizes(step)
        return sum(sizes), sum(sizes[: owned.start])

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


def _touching(ends_N: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """From which to which of the pieces that end there the places low .. high - 1 lie."""
    begin, last = np.searchsorted(ends_N, [low, high - 1], side="right").tolist()
    return begin, last + 1


def rows_of(spans_N2: np.ndarray) -> np.ndarray:
    """The rows of some spans, one after the other."""
    ends_N = spans_N2[:, 1].cumsum()
    total = int(ends_N[-1]) if len(ends_N) else 0
    return np.arange(total) + np.repeat(spans_N2[:, 0] - (ends_N - spans_N2[:, 1]), spans_N2[:, 1])
