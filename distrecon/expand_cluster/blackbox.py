"""The black box as the method asks it: answers counted, remembered, within a budget, and their noise measured.

Legend: Q queries, I inputs, O outputs.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.standard import Standard
from distrecon.expand_cluster.symptoms import NOISE_LINES, NOISE_SPACING, rounding
from distrecon.expand_cluster.thresholds import BOUNDED

Function = Callable[[Tensor], Tensor]  # [Q, I] -> [Q, O], float64 tensors (see answers.py)
CLOSER = 8  # times that a query is moved half way to the centre because its answer tells no scores
LEAST_ROWS = 1024  # of memory at first
ROOM = 0.99  # share of the domain in which lines end, so that differences round them stay inside


class OutOfQueries(UserError):
    """The query budget does not allow the next queries."""


class Memory:
    """A function of x[Q, I] whose answers are counted and remembered; a repeated query costs nothing.

    `budget`: queries that may be made (0: no limit). Raises OutOfQueries when it is too small for the next ones.
    """

    def __init__(self, function: Function, budget: int = 0) -> None:
        self.function, self.budget, self.queries = function, budget, 0
        self._rows: dict[bytes, int] = {}
        self._x_QI, self._y_QO = np.empty((0, 0)), np.empty((0, 0))

    def __call__(self, x_QI: Tensor) -> Tensor:
        """Answers y[Q, O]; only rows never asked before are counted and passed on."""
        rows = x_QI.contiguous().numpy()
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        fresh = {key: i for i, key in enumerate(keys) if key not in self._rows}
        if fresh:
            if len(fresh) > self.left():
                needed = f"{self.queries} spent, {len(fresh)} more are needed"
                raise OutOfQueries(f"the query budget of {self.budget} is too small: {needed}")
            asked = list(fresh.values())
            self._keep(rows[asked], self.function(x_QI[asked]).numpy())
            self._rows.update(zip(fresh, range(self.queries, self.queries + len(fresh)), strict=True))
            self.queries += len(fresh)
        return torch.from_numpy(self._y_QO[[self._rows[key] for key in keys]])

    def asked(self) -> tuple[Tensor, Tensor]:
        """All queries x[Q, I] and answers y[Q, O] so far, in the order in which they were asked."""
        return torch.from_numpy(self._x_QI[: self.queries]), torch.from_numpy(self._y_QO[: self.queries])

    def left(self) -> float:
        """Queries left in the budget; infinite without one."""
        return self.budget - self.queries if self.budget else math.inf

    def _keep(self, x_QI: np.ndarray, y_QO: np.ndarray) -> None:
        end = self.queries + len(x_QI)
        if end > len(self._x_QI):
            room = max(2 * len(self._x_QI), end, LEAST_ROWS)
            more_x, more_y = np.empty((room, x_QI.shape[1])), np.empty((room, y_QO.shape[1]))
            if self.queries:
                more_x[: self.queries], more_y[: self.queries] = self._x_QI[: self.queries], self._y_QO[: self.queries]
            self._x_QI, self._y_QO = more_x, more_y
        self._x_QI[self.queries : end], self._y_QO[self.queries : end] = x_QI, y_QO


class BlackBox:
    """What the method asks: a function of u[Q, I] that gives y[Q, O], both float64.

    Without `standard` these are the black box's own inputs and answers, else standard ones (see standard.py). `noise_O`
    is the standard deviation of each output's rounding noise, measured unless it is given: about 1e-16 of the answers
    of a float64 function and 1e-7 of a float32 one; it bounds what can be recovered. It is that of inputs such as
    `noise_QI`. `rounded_O`: which outputs are multiples of a quantum, so that this noise is bounded: by half of it, √3
    standard deviations. Raises OutOfQueries.
    """

    def __init__(
        self,
        function: Function | Memory,
        input_size: int,
        budget: int = 0,
        standard: Standard | None = None,
        noise_O: Tensor | None = None,
        rounded_O: Tensor | None = None,
    ) -> None:
        self.memory = function if isinstance(function, Memory) else Memory(function, budget)
        self.inputs, self.standard = input_size, standard
        generator = torch.Generator().manual_seed(1)
        self.noise_QI = self.place(torch.randn(NOISE_LINES, input_size, generator=generator, dtype=torch.float64))
        if noise_O is None:
            noise_O = rounding(self, self.place, input_size, torch.Generator().manual_seed(1), NOISE_SPACING)
        self.rounded_O = torch.zeros(len(noise_O), dtype=torch.bool) if rounded_O is None else rounded_O
        self.outputs, self.noise_O, self.noise = len(noise_O), noise_O, float(noise_O.square().mean().sqrt())

    def __call__(self, u_QI: Tensor) -> Tensor:
        if not len(u_QI):
            return torch.empty(0, self.outputs, dtype=torch.float64)
        if self.standard is None:
            return self.memory(u_QI)
        return self.standard.scores(self.memory(self.standard.inputs(u_QI)))

    def told(self, u_QI: Tensor) -> Tensor:
        """y[Q, O]; NaN outside the domain, where nothing is asked, and where an answer tells no scores."""
        if self.standard is None:
            return self(u_QI)
        y_QO = torch.full((len(u_QI), self.outputs), math.nan, dtype=torch.float64)
        inside_Q = self.standard.around.holds(u_QI)
        if inside_Q.any():
            answers_QC = self.memory(self.standard.inputs(u_QI[inside_Q]))
            known_Q1 = self.standard.known(answers_QC)[:, None]
            y_QO[inside_Q] = self.standard.scores(answers_QC).where(known_Q1, math.nan)
        return y_QO

    def error(self, y_QO: Tensor) -> Tensor:
        """Bounds [Q, O] of the rounding that answers y have besides the noise: that of scores of probabilities."""
        return torch.zeros_like(y_QO) if self.standard is None else self.standard.error(y_QO)

    @property
    def noise_due_O(self) -> Tensor:
        """What of the noise a verdict goes by: BOUNDED of that of multiples of a quantum."""
        return torch.where(self.rounded_O, BOUNDED, 1.0) * self.noise_O

    def error_due(self, y_QO: Tensor) -> Tensor:
        """What of `error` a verdict goes by: likewise, where probabilities are multiples of a quantum."""
        odds = self.standard.odds if self.standard is not None else None
        return self.error(y_QO) * (BOUNDED if odds is not None and odds.quantum else 1.0)

    def place(self, u_QI: Tensor, margin: float = 0.0) -> Tensor:
        """The same queries, moved inside the domain, and towards the centre where their answers tell no scores."""
        if self.standard is None:
            return u_QI
        u_QI = self.standard.around.inside(u_QI, margin)
        for _ in range(CLOSER if self.standard.odds is not None else 0):
            unknown_Q = ~self.standard.known(self.memory(self.standard.inputs(u_QI)))
            if not unknown_Q.any():
                break
            u_QI = torch.where(unknown_Q[:, None], u_QI / 2, u_QI)
        return u_QI

    def pulled(self, u_QI: Tensor) -> Tensor:
        """The same queries moved straight towards the centre until they lie inside the domain, with room round them."""
        return u_QI if self.standard is None else self.standard.around.pulled(u_QI, ROOM)

    def asked(self) -> tuple[Tensor, Tensor]:
        """All queries u[Q, I] and their answers y[Q, O] so far that are the network's and tell scores."""
        x_QI, y_QO = self.memory.asked()
        if self.standard is None:
            return x_QI, y_QO
        told_Q = self._told(x_QI, y_QO)
        if not told_Q.all():  # else nothing is copied: there may be GiB
            x_QI, y_QO = x_QI[told_Q], y_QO[told_Q]
        return self.standard.around.standard(x_QI), self.standard.scores(y_QO)

    @property
    def reach(self) -> float:
        """The largest norm |u| of queries that are meant to be made; infinite where the probes may go anywhere.

        The examination looks farther than where probabilities still tell scores.
        """
        if self.standard is None or self.standard.limits is None:
            return math.inf
        around = self.standard.around
        return float(torch.maximum(around.standard(around.low_I).abs(), around.standard(around.high_I).abs()).norm())

    def saturated(self) -> tuple[Tensor, Tensor]:
        """Likewise those of which only the probabilities p[Q, C] count: so near 0 or 1 that they tell no scores."""
        x_QI, p_QC = self.memory.asked()
        if self.standard is None:
            return x_QI[:0], p_QC[:0]
        only_Q = ~self.standard.known(p_QC) & self.standard.counts(x_QI)
        return self.standard.around.standard(x_QI[only_Q]), p_QC[only_Q]

    @property
    def untold(self) -> int:
        """How many answers `asked` leaves out."""
        return self.queries - int(self._told(*self.memory.asked()).sum()) if self.standard is not None else 0

    def _told(self, x_QI: Tensor, y_QO: Tensor) -> Tensor:
        """[Q]: which of the black box's own answers are the network's and tell scores."""
        assert self.standard is not None
        return self.standard.known(y_QO) & self.standard.counts(x_QI)

    @property
    def queries(self) -> int:
        """Different queries made so far."""
        return self.memory.queries

    @property
    def budget(self) -> int:
        return self.memory.budget

    def left(self) -> float:
        """Queries left in the budget; infinite without one."""
        return self.memory.left()
