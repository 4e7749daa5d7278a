"""Which rows lie in which row group, as arrays: for zoos of very many.

Legend: G row groups, N spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Layout:
    """All row groups in the order of their rows, as arrays [G]; `split_G` counts in the order of `splits`."""

    splits: tuple[str, ...]
    part_G: np.ndarray  # index into the zoo's parts
    group_G: np.ndarray  # row group in that part's file
    first_G: np.ndarray  # row in the zoo
    rows_G: np.ndarray
    split_G: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Any], splits: tuple[str, ...]) -> "Layout":
        """Of the parts of a zoo (`format.Part`)."""
        part, group, rows, split = ([np.empty(0, np.int64)] for _ in range(4))
        for number, each in enumerate(parts):
            sizes = [(splits.index(name), count) for name, count in each.states.items() if count]
            groups = [-(-count // each.group_rows) for _, count in sizes]
            filled = np.full(sum(groups), each.group_rows)
            last = np.cumsum(groups, dtype=np.int64) - 1  # of each split, with what is left
            filled[last] = [count - (n - 1) * each.group_rows for (_, count), n in zip(sizes, groups, strict=True)]
            part.append(np.full(sum(groups), number))
            group.append(np.arange(each.group, each.group + sum(groups)))
            rows.append(filled)
            split.append(np.repeat([place for place, _ in sizes], groups).astype(np.int64))
        rows_G = np.concatenate(rows)
        return cls(
            splits,
            np.concatenate(part),
            np.concatenate(group),
            np.cumsum(rows_G) - rows_G,
            rows_G,
            np.concatenate(split).astype(np.int8),
        )

    @cached_property
    def ends_G(self) -> np.ndarray:
        return self.first_G + self.rows_G

    def of_split(self, split: str | None) -> np.ndarray:
        """Positions of a split's row groups (None: of all)."""
        return (
            np.arange(len(self.rows_G)) if split is None else np.flatnonzero(self.split_G == self.splits.index(split))
        )

    def spans(self, split: str | None, most: int = 0) -> np.ndarray:
        """(first row, rows) of the split's row groups [N, 2], neighbours joined while they have at most `most` rows."""
        chosen = self.of_split(split)
        spans_N2 = np.stack([self.first_G[chosen], self.rows_G[chosen]], 1)
        if not most or not len(spans_N2):
            return spans_N2
        joined = [spans_N2[0].tolist()]
        for first, rows in spans_N2[1:].tolist():
            last = joined[-1]
            if last[0] + last[1] == first and last[1] + rows <= most:
                last[1] += rows
            else:
                joined.append([first, rows])
        return np.array(joined, np.int64)

    def groups_of(self, spans_N2: np.ndarray) -> np.ndarray:
        """Positions of the row groups that the spans touch, [N] spans one after the other."""
        low = np.searchsorted(self.ends_G, spans_N2[:, 0], side="right")
        high = np.searchsorted(self.ends_G, spans_N2.sum(1) - 1, side="right") + 1
        return np.concatenate([np.empty(0, np.int64), *map(np.arange, low, high)])
