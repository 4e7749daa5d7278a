"""What a black box is, before any students: each finding with its evidence in numbers and what to do about it.

A dense network with one activation is one kind of function among many that can be asked. The others are told apart by
simple measurements (see symptoms.py) within 3,000 queries. Where a measurement is not clear there is no finding, and
the recovery goes on.

Legend: Q queries, I inputs, O outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster import symptoms
from distrecon.expand_cluster.depth import course
from distrecon.expand_cluster.odds import are_probabilities
from distrecon.expand_cluster.symptoms import Sample

Ask = Callable[[Tensor], Tensor]
REPEATABLE = 1e-5  # relative difference of repeated answers that can still be rounding
FEW_LEVELS = 20  # answers of so few different values are labels or votes
CLAMPS, PLACES = 3, 3  # inputs at which limits are looked for at several places
CURVED, STRAIGHT = 0.3, 0.6  # shares of straight places below and above which pieces are curved and straight
INVARIANT = 0.01
FLAT = 0.75
WIDE = 1.5  # standard inputs: probabilities that tell scores only closer by may hide bends
CLEAR = 0.01  # of the answers' deviations: larger noise hides bends
LEAST_KINKS = 3
ORDINARY, LEAST_CURVES = 6, 2  # places where curves between kinks are looked for, and at how many they must be
TURNS = 3  # kinks that must turn, before as many run straight, for there to be several hidden layers
PIECEWISE_LINEAR, SMOOTH = "piecewise linear", "smooth"  # findings that leave some of the activations


@dataclass(frozen=True)
class Finding:
    """One thing that a black box is: its name, the evidence, what to do; whether it `stops` a recovery."""

    name: str
    evidence: str
    advice: str
    stops: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}; {self.advice}"


def diagnose_answers(sample: Sample, ask_again: Ask) -> list[Finding]:
    """What the answers themselves show; `ask_again` answers standard inputs and may not remember."""
    findings = _answers(sample, ask_again)
    return findings if any(found.stops for found in findings) else findings + _jumps(sample)


def diagnose_function(sample: Sample, hidden_layers: int | None = None, pooled: bool = False) -> list[Finding]:
    """What kind of function gave the answers, and whether it has so many hidden layers (None: not asked)."""
    bend = symptoms.largest_bend(sample)
    noise_O = sample.noise(sample.y_QO).median(0).values
    width_I = (sample.around.high_I - sample.around.low_I) / sample.around.scale_I
    seen = (noise_O < CLEAR * sample.scale_O).any() and (sample.odds is None or float(width_I.min()) > WIDE)
    if bend < symptoms.STRAIGHT and seen:
        evidence = f"second differences are at most {bend:.1f} times the rounding noise, near and far"
        return [Finding("linear", evidence, "there are no hidden neurons: fit A x + b by least squares", True)]
    findings = [] if sample.around.bounded else _linear_path(sample)
    if findings:
        return findings
    if (sample.quantum_O > 0).any():
        return findings  # steps of the answers hide kinks and straight pieces
    lines = symptoms.shape(sample)
    pieces = (
        f"{len(lines.kinks)} of the {lines.looked_at} sharpest bends are kinks, "
        f"{lines.straight:.0%} of {lines.places} places are straight"
    )
    if len(lines.kinks) >= LEAST_KINKS and lines.places:
        # kinks that are near each other, and noise, leave few places that are seen to be straight
        curved = 0 if lines.straight >= STRAIGHT else symptoms.curved(sample, ORDINARY, LEAST_CURVES)
        if curved == 0 and lines.straight >= CURVED:
            findings.append(Finding(PIECEWISE_LINEAR, pieces, "activation='relu' or 'leaky_relu'"))
            findings += _depth(sample, lines.kinks, hidden_layers) if hidden_layers is not None else []
        elif curved == LEAST_CURVES and lines.straight < CURVED:
            advice = "activations of two kinds in one network, or a function round it, cannot be recovered"
            findings.append(
                Finding("kinks between curves", pieces, "as of max pooling" if pooled else advice, not pooled)
            )
    elif lines.curves == lines.looked_at and lines.straight < CURVED:
        findings.append(Finding(SMOOTH, pieces, "not relu or leaky_relu"))
    return findings


def _depth(sample: Sample, kinks: list[symptoms.Kink], hidden_layers: int) -> list[Finding]:
    """Whether there are more hidden layers than one, or only one, where the other was asked for."""
    courses: list[str] = []
    for kink in kinks:
        courses.append(course(sample, kink))
        turning, straight = courses.count("turns"), courses.count("straight")
        left = len(kinks) - len(courses)  # no more are asked about than can still change what is found
        if (TURNS in (turning, straight) or turning + left < TURNS) if hidden_layers == 1 else turning:
            break
    if hidden_layers == 1 and turning == TURNS:
        evidence = f"{turning} of {len(courses)} kinks turn or change on their way through the inputs"
        return [Finding("several hidden layers", evidence, "hidden_layers=2, or more", True)]
    if hidden_layers > 1 and straight == len(kinks):
        evidence = f"all {len(kinks)} kinks looked at run straight through the inputs and stay the same"
        return [Finding("perhaps one hidden layer", evidence, "hidden_layers=1 is quickly tried")]
    return []


def _answers(sample: Sample, ask_again: Ask) -> list[Finding]:
    """What the answers themselves show."""
    y_QO, findings = sample.y_QO, []
    again, others = symptoms.repetition(ask_again, sample)
    if again > REPEATABLE:
        evidence = f"the same queries gave answers {again:.1e} apart (relative)"
        advice = "switch off what is random (dropout: module.eval()), or average many answers inside the black box"
        return [Finding("not deterministic", evidence, advice, True, {"difference": again})]
    if others > REPEATABLE:
        evidence = f"asked together with other queries, the same ones gave answers {others:.1e} apart (relative)"
        return [Finding("depends on the other rows", evidence, "batch normalisation? module.eval() stops it", True)]
    constant_O = (y_QO == y_QO[:1]).all(0)
    if constant_O.all():
        return [
            Finding("constant", f"{len(y_QO)} queries gave one answer", "other inputs, or data=, may tell more", True)
        ]
    levels = y_QO.unique(dim=0)
    whole = bool((y_QO == y_QO.round()).all())
    one_hot = y_QO.shape[1] > 1 and bool(((y_QO == 0) | (y_QO == 1)).all() and (y_QO.sum(1) == 1).all())
    if one_hot or (whole and y_QO.shape[1] == 1 and len(levels) <= FEW_LEVELS):
        evidence = f"{len(levels)} different answers to {len(y_QO)} queries, " + (
            "one-hot" if one_hot else "whole numbers"
        )
        advice = "labels tell no weights: ask for scores, logits, or probabilities"
        return [Finding("labels only", evidence, advice, True)]
    if constant_O.any() and not constant_O.all():
        which = [int(o) for o in constant_O.nonzero()[:, 0]]
        findings.append(
            Finding("constant outputs", f"outputs {which}", "the others are recovered", values={"outputs": which})
        )
    if (sample.quantum_O > 0).any():
        steps = ", ".join(f"{q:.3g}" for q in sample.quantum_O[:8].tolist())
        evidence = f"answers are multiples of {steps}{', ...' if len(sample.quantum_O) > 8 else ''}"
        findings.append(
            Finding(
                "quantised",
                evidence,
                "weights are recovered to about that precision",
                values={"quantum": sample.quantum_O},
            )
        )
    if are_probabilities(y_QO):
        findings.append(
            Finding(
                "probabilities",
                "rows lie in [0, 1] and add up to 1",
                "outputs='probabilities' recovers the network before the softmax",
            )
        )
    elif y_QO.shape[1] == 1 and 0 <= float(y_QO.min()) < 0.1 and 0.9 < float(y_QO.max()) <= 1:
        evidence = f"all answers lie between {float(y_QO.min()):.2g} and {float(y_QO.max()):.2g}"
        findings.append(
            Finding(
                "perhaps a probability",
                evidence,
                "if it is a sigmoid's, outputs='probabilities' recovers the network before it",
            )
        )
    return findings


def _jumps(sample: Sample) -> list[Finding]:
    """Whether the answers jump."""
    if not (sample.y_QO != sample.y_QO[:1]).any():
        return []
    jump_PO = symptoms.jumps(sample)
    continuous_O = torch.maximum(1.5 * sample.quantum_O, torch.maximum(100 * sample.noise_O, 1e-6 * sample.scale_O))
    range_O = sample.y_QO.amax(0) - sample.y_QO.amin(0)
    votes = bool(((sample.quantum_O > 0) & (range_O <= FEW_LEVELS * sample.quantum_O)).all())
    together_P = (jump_PO > 0.5 * sample.quantum_O).sum(1) > 1  # rounding moves one output at a time
    jumps_P = (jump_PO > continuous_O).any(1) | (together_P & (sample.quantum_O > 0).all())
    if int(jumps_P.sum()) < symptoms.PAIRS // 2 and not votes:
        return []
    size, flat = float((jump_PO / sample.scale_O).amax()), symptoms.constant_share(sample)
    evidence = f"answers jump by {size:.2g} standard deviations between queries 1e-12 apart"
    if flat > FLAT:
        evidence += f" and are constant round {flat:.0%} of the queries"
        return [
            Finding("piecewise constant", evidence, "trees, nearest neighbours or votes: no network to recover", True)
        ]
    return [
        Finding("discontinuous", evidence, "no dense network does this: thresholds, or a choice between models", True)
    ]


def normalised(sample: Sample, ask: Ask) -> list[Finding]:
    """Whether inputs are normalised inside; `ask` answers the inputs themselves."""
    same = symptoms.invariances(ask, sample.around.centre_I, sample.around.scale_I, sample.generator)
    if not same or same["scaling"] > INVARIANT:
        return []
    shift = " or shifted" if same["shift"] < INVARIANT else ""
    evidence = (
        f"far out, answers stay the same when all inputs are scaled{shift} together, but not when they are turned"
    )
    advice = "inputs are normalised inside: ask behind the normalisation, if you can"
    return [Finding("normalised inputs", evidence, advice, True)]


def _linear_path(sample: Sample) -> list[Finding]:
    """Whether there is a linear path round a network of bounded activations."""
    slope_DO, odd, additive = symptoms.far_slopes(sample)
    growing = (slope_DO.abs().amax(0) > 1e-6 * sample.scale_O).any()
    if not growing or odd > 1e-3 or additive > 1e-3:
        return []
    matrix_OI = symptoms.linear_path(sample) / sample.around.scale_I
    evidence = (
        f"far out, answers grow linearly in every direction, by up to {float(matrix_OI.abs().max()):.3g} an input"
    )
    advice = (
        "a linear path round the network: subtract values['matrix'] @ x from the answers and recover the rest, "
        "in a domain= (far out the difference is all rounding)"
    )
    return [Finding("linear skip", evidence, advice, True, {"matrix": matrix_OI})]


def clamped(sample: Sample) -> list[Finding]:
    """Whether inputs are clamped to limits, which the finding's values are (the inputs themselves, not standard)."""
    limits = _limits(sample)
    if limits is None:
        return []
    low_I, high_I = sample.around.inputs(torch.stack(limits))
    evidence = f"beyond {_range(low_I)} and {_range(high_I)} inputs change nothing"
    return [Finding("clamped inputs", evidence, "queries stay inside: domain=", values={"low": low_I, "high": high_I})]


def _limits(sample: Sample) -> tuple[Tensor, Tensor] | None:
    """Low and high [I], in standard inputs, of a black box that clamps every input; None for any other."""
    found: list[tuple[float, float]] = []
    for i in range(sample.inputs if sample.inputs > 1 else 0):
        limits = symptoms.clamp(sample, i, PLACES if i < CLAMPS else 1)
        if limits is None:
            return None
        found.append(limits)
    if not found:
        return None
    limits_2I = torch.tensor(found, dtype=torch.float64).T
    return limits_2I[0] + symptoms.RESOLUTION, limits_2I[1] - symptoms.RESOLUTION  # inside, as near as they are known


def _range(values_I: Tensor) -> str:
    low, high = round(float(values_I.min()), 5), round(float(values_I.max()), 5)
    return f"{low:.5g}" if high - low < 1e-4 else f"{low:.5g} to {high:.5g}"
