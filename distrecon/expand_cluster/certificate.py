"""What a comparison of a network with a black box's answers shows: how far they agree, where, and what could hide.

An answer and the network's output differ by rounding and by the fit's own error, and both grow with the terms that the
output is the sum of. So a disagreement counts in units of what is due at its input: `Tolerance.unit_O` at ordinary
inputs and more, in proportion to the terms, where these are larger.

Legend: Q queries, I inputs, O outputs.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distrecon.expand_cluster.standard import Standard
from distrecon.expand_cluster.thresholds import AGREEMENT, AGREEMENT_WORST
from distrecon.expand_cluster.weights import Weights, network
from distrecon.nets.activations import activation as find_activation

NUMBERS_AT_ONCE = 4_000_000  # of one layer's values, when many answers are compared
RULE_OF_THREE = 3.0  # n draws without an event: with 95 % confidence it has a probability below 3 / n


@dataclass(frozen=True)
class Tolerance:
    """The disagreement that is due, in the answers' own unit: `unit_O` where the terms have the size `terms_O`.

    `error` bounds the rounding of answers y[Q, O] that comes on top: that of scores of probabilities.
    """

    unit_O: Tensor
    terms_O: Tensor
    error: Callable[[Tensor], Tensor] = torch.zeros_like

    def at(self, terms_QO: Tensor, y_QO: Tensor) -> Tensor:
        """What is due at answers y whose terms have these sizes: in proportion, but never less than `unit_O`."""
        return self.unit_O * (terms_QO / self.terms_O).clamp(min=1.0) + self.error(y_QO)


@dataclass(frozen=True)
class Comparison:
    """A network beside `count` answers: for each output the largest |difference|, and its largest and root mean square
    in units of what is due; for each answer the largest over its outputs.
    """

    largest_O: Tensor
    ratio_O: Tensor
    mean_ratio_O: Tensor
    ratio_Q: Tensor

    @property
    def count(self) -> int:
        """Number of answers compared."""
        return len(self.ratio_Q)

    @property
    def agrees_O(self) -> Tensor:
        """Whether each output agrees, on the whole and at every single answer; numbers that are not finite do not."""
        return (self.mean_ratio_O <= AGREEMENT) & (self.ratio_O <= AGREEMENT_WORST)

    @property
    def contradicted_Q(self) -> Tensor:
        """Which single answers contradict the network."""
        return ~(self.ratio_Q <= AGREEMENT_WORST)


@dataclass(frozen=True)
class Certificate:
    """What a verdict rests on; plain numbers, so that `dataclasses.asdict` of it is JSON.

    `lowest`, `highest` [I] and `farthest` (a bound of the Euclidean norm) say where the answers compared were
    asked. `given` of them are all earlier ones of the run (0: the fit was not exact, and only fresh ones were
    compared); `fresh` had no part in the fit. `not_compared` others tell no scores: probabilities so near 0 or 1
    that only they themselves were compared, and answers from outside the domain. What differs from the network on
    more than `hidden_share` of the inputs from which fresh queries are drawn has been met, with a confidence of 95
    % (rule of three).

    Of each output [O], in the answers' own unit: `noise` is the standard deviation of its rounding, `spread` its own
    standard deviation at the training queries, `terms` the size of its terms there; `allowed` is the largest
    disagreement allowed where the terms are no larger, else more in proportion; `worst` the largest disagreement found,
    `worst_share` the largest as a share of what is allowed at its input, `mean_share` the root mean square of all as a
    share of what that may be; `smallest_seen` the contribution (root mean square) from which on a missing neuron shows.
    """

    lowest: list[float]
    highest: list[float]
    farthest: float
    given: int
    fresh: int
    not_compared: int
    noise: list[float]
    spread: list[float]
    terms: list[float]
    allowed: list[float]
    worst: list[float]
    worst_share: list[float]
    mean_share: list[float]
    smallest_seen: list[float]
    hidden_share: float

    def own(self, standard: Standard) -> "Certificate":
        """The same in the black box's own inputs and answers (or scores of its probabilities)."""
        around, scale_O = standard.around, standard.scale_O
        low_I, high_I = (around.inputs(torch.tensor([x], dtype=torch.float64))[0] for x in (self.lowest, self.highest))
        amounts = ("noise", "spread", "terms", "allowed", "worst", "smallest_seen")
        values: dict[str, Any] = {
            name: (scale_O * torch.tensor(getattr(self, name), dtype=torch.float64)).tolist() for name in amounts
        }
        farthest = float(torch.maximum(low_I.abs(), high_I.abs()).norm())
        return dataclasses.replace(self, lowest=low_I.tolist(), highest=high_I.tolist(), farthest=farthest, **values)

    def metrics(self) -> dict[str, float]:
        """The few numbers that go to summary.json and MLflow; disagreements relative to the outputs' spreads."""
        return {
            "recover/answers_compared": self.given + self.fresh,
            "recover/answers_not_compared": self.not_compared,
            "recover/worst_disagreement": max(w / s for w, s in zip(self.worst, self.spread, strict=True)),
            "recover/smallest_seen": max(c / s for c, s in zip(self.smallest_seen, self.spread, strict=True)),
            "recover/hidden_share": self.hidden_share,
        }

    def lines(self) -> list[str]:
        """For a report."""
        low, high = min(self.lowest), max(self.highest)
        metrics = self.metrics()
        outputs = zip(self.worst, self.worst_share, strict=True)
        worst, share = max(outputs, key=lambda pair: pair[1])
        left_out = f"; {self.not_compared} others tell no scores" if self.not_compared else ""
        return [
            f"compared     {self.given} answers of the run and {self.fresh} fresh ones, inputs from {low:.4g} to "
            f"{high:.4g} (norm at most {self.farthest:.4g}){left_out}",
            f"disagreement at most {metrics['recover/worst_disagreement']:.1e} of an output's deviation; "
            f"at the worst place {worst:.1e}, {100 * share:.3g} % of what rounding and fit allow there",
            f"unseen       contributions below {metrics['recover/smallest_seen']:.1e} of an output's deviation; "
            f"what lies on less than {100 * self.hidden_share:.3g} % of the inputs drawn (at 95 % confidence)",
        ]


