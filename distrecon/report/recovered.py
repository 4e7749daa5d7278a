"""What a recovery came to: the verdict, the first layer's weights beside the teacher's, the certificate."""

import math

import numpy as np

from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Arrays, Drawing, Table
from distrecon.report import tables

LEAST_PICTURE = 16  # inputs; fewer are shown in a line
NEURONS, LINES = 20, 8  # shown, as pictures and as lines
WIDE = 32  # inputs of the lines that stand side by side
OUTPUTS = 12  # of the table, those that disagree most


def first_layer(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    """The best trial's neurons of the first hidden layer, beside the teacher's that they were matched to."""
    from distrecon.report import figures

    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "first_layer" not in found:
        return None
    count, inputs = found["first_layer"].shape
    side = math.isqrt(inputs)
    square = side * side == inputs >= LEAST_PICTURE
    shape, shown, columns = ((side, side), NEURONS, 10) if square else ((1, inputs), LINES, max(1, WIDE // inputs))
    shown = min(shown, count)
    rows = {"recovered": found["first_layer"][:shown].reshape(shown, *shape)}
    compared = "The teacher is not known."
    if "first_layer_teacher" in found:
        true_NI = found["first_layer_teacher"]
        rows = {"teacher": true_NI[:shown].reshape(shown, *shape), **rows}
        compared = (
            f"Largest angle between a neuron and the teacher's: {_angle(found['first_layer'], true_NI):.1e} degrees."
        )
    return Drawing(
        "first_layer",
        f"First-layer weights ({tables.heading(sweep)} {tables.label(best.config)})",
        f"{shown} of {count} neurons, each a {'picture of its' if square else 'line of'} {inputs} weights, on its own "
        f"scale (red positive, blue negative). {compared}",
        figures.weight_pictures(rows, columns),
    )


def _angle(found_NI: np.ndarray, true_NI: np.ndarray) -> float:
    """The largest between rows, in degrees; of unit vectors' difference, which is exact near 0."""
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-300) for rows in (found_NI, true_NI)]
    half = np.linalg.norm(units[0] - units[1], axis=1).max() / 2
    return math.degrees(2 * math.asin(min(1.0, half)))


def verdict(sweep: SweepRecord, arrays: Arrays) -> Table | None:
    """Whether the best trial is verified, why, and what its black box was found to be, in words."""
    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "verdict" not in found:
        return None
    said, *findings = found["verdict"].tolist()
    note = " ".join(
        f"{sentence}." for sentence in (said, *(f"Found: {finding}" for finding in findings if finding not in said))
    )
    return Table(f"Verdict ({tables.heading(sweep)} {tables.label(best.config)})", [], [], note)


def certificate(sweep: SweepRecord, arrays: Arrays) -> Table | None:
    """The best trial's certificate, an output a row."""
    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "certificate/worst" not in found:
        return None
    of = {name.split("/")[1]: values for name, values in found.items() if name.startswith("certificate/")}
    order = np.argsort(-of["worst_share"], kind="stable")[:OUTPUTS]
    rows = [
        [
            str(output),
            f"{of['spread'][output]:.2g}",
            f"{of['noise'][output]:.0e}",
            f"{of['worst'][output]:.0e}",
            f"{100 * of['worst_share'][output]:.2g} %",
            f"{of['smallest_seen'][output]:.0e}",
        ]
        for output in order
    ]
    given, fresh, untold = (int(n) for n in of["answers"])
    left_out = len(of["worst"]) - len(order)
    return Table(
        f"Certificate ({tables.heading(sweep)} {tables.label(best.config)})",
        ["output", "deviation", "rounding", "worst disagreement", "of what is allowed", "seen from"],
        rows,
        f"{given} answers of the run and {fresh} fresh ones were compared"
        + (f", {untold} more tell no scores" if untold else "")
        + f". What differs on less than {100 * float(of['hidden_share']):.2g} % of the inputs drawn may be hidden (at "
        "95 % confidence). All in the answers' own unit: an output's standard deviation, its rounding's, the largest "
        "disagreement, its share of what rounding and fit allow at its input, and the contribution from which on a "
        "missing neuron would have shown." + (f" {left_out} outputs that agree better are left out." * bool(left_out)),
    )
