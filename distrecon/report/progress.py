"""How far a sweep is, read from its record: the share that is done, what is running, the best so far."""

from dataclasses import dataclass

from distrecon.record.journal import SweepRecord, TrialRecord
from distrecon.report import tables

TRAINING = 0.9  # of a trial that reports epochs; scoring is the rest


@dataclass(frozen=True)
class Standing:
    """How far a sweep is."""

    ended: int
    total: int
    failed: int
    running: list[str]  # a trial's label and, where it reports epochs, how many are done, or that it is being scored
    share: float | None  # of the sweep's work that is done; None while the last trials are scored
    best: str | None  # label of the best trial so far, and what it has reached
    value: float | None


def standing(record: SweepRecord) -> Standing:
    """How far the sweep is by now."""
    running = [t for t in record.trials.values() if t.status == "running"]
    ended, best = len(record.trials) - len(running), record.best()
    shares = [_share(trial, record.epochs) for trial in running]
    scoring = running and len(record.trials) == record.total and all(share >= TRAINING for share in shares)
    return Standing(
        ended=ended,
        total=record.total,
        failed=sum(t.status == "failed" for t in record.trials.values()),
        running=[_now(trial, record.epochs) for trial in running],
        share=None if scoring else (ended + sum(shares)) / max(1, record.total),
        best=tables.label(best.config) if best else None,
        value=float(best.metrics[record.metric]) if best else None,
    )


def _share(trial: TrialRecord, epochs: int | None) -> float:
    return TRAINING * max(trial.epochs, default=0) / epochs if epochs else 0.0


def _now(trial: TrialRecord, epochs: int | None) -> str:
    label = tables.label(trial.config)
    if not epochs:
        return label
    done = max(trial.epochs, default=0)
    return f"{label} scored" if done >= epochs else f"{label} {done}/{epochs}"