def outputs_and_terms(weights: Weights, activation: str, x_QI: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs y[Q, O] and the size of their terms [Q, O].

    That size is by how much an output can change, to first order, when every input, weight, bias and activation changes
    by 100 %; times 1e-16 it bounds the rounding of float64 (running error analysis: Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, section 3.3).
    """
    act = find_activation(activation)
    hidden, size = x_QI, x_QI.abs()
    for w, b in weights[:-1]:
        before = torch.addmm(b, hidden, w.T)
        size = torch.addmm(b.abs(), hidden.abs() + size, w.abs().T)
        hidden = act(before)
        if act.symmetry != "scaled":  # else its slope is at most 1, and a kink may lie within the rounding
            size = act.derivative(before).abs() * size
        size = size + hidden.abs()
    w, b = weights[-1]
    return torch.addmm(b, hidden, w.T), torch.addmm(b.abs(), hidden.abs() + size, w.abs().T)


class Network(Protocol):
    """What can be compared with answers."""

    @property
    def widest(self) -> int:
        """Numbers of its largest intermediate result for one query."""

    def outputs_and_terms(self, x_QI: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs y[Q, O] and the size of their terms [Q, O] (see `outputs_and_terms`)."""


@dataclass(frozen=True)
class Dense:
    """A network of dense layers."""

    weights: Weights
    activation: str

    @property
    def widest(self) -> int:
        return max(max(w.shape) for w, _ in self.weights)

    def __call__(self, x_QI: Tensor) -> Tensor:
        return network(self.weights, self.activation)(x_QI)

    def outputs_and_terms(self, x_QI: Tensor) -> tuple[Tensor, Tensor]:
        return outputs_and_terms(self.weights, self.activation, x_QI)


def compare(found: Network, x_QI: Tensor, y_QO: Tensor, tolerance: Tolerance, reach: float = math.inf) -> Comparison:
    """The network beside the answers y[Q, O], in parts of bounded memory.

    `reach` is the norm up to which a fit may have been determined: its error is taken to grow in proportion beyond.
    """
    rows = max(1, NUMBERS_AT_ONCE // found.widest)
    outputs = y_QO.shape[1]
    largest_O, ratio_O, sum_O = torch.zeros(3, outputs, dtype=torch.float64)
    ratios = []
    for x, y in zip(x_QI.split(rows), y_QO.split(rows), strict=True):
        out_QO, terms_QO = found.outputs_and_terms(x)
        error_QO = (out_QO - y).abs().nan_to_num(torch.inf)
        farther_Q1 = (x.norm(dim=1, keepdim=True) / reach).clamp(min=1.0)
        ratio_QO = (error_QO / (farther_Q1 * tolerance.at(terms_QO, y))).nan_to_num(torch.inf)
        largest_O = torch.maximum(largest_O, error_QO.amax(0))
        ratio_O = torch.maximum(ratio_O, ratio_QO.amax(0))
        sum_O = sum_O + ratio_QO.square().sum(0)
        ratios.append(ratio_QO.amax(1))
    return Comparison(largest_O, ratio_O, (sum_O / len(x_QI)).sqrt(), torch.cat(ratios))


def contradicted_probabilities(
    found: Network, standard: Standard, x_QI: Tensor, p_QC: Tensor, tolerance: Tolerance
) -> Tensor:
    """[Q]: which probabilities, of those that tell no scores, are not the network's; numbers not finite contradict."""
    if not len(x_QI):
        return torch.zeros(0, dtype=torch.bool)
    rows, of_terms = max(1, NUMBERS_AT_ONCE // found.widest), dataclasses.replace(tolerance, error=torch.zeros_like)
    parts = []
    for x, p in zip(x_QI.split(rows), p_QC.split(rows), strict=True):
        out_QO, terms_QO = found.outputs_and_terms(x)
        own_QC, error_QC = standard.probabilities(out_QO, of_terms.at(terms_QO, out_QO))
        parts.append(~((own_QC - p).abs() <= AGREEMENT_WORST * error_QC).all(1))
    return torch.cat(parts)


def certify(
    comparison: Comparison,
    tolerance: Tolerance,
    x_QI: Tensor,
    fresh: int,
    noise_O: Tensor,
    spread_O: Tensor,
    not_compared: int = 0,
) -> Certificate:
    """The certificate of a comparison at the inputs x[Q, I], of which `fresh` had no part in the fit."""
    return Certificate(
        lowest=x_QI.amin(0).tolist(),
        highest=x_QI.amax(0).tolist(),
        farthest=float(x_QI.norm(dim=1).max()),
        given=comparison.count - fresh,
        fresh=fresh,
        not_compared=not_compared,
        noise=noise_O.tolist(),
        spread=spread_O.tolist(),
        terms=tolerance.terms_O.tolist(),
        allowed=(AGREEMENT_WORST * tolerance.unit_O).tolist(),
        worst=comparison.largest_O.tolist(),
        worst_share=(comparison.ratio_O / AGREEMENT_WORST).tolist(),
        mean_share=(comparison.mean_ratio_O / AGREEMENT).tolist(),
        smallest_seen=(AGREEMENT * tolerance.unit_O).tolist(),
        hidden_share=min(1.0, RULE_OF_THREE / fresh),
    )
