"""The record of a sweep: one JSON line an event, appended as it happens, in the run folder.

Everything that people see of a sweep (progress, MLflow, summary.json, the report) is read from the journal, so it
survives a killed driver and can be sent to a tracking store again. Events:

    {"event": "sweep",    "name", "kind", "metric", "mode", "trials", "epochs", "settings", "time"}
    {"event": "started",  "trial", "config", "time"}
    {"event": "metrics",  "trial", "epoch", "metrics", "time"}
    {"event": "finished", "trial", "status", "error", "time"}
    {"event": "restart",  "time"}             the trials begin anew: events before it no longer count
    {"event": "done",     "time"}

`epochs` is how many a trial reports (null: none), `settings` what all trials have in common; journals of version 0.1
have neither. A resumed sweep may write an epoch twice; readers keep the last.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrecon.files import plain


class Journal:
    """Appends events to a file and reads new ones; picklable, no open handles."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **values: Any) -> None:
        """Appends one event; a line is written whole or, after a crash, not read. Non-finite numbers become text."""
        line = json.dumps({"event": event, **plain(values, not_finite=str), "time": time.time()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.stat().st_size > 0 and not self._ends_with_newline()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_newline(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def read(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Complete events from byte `offset` on, and the offset after them."""
        if not self.path.exists():
            return [], offset
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        events = []
        for line in whole.splitlines():
            try:
                events.append(json.loads(line))
            except (ValueError, RecursionError):  # a line torn by a crash; `write` closed it before the next
                continue
        return events, offset + len(whole)


@dataclass
class TrialRecord:
    """One trial, as the journal has it."""

    trial: str
    config: dict[str, Any]
    started: float
    ended: float | None = None
    status: str = "running"  # running | completed | stopped_early | failed
    error: str | None = None
    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        """The last value of every metric."""
        merged: dict[str, Any] = {}
        for epoch in sorted(self.epochs):
            merged |= self.epochs[epoch]
        return merged


@dataclass
class SweepRecord:
    """A sweep, as its journal has it so far."""

    name: str
    kind: str = ""
    metric: str = ""
    mode: str = "max"
    total: int = 0
    epochs: int | None = None  # that a trial reports, where it does
    seconds: float = 0.0  # at work: what lay between an interruption and the next start is left out
    last: float = 0.0  # time of the last event
    trials: dict[str, TrialRecord] = field(default_factory=dict)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes in one event."""
        what, at = event["event"], event["time"]
        self.seconds += 0.0 if what in ("sweep", "restart") else at - self.last
        self.last = at
        if what == "sweep":
            self.kind, self.metric, self.mode = event["kind"], event["metric"], event["mode"]
            self.total, self.epochs = event["trials"], event.get("epochs")
        elif what == "started":
            known = self.trials.get(event["trial"])
            if known is None:
                self.trials[event["trial"]] = TrialRecord(event["trial"], event["config"], at)
            else:
                known.status, known.error, known.ended = "running", None, None
        elif what == "metrics":
            self.trials[event["trial"]].epochs.setdefault(event["epoch"], {}).update(event["metrics"])
        elif what == "finished":
            trial = self.trials[event["trial"]]
            trial.status, trial.error, trial.ended = event["status"], event["error"], at
        elif what == "restart":
            self.trials.clear()

    def scored(self) -> list[TrialRecord]:
        """The trials that have a number for the objective, those that failed left out: they left no model."""
        return [
            t
            for t in self.trials.values()
            if t.status != "failed" and isinstance(t.metrics.get(self.metric), int | float)
        ]

    def best(self) -> TrialRecord | None:
        """The trial with the best objective (so far, of a sweep that runs)."""
        if not (scored := self.scored()):
            return None
        return (max if self.mode == "max" else min)(scored, key=lambda t: t.metrics[self.metric])


def read_sweep(path: Path) -> SweepRecord:
    """The sweep whose journal lies at `path`, trials in the order of the space; its name is the file's folder."""
    record = SweepRecord(path.parent.name)
    for event in Journal(path).read()[0]:
        record.apply(event)
    record.trials = dict(sorted(record.trials.items()))  # Tune numbers them
    return record
