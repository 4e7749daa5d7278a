"""The tables of the main job, as data: columns per kind of sweep, for the terminal and the report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distrecon import console
from distrecon.cluster.journal import SweepRecord


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _scientific(value: float) -> str:
    return f"{value:.0e}"


def _seconds(value: float) -> str:
    return f"{value:.0f}"


def _sizes(value: list[int]) -> str:
    return "-".join(map(str, value))


def _yes(value: float) -> str:
    return "yes" if value else "no"


@dataclass(frozen=True)
class Column:
    """One metric: its heading, how it is written, what it means."""

    heading: str
    metric: str
    write: Callable[[Any], str]
    meaning: str


COLUMNS: dict[str, tuple[Column, ...]] = {
    "autoencoder": (
        Column("R2 acc", "predict/test_accuracy_r2", _number, "test accuracy predicted from the embedding (R2)"),
        Column("R2 gap", "predict/generalization_gap_r2", _number, "generalisation gap predicted likewise (R2)"),
        Column(
            "agree",
            "reconstruct/agreement",
            _percent,
            "% of test images on which a reconstruction predicts as its original",
        ),
        Column("err", "reconstruct/agreement_on_errors", _percent, "the same where the original is wrong"),
        Column(
            "own",
            "reconstruct/own_nearest",
            _percent,
            "% of reconstructions that agree best with their own original; low means that many models became one",
        ),
        Column("L2", "reconstruct/weight_l2", _number, "distance of a reconstruction's weights to its original's"),
        Column("rec", "reconstruct/accuracy_mean", _percent, "reconstructions' accuracy, mean, %"),
        Column("max", "reconstruct/accuracy_max", _percent, "the best one's"),
        Column("gen", "generate/accuracy_mean", _percent, "generated models' accuracy, mean, %"),
        Column("max", "generate/accuracy_max", _percent, "the best one's"),
    ),
    "expand_cluster": (
        Column("sizes", "recover/layer_sizes", _sizes, "recovered hidden layer sizes"),
        Column("overhead", "recover/size_overhead", _percent, "neurons too many, in % of the teacher's"),
        Column("cos dist", "recover/max_cosine_distance", _scientific, "largest cosine distance to a teacher's neuron"),
        Column("agree", "recover/agreement", _percent, "% of test images on which it predicts as the teacher"),
        Column("verified", "recover/verified", _yes, "fresh queries agree to the numerical floor"),
        Column("queries", "recover/queries", str, "inputs the teacher was asked about"),
        Column("s", "time/seconds", _seconds, "seconds, teacher's training included"),
    ),
}


def label(config: Mapping[str, Any]) -> str:
    """A trial's short name: its swept values."""
    words = []
    for key, value in config.items():
        if isinstance(value, str):
            words.append(value)
        elif isinstance(value, list):
            words.append("+".join(map(str, value)))
        else:
            words.append(f"{key.rsplit('.', 1)[-1]} {value:.3g}" if isinstance(value, float) else f"{value}")
    return ", ".join(words) or "single"


def heading(sweep: SweepRecord) -> str:
    """What a sweep's trials differ in."""
    keys = next((list(t.config) for t in sweep.trials.values()), [])
    return ", ".join(keys) or "trial"


def rows(sweep: SweepRecord) -> list[list[str]]:
    """One row a trial: its label, then its metrics as text; a failed trial says so."""
    table = []
    best = sweep.best()
    for trial in sweep.trials.values():
        mark = " *" if trial is best else ""
        cells = [
            column.write(trial.metrics[column.metric]) if column.metric in trial.metrics else "-"
            for column in COLUMNS[sweep.kind]
        ]
        if trial.status != "completed":
            cells[0] = trial.status.replace("_", " ")
        table.append([label(trial.config) + mark, *cells])
    return table


def legend(kind: str) -> list[str]:
    """One line a column: what it means."""
    return [f"{column.heading}: {column.meaning}" for column in COLUMNS[kind]]


def render(sweep: SweepRecord) -> str:
    """A sweep's table for the terminal, its best trial marked."""
    header = [heading(sweep), *(column.heading for column in COLUMNS[sweep.kind])]
    return console.table(header, rows(sweep))
