"""Standard inputs and standard scores, which the method works in, and the way back to the black box's own.

Standard inputs u = (x - centre) / scale (see surroundings.py). Standard scores are the answers, or the scores of
probabilities (see odds.py), minus their means and divided by their standard deviations at standard inputs, so that
every output counts alike, whatever its size.

Legend: Q queries, I inputs, O outputs, C columns of probabilities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.odds import Odds
from distrecon.expand_cluster.surroundings import Surroundings
from distrecon.expand_cluster.weights import Weights


@dataclass(frozen=True)
class Standard:
    """Centre, scale and domain of the inputs, mean and scale of the scores; `odds` None: the answers are the scores.

    `limits` has the domain outside of which answers are not the network's, None: the domain of `around`. That may be
    smaller, as where most probabilities are near 0 or 1 there is little to ask.
    """

    around: Surroundings
    odds: Odds | None
    mean_O: Tensor
    scale_O: Tensor
    limits: Surroundings | None = None

    def inputs(self, u_QI: Tensor) -> Tensor:
        """The black box's own inputs x of standard ones."""
        return self.around.inputs(u_QI)

    def scores(self, y_QC: Tensor) -> Tensor:
        """Standard scores [Q, O] of the black box's own answers."""
        return ((y_QC if self.odds is None else self.odds(y_QC)) - self.mean_O) / self.scale_O

    def error(self, scores_QO: Tensor) -> Tensor:
        """Bounds [Q, O] of the rounding that standard scores have because they come from probabilities; else 0."""
        if self.odds is None:
            return torch.zeros_like(scores_QO)
        own_QO = scores_QO * self.scale_O + self.mean_O
        return self.odds.error(self.odds.of_classes(self.odds.all_classes(own_QO))) / self.scale_O

    def known(self, y_QC: Tensor) -> Tensor:
        """[Q]: which answers tell their scores; all but probabilities near 0 or 1."""
        return torch.ones(len(y_QC), dtype=torch.bool) if self.odds is None else self.odds.known(y_QC)

    def counts(self, x_QI: Tensor) -> Tensor:
        """[Q]: whether the answers to the black box's own inputs are the network's."""
        limits = self.limits or self.around
        return ((x_QI >= limits.low_I) & (x_QI <= limits.high_I)).all(1)

    def probabilities(self, scores_QO: Tensor, error_QO: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [Q, C] of standard scores, and what the scores' error and rounding make of them."""
        assert self.odds is not None
        p_QC = self.odds.of_classes(self.odds.all_classes(scores_QO * self.scale_O + self.mean_O))
        moved_QC = 2 * (error_QO * self.scale_O).amax(1, keepdim=True) * p_QC * (1 - p_QC)
        return p_QC, moved_QC + torch.finfo(self.odds.dtype).eps + self.odds.quantum

    def own(self, weights: Weights) -> Weights:
        """Weights for standard inputs and scores as weights for the black box's own: one output for every class.

        Those of convolutions need inputs of one scale and centre 0 (`Surroundings.uniform`).
        """
        (w, b), *rest = weights
        if w.ndim > 2:
            *hidden, (last_w, last_b) = [(w / self.around.scale_I[0], b), *rest]
        else:
            w = w / self.around.scale_I
            *hidden, (last_w, last_b) = [(w, b - w @ self.around.centre_I), *rest]
        last_w, last_b = self.scale_O[:, None] * last_w, self.scale_O * last_b + self.mean_O
        if self.odds is not None:
            last_w, last_b = self.odds.all_classes(last_w.T).T, self.odds.all_classes(last_b[None])[0]
        return [*hidden, (last_w, last_b)]
