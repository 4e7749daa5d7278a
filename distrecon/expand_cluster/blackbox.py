"""The network under examination, seen only through its answers: checked, counted, cached, within a budget.

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


class BlackBox:
    """A function [Q, I] -> [Q, O] with its answers in float64.

    Raises UserError when the answers are not tensors of shape [Q, O], are not finite, differ when asked again, or when
    `budget` queries (0: no limit) are not enough. A repeated query costs nothing.
    """

    def __init__(self, function: Function, input_size: int, budget: int = 0) -> None:
        if input_size < 1:
            raise UserError(f"input_size must be at least 1, not {input_size}")
        self.function, self.inputs, self.budget = function, input_size, budget
        self.queries = 0
        self._answers: dict[bytes, np.ndarray] = {}
        self.outputs = 0
        probe_QI = torch.randn(16, input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.outputs = self._ask(probe_QI).shape[1]
        self.noise = self._noise_level()
        self._check_repeatable(probe_QI)

    def __call__(self, x_QI: Tensor) -> Tensor:
        """Answers y[Q, O]; only rows never asked before are counted and passed on."""
        if not len(x_QI):
            return torch.empty(0, self.outputs, dtype=torch.float64)
        rows = x_QI.contiguous().numpy()
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        fresh = {key: i for i, key in enumerate(keys) if key not in self._answers}
        if fresh:
            answers = self._ask(x_QI[list(fresh.values())]).numpy()
            self._answers.update(zip(fresh, answers, strict=True))
        return torch.from_numpy(np.stack([self._answers[key] for key in keys]))

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
        return y

    def _check_repeatable(self, x_QI: Tensor) -> None:
        first, second = self._ask(x_QI), self._ask(x_QI)
        difference = (first - second).abs().max().item()
        if difference > REPEATABLE * first.abs().max().item():
            raise UserError(f"the teacher is not deterministic: the same queries gave answers {difference:.1e} apart")

    def _noise_level(self) -> float:
        """Standard deviation of the answers' rounding noise, by sixth differences on short lines (Moré and Wild 2011).

        About 1e-16 of the answers for a float64 teacher and 1e-7 for a float32 one; it bounds what can be recovered.
        """
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(NOISE_POINTS, 1, self.inputs, generator=generator, dtype=torch.float64)
        direction = torch.randn(NOISE_POINTS, 1, self.inputs, generator=generator, dtype=torch.float64)
        steps = torch.arange(7, dtype=torch.float64)[None, :, None] * NOISE_SPACING
        answers = self._ask((start + steps * direction / direction.norm(dim=2, keepdim=True)).flatten(0, 1))
        differences = torch.diff(answers.reshape(NOISE_POINTS, 7, -1), n=6, dim=1)[:, 0]
        return float(differences.square().mean(1).sqrt().median()) / math.sqrt(924)
