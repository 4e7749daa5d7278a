"""Probabilities as the numbers a network's last layer gave: log-odds relative to one class.

Softmax probabilities do not change when one function of x is added to all scores, so the scores are determined only up
to such a function. Here one class, the reference, scores zero everywhere: the score of class c is log p_c - log p_ref,
which is linear in the last hidden layer, with the weights W_c - W_ref. Any class would do; the one whose smallest
probability is largest loses the fewest digits. One column p, or two columns p and 1 - p, are a sigmoid's: the only
score is log p - log(1 - p).

What a probability tells depends on how it was written down. Softmax in floating point gives every class its own small
number at full relative precision, so its logarithm is good until it underflows. A sigmoid's p is as good near 0, but
near 1 has only steps of the format's spacing, and rounded answers have steps everywhere: there a score loses digits,
until at 0 or 1 it is infinite. `error` bounds that, and `known` says which answers still tell their scores.

Legend: Q queries, C columns of probabilities, O scores.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.errors import UserError

SUM = 0.005  # x columns: how far from 1 a row of probabilities may add up to, as those rounded to two decimals do
LOSS = 0.45  # share of the answers' digits that a score may lose before it counts as not known


@dataclass(frozen=True)
class Odds:
    """How to turn the rows of probabilities of one black box into scores.

    `reference` is the class that scores zero; None for a sigmoid, whose probability is `column`. The answers are
    numbers of the format `dtype`, rounded to multiples of `quantum` (0: not rounded).
    """

    columns: int
    reference: int | None
    column: int
    dtype: torch.dtype
    quantum: float

    @staticmethod
    def of(p_QC: Tensor, dtype: torch.dtype, quantum: float = 0.0) -> "Odds":
        """The way that suits the first answers. Raises UserError when they are no probabilities."""
        _check(p_QC)
        if dtype == torch.float64 and torch.equal(p_QC.float().double(), p_QC):
            dtype = torch.float32
        columns, least_C = p_QC.shape[1], p_QC.min(0).values
        sigmoid = [0] if columns == 1 else []
        if columns == 2:  # softmax rounds both columns; a sigmoid's second column is 1 minus the first, to the bit
            sigmoid = [c for c in (0, 1) if torch.equal((1 - p_QC[:, c]).to(dtype).double(), p_QC[:, 1 - c])]
        if sigmoid:
            step_C = [_made_as_rest(p_Q, dtype) for p_Q in p_QC.T]
            column = min(sigmoid, key=step_C.__getitem__)
            return Odds(columns, None, column, dtype, max(quantum, step_C[column]))
        return Odds(columns, int(least_C.argmax()), 0, dtype, quantum)

    def __call__(self, p_QC: Tensor) -> Tensor:
        """Scores [Q, O]; O = C - 1 or 1. Not finite where a probability is 0 or 1."""
        _check(p_QC)
        if self.reference is None:
            p_Q1 = p_QC[:, self.column : self.column + 1]
            return p_Q1.log() - (p_QC[:, 1 - self.column : 2 - self.column] if self.columns == 2 else 1 - p_Q1).log()
        log_QC = p_QC.log()
        return (log_QC - log_QC[:, self.reference, None])[:, self._others()]

    def error(self, p_QC: Tensor) -> Tensor:
        """A bound on the rounding errors of the scores [Q, O]."""
        eps = torch.finfo(self.dtype).eps
        own_QC = eps * (1 + p_QC.log().abs()) + self.quantum / p_QC
        if self.reference is None:
            p_Q1 = p_QC[:, self.column : self.column + 1]
            return own_QC[:, self.column : self.column + 1] + (eps + self.quantum) / (1 - p_Q1)
        return (own_QC + own_QC[:, self.reference, None])[:, self._others()]

    def known(self, p_QC: Tensor) -> Tensor:
        """[Q]: whether an answer tells its scores, to about half of the digits that the box gives."""
        format_ = torch.finfo(self.dtype)
        least_Q = p_QC.amin(1) if self.reference is not None else p_QC[:, self.column]
        sharp_QO = self.error(p_QC).nan_to_num(math.inf) <= max(format_.eps, self.quantum) ** (1 - LOSS)
        return (least_Q >= format_.tiny) & sharp_QO.all(1)

    def all_classes(self, scores_QO: Tensor) -> Tensor:
        """Scores [Q, O], or a last layer's rows [O, ...] put in columns, with the reference's zero: [Q, C]."""
        if self.reference is None:
            return scores_QO
        zero_Q1 = torch.zeros_like(scores_QO[:, :1])
        parts = (scores_QO[:, : self.reference], zero_Q1, scores_QO[:, self.reference :])
        return torch.cat(parts, dim=1)

    def of_classes(self, scores_QC: Tensor) -> Tensor:
        """The answers [Q, C] that belong to scores of all classes, or to the one of a sigmoid: the inverse."""
        if self.reference is not None:
            return torch.softmax(scores_QC, dim=1)
        p_Q1 = torch.sigmoid(scores_QC)
        if self.columns == 1:
            return p_Q1
        both = [torch.sigmoid(-scores_QC), p_Q1]
        return torch.cat(both if self.column else both[::-1], dim=1)

    def _others(self) -> list[int]:
        return [c for c in range(self.columns) if c != self.reference]


def _made_as_rest(p_Q: Tensor, dtype: torch.dtype) -> float:
    """The step of probabilities made as 1 - p, where small ones show it: those of numbers just below 1; else 0."""
    step = torch.finfo(dtype).eps / 2
    small_Q = p_Q[(p_Q > 0) & (p_Q < 0.25)]
    return step if len(small_Q) and torch.equal((small_Q / step).round() * step, small_Q) else 0.0


def are_probabilities(p_QC: Tensor) -> bool:
    """Whether rows of several columns lie between 0 and 1 and add up to 1; always false for one column."""
    return p_QC.shape[1] > 1 and bool(
        ((p_QC >= 0) & (p_QC <= 1)).all() and ((p_QC.sum(1) - 1).abs() <= SUM * p_QC.shape[1]).all()
    )


def _check(p_QC: Tensor) -> None:
    outside = int(((p_QC < 0) | (p_QC > 1)).any(1).sum())
    if outside:
        raise UserError(f"outputs='probabilities', but {outside} of {len(p_QC)} answers are not between 0 and 1")
    if p_QC.shape[1] > 1 and not are_probabilities(p_QC):
        worst = p_QC.sum(1)[(p_QC.sum(1) - 1).abs().argmax()]
        raise UserError(f"outputs='probabilities', but the answers do not add up to 1: one adds up to {worst:.6g}")
