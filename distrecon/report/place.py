"""A network's place in a zoo: its metrics, and its figure from the arrays that the commands leave."""

from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Arrays, Drawing, Metric, two_digits

METRICS = (
    Metric("place/test_accuracy", "", two_digits, "of a network placed in a zoo, predicted", objective=False),
    Metric("place/generalization_gap", "", two_digits, "the same", objective=False),
    Metric("place/epoch", "", two_digits, "the same", objective=False),
    Metric("place/distance", "", two_digits, "of its weights from the nearest training model's", objective=False),
    Metric("place/novelty", "", two_digits, "that distance over the mean one of held-out models", objective=False),
)


def in_the_zoo(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    """Distance and accuracy of all training models, and what is predicted of the network."""
    from distrecon.report import figures

    placed = [values for values in arrays.values() if "place/predicted" in values]
    if not placed:
        return None
    (values,) = placed
    return Drawing(
        "place",
        "The network among the zoo's training models",
        "One point a training model's state, by the distance of its weights (all of them matched to one reference). At "
        f"distance 0 the network, where its test accuracy was predicted, with the probe's error on held-out models. "
        f"{' '.join(f'{line}.' for line in values['place/lines'])}",
        figures.place(values["place/distance"], values["place/accuracy"], *values["place/predicted"]),
    )
