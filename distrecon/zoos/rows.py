"""The rows that a worker has read and still needs: all of its share, or those of its window.

Both take what has been read (`put`) and give batches (`take`), which are copies of the wanted rows and cost nothing
else. `missing` says, for one window after the other, what of it has to be read: it runs ahead of the reading.

Legend: N spans of rows, R rows read at once, S rows of the worker's share, B rows of a batch, P parameters.
"""

import numpy as np

from distrecon.zoos.order import rows_of, spans

Steps = list[np.ndarray]  # rows of each step


class Held:
    """A worker's share as one array: what was read once is never read again."""

    def __init__(self, spans_N2: np.ndarray, num_parameters: int) -> None:
        """`spans_N2`: first row and rows of every piece of the share."""
        order = np.argsort(spans_N2[:, 0])
        self.first_N, rows_N = spans_N2[order].T
        self.place_N = rows_N.cumsum() - rows_N  # where each span's rows lie in the array
        self.weights_SP = np.empty((int(rows_N.sum()), num_parameters), np.float32)
        self.asked_N = np.zeros(len(rows_N), bool)

    def missing(self, spans_N2: np.ndarray) -> np.ndarray:
        """Those of a window's spans that no window before it had."""
        index = np.searchsorted(self.first_N, spans_N2[:, 0])
        new = spans_N2[~self.asked_N[index]]
        self.asked_N[index] = True
        return new

    @property
    def complete(self) -> bool:
        """Whether all has been asked for."""
        return bool(self.asked_N.all())

    def put(self, spans_N2: np.ndarray, weights_RP: np.ndarray) -> None:
        """Keeps the rows of these spans, which come one after the other."""
        begin = 0
        for place, rows in zip(self._places(spans_N2[:, 0]), spans_N2[:, 1], strict=True):
            self.weights_SP[place : place + rows] = weights_RP[begin : begin + rows]
            begin += rows

    def _places(self, row_R: np.ndarray) -> np.ndarray:
        index = np.searchsorted(self.first_N, row_R, side="right") - 1
        return self.place_N[index] + row_R - self.first_N[index]

    def begin(self, steps: Steps) -> None:
        """The rows of the next steps, which `take` then gives one by one."""
        self.steps = [self._places(rows) for rows in steps]

    def take(self, step: int) -> np.ndarray:
        """weights[B, P] of a step, in memory of its own."""
        place_B = self.steps[step]
        out_BP = np.empty((len(place_B), self.weights_SP.shape[1]), np.float32)
        return np.take(self.weights_SP, place_B, axis=0, out=out_BP, mode="clip")

    def end(self, still: np.ndarray) -> None:
        """The steps are done; `still` are the spans of the next ones."""


class Passing:
    """The rows of a window and, of the one before, what the two have in common."""

    def __init__(self, num_parameters: int) -> None:
        self.asked = spans([])
        self.blocks = [(spans([]), np.empty((0, num_parameters), np.float32))]  # what was carried over comes first

    complete = False

    def missing(self, spans_N2: np.ndarray) -> np.ndarray:
        """Those of a window's spans that the window before it did not have."""
        new = spans_N2[~np.isin(spans_N2[:, 0], self.asked[:, 0])]
        self.asked = spans_N2
        return new

    def put(self, spans_N2: np.ndarray, weights_RP: np.ndarray) -> None:
        """Takes over the rows of these spans, which come one after the other; the array is only read."""
        self.blocks.append((spans_N2, weights_RP))

    def begin(self, steps: Steps) -> None:
        """The rows of the next steps, which `take` then gives one by one."""
        spans_N2 = np.concatenate([of for of, _ in self.blocks])
        block_N = np.repeat(np.arange(len(self.blocks)), [len(of) for of, _ in self.blocks])
        start_N = np.concatenate([of[:, 1].cumsum() - of[:, 1] for of, _ in self.blocks])
        order = np.argsort(spans_N2[:, 0], kind="stable")
        row_R = np.concatenate([np.empty(0, np.int64), *steps])
        index = order[np.searchsorted(spans_N2[order, 0], row_R, side="right") - 1] if len(row_R) else row_R
        ends = np.cumsum([len(rows) for rows in steps])[:-1]
        self.block = np.split(block_N[index], ends)
        self.place = np.split(start_N[index] + row_R - spans_N2[index, 0], ends)

    def take(self, step: int) -> np.ndarray:
        """weights[B, P] of a step, in memory of its own."""
        block_B, place_B = self.block[step], self.place[step]
        weights = [block for _, block in self.blocks]
        out_BP = np.empty((len(place_B), weights[0].shape[1]), np.float32)
        main = len(weights) - 1  # nearly all lie in what was read last
        if len(weights[main]):
            np.take(weights[main], place_B, axis=0, out=out_BP, mode="clip")
        for b in np.unique(block_B[block_B != main]):
            those = np.flatnonzero(block_B == b)
            out_BP[those] = weights[b][place_B[those]]
        return out_BP

    def end(self, still: np.ndarray) -> None:
        """The steps are done; `still` are the spans of the next ones. Memory of others is let go, but for those."""
        kept = []
        for spans_N2, weights_RP in self.blocks:
            again_N = np.isin(spans_N2[:, 0], still[:, 0])
            if again_N.all():  # also the empty one in the beginning
                kept.append((spans_N2, weights_RP))
            elif again_N.any():
                start_N = spans_N2[:, 1].cumsum() - spans_N2[:, 1]
                where = rows_of(np.stack([start_N[again_N], spans_N2[again_N, 1]], 1))
                kept.append((spans_N2[again_N], weights_RP[where]))
        self.blocks = kept
