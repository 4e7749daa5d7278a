"""The network under examination, seen only through its answers: checked, counted, kept, within a budget.

Legend: Q queries, I inputs, O outputs.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.thresholds import REPEATABLE

Function = Callable[[Tensor], Tensor]  # [Q, I] -> [Q, O]
NOISE_SPACING = 1e-4  # of the sixth differences: h^6 is far below rounding, h far above the inputs' rounding in float32
NOISE_POINTS = 24
NORMAL_MEDIAN = 0.6745  # of the absolute value of a standard normal number
LEAST_KEPT = 1024  # rows of answers that there is room for at first; the room doubles


class BlackBox:
    """A function [Q, I] -> [Q, O] with its answers in float64.

    Raises UserError when the answers are not tensors of shape [Q, O], are not finite, differ when asked again, or when
    `budget` queries (0: no limit) are not enough. A repeated query costs nothing. `noise_O` is the standard deviation
    of each output's rounding noise at the inputs `noise_QI`, `noise` their quadratic mean.
    """

    def __init__(self, function: Function, input_size: int, budget: int = 0) -> None:
        if input_size < 1:
            raise UserError(f"input_size must be at least 1, not {input_size}")
        self.function, self.inputs, self.budget = function, input_size, budget
        self.queries = 0
        self._row: dict[bytes, int] = {}  # of a query's hash, among the kept rows
        self._kept = np.empty((0, 0))  # queries and answers side by side; the first `_count` rows are filled
        self._count = 0
        self.outputs = 0
        probe_QI = torch.randn(16, input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.outputs = self._ask(probe_QI).shape[1]
        self.noise_QI, self.noise_O = self._noise_level()
        self.noise = float(self.noise_O.square().mean().sqrt())
        self._check_repeatable(probe_QI)

    def __call__(self, x_QI: Tensor) -> Tensor:
        """Answers y[Q, O]; only rows never asked before are counted and passed on."""
        if not len(x_QI):
            return torch.empty(0, self.outputs, dtype=torch.float64)
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in x_QI.contiguous().numpy()]
        fresh = {key: i for i, key in enumerate(keys) if key not in self._row}
        if fresh:
            first = self._count
            self._ask(x_QI[list(fresh.values())])
            self._row.update(zip(fresh, range(first, self._count), strict=True))
        return torch.from_numpy(self._kept[[self._row[key] for key in keys], self.inputs :])

    def asked(self) -> tuple[Tensor, Tensor]:
        """All queries x[Q, I] so far and their answers y[Q, O], in the order in which they were made (views)."""
        kept = torch.from_numpy(self._kept[: self._count])
        return kept[:, : self.inputs], kept[:, self.inputs :]

    def left(self) -> float:
        """Queries left in the budget; infinite without one."""
        return self.budget - self.queries if self.budget else math.inf

    def _ask(self, x_QI: Tensor) -> Tensor:
        if self.budget and self.queries + len(x_QI) > self.budget:
            raise UserError(
                f"the query budget of {self.budget} is too small: {self.queries} spent, {len(x_QI)} more are needed"
            )
        with torch.no_grad():
            y = self.function(x_QI)
        if not isinstance(y, Tensor) or y.ndim != 2 or y.shape != (len(x_QI), self.outputs or y.shape[1]):
            shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            wanted = f"[{len(x_QI)}, {self.outputs or 'O'}]"
            raise UserError(f"the teacher answered {list(x_QI.shape)} with {shape}, not {wanted}")
        y = y.detach().to("cpu", torch.float64)
        if not torch.isfinite(y).all():
            bad = int((~torch.isfinite(y)).any(1).sum())
            raise UserError(f"the teacher answered {bad} of {len(x_QI)} queries with values that are not finite")
        self.queries += len(x_QI)
        self._keep(x_QI, y)
        return y

    def _keep(self, x_QI: Tensor, y_QO: Tensor) -> None:
        end = self._count + len(x_QI)
        if end > len(self._kept):
            grown = np.empty((max(end, LEAST_KEPT, 2 * len(self._kept)), self.inputs + y_QO.shape[1]))
            if self._count:
                grown[: self._count] = self._kept[: self._count]
            self._kept = grown
        self._kept[self._count : end, : self.inputs] = x_QI
        self._kept[self._count : end, self.inputs :] = y_QO
        self._count = end

    def _check_repeatable(self, x_QI: Tensor) -> None:
        first, second = self._ask(x_QI), self._ask(x_QI)
        difference = (first - second).abs().max().item()
        if difference > REPEATABLE * first.abs().max().item():
            raise UserError(f"the teacher is not deterministic: the same queries gave answers {difference:.1e} apart")

    def _noise_level(self) -> tuple[Tensor, Tensor]:
        """Where the rounding noise was measured, [Q, I], and its standard deviation there, [O].

        By sixth differences on short lines (Moré and Wild 2011). About 1e-16 of the answers for a float64 teacher and
        1e-7 for a float32 one; it bounds what can be recovered.
        """
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(NOISE_POINTS, 1, self.inputs, generator=generator, dtype=torch.float64)
        direction = torch.randn(NOISE_POINTS, 1, self.inputs, generator=generator, dtype=torch.float64)
        steps = torch.arange(7, dtype=torch.float64)[None, :, None] * NOISE_SPACING
        x_QI = (start + steps * direction / direction.norm(dim=2, keepdim=True)).flatten(0, 1)
        differences = torch.diff(self._ask(x_QI).reshape(NOISE_POINTS, 7, -1), n=6, dim=1)[:, 0]
        return x_QI, differences.abs().median(0).values / (NORMAL_MEDIAN * math.sqrt(924))
