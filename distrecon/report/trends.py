"""What a sweep tells: its metric against every numeric setting that was swept, and what to try next."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrecon.record.journal import SweepRecord, TrialRecord
from distrecon.record.kind import Drawing, Kind
from distrecon.report import tables

FALLING = 0.05  # of a loss over the last quarter of the epochs, from which on more epochs are worth a try
ALIKE = 1e-3  # of the largest metric, or of the metrics' range: differences up to here are none
LINES = 7  # in one panel, at most; with more other settings than that, all trials of a value are one point


def number(value: Any) -> float | None:
    """A swept value as a number; also that of a list of one, such as teacher.hidden's."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_seed(setting: str) -> bool:
    """Whether the values of a setting only repeat a trial."""
    return setting.rsplit(".", 1)[-1] == "seed"


@dataclass(frozen=True)
class Scored:
    """The trials of a sweep that have its metric, and the settings that it swept."""

    sweep: SweepRecord
    trials: list[TrialRecord]
    settings: list[str]  # seeds left out
    numeric: list[str]  # those with two numbers or more

    @classmethod
    def of(cls, sweep: SweepRecord) -> "Scored":
        trials = sweep.scored()
        settings = [key for key in (trials[0].config if trials else ()) if not is_seed(key)]
        numbers = {key: {number(t.config.get(key)) for t in trials} for key in settings}
        numeric = [key for key, values in numbers.items() if None not in values and len(values) > 1]
        return cls(sweep, trials, settings, numeric)

    def metric(self, trial: TrialRecord) -> float:
        return float(trial.metrics[self.sweep.metric])

    def groups(self) -> dict[tuple, list[TrialRecord]]:
        """Trials that differ in their seeds alone."""
        groups = defaultdict(list)
        for trial in self.trials:
            groups[tuple(str(trial.config.get(key)) for key in self.settings)].append(trial)
        return groups

    def best(self) -> list[TrialRecord]:
        """Those of the best settings, by the mean over seeds."""
        choose = max if self.sweep.mode == "max" else min
        return choose(self.groups().values(), key=lambda group: float(np.mean([self.metric(t) for t in group])))

    def lines(self, setting: str) -> dict[str, list[tuple[float, float, float, float]]]:
        """Of each combination of the other settings [(value, mean, least, most), ...], the spread being that of seeds;
        of very many combinations one line, whose spread is theirs."""
        others = [key for key in self.settings if key != setting]
        lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for trial in self.trials:
            value = number(trial.config[setting])
            assert value is not None
            lines[tables.label({key: trial.config[key] for key in others})][value].append(self.metric(trial))
        if len(lines) > LINES:
            merged: dict[float, list[float]] = defaultdict(list)
            for points in lines.values():
                for value, metrics in points.items():
                    merged[value] += metrics
            lines = {"all trials": merged}  # type: ignore[assignment]
        return {
            "mean" if line == "trial" else line: [
                (x, float(np.mean(m)), min(m), max(m)) for x, m in sorted(points.items())
            ]
            for line, points in lines.items()
        }


def trends(sweep: SweepRecord) -> Drawing | None:
    """The sweep's metric against its numeric settings; None where there are none."""
    from distrecon.report import figures

    scored = Scored.of(sweep)
    if not scored.numeric:
        return None
    panels = {setting: scored.lines(setting) for setting in scored.numeric}
    group = scored.best()
    mean = float(np.mean([scored.metric(trial) for trial in group]))
    best: dict[str, tuple[float, float]] = {}
    for setting in scored.numeric:
        value = number(group[0].config[setting])
        assert value is not None
        best[setting] = (value, mean)
    repeated = max(len(trials) for trials in scored.groups().values())
    said = "; ".join(
        f"{setting}{'' if line in ('mean', 'all trials') else f' ({line})'}: "
        + ", ".join(f"{x:g} {value:.3g}" for x, value, _, _ in points)
        for setting, lines in panels.items()
        for line, points in lines.items()
    )
    return Drawing(
        "trends",
        f"{sweep.metric} against {', '.join(scored.numeric)}",
        f"The {'largest' if sweep.mode == 'max' else 'smallest'} is the best, in a circle: {_where(best)}. "
        + (f"Means over {repeated} seeds, bars from the least to the most. " if repeated > 1 else "One seed each. ")
        + f"{said}.",
        figures.against(panels, sweep.metric, best),
    )


def _where(best: Mapping[str, tuple[float, float]]) -> str:
    settings = ", ".join(f"{setting} {value:g}" for setting, (value, _) in best.items())
    return f"{next(iter(best.values()))[1]:.3g} at {settings}"


def advice(sweep: SweepRecord, kind: Kind) -> list[str]:
    """What to try next, a sentence each: beyond the edge of the grid, more seeds, more epochs."""
    scored = Scored.of(sweep)
    if not scored.trials:
        return []
    group = scored.best()
    return [*_edges(scored, group), *_seeds(scored, group), *_falling(sweep, kind, group[0])]


def _edges(scored: Scored, group: list[TrialRecord]) -> list[str]:
    """The best value is the least or the most that was tried, and the metric depends on it there."""
    told = []
    for setting in scored.numeric:
        others = [key for key in scored.settings if key != setting]
        alike: dict[float, list[float]] = defaultdict(list)
        for trial in scored.trials:
            value = number(trial.config[setting])
            if value is not None and all(trial.config[key] == group[0].config[key] for key in others):
                alike[value].append(scored.metric(trial))
        means = {value: float(np.mean(metrics)) for value, metrics in sorted(alike.items())}
        at = number(group[0].config[setting])
        if at is None or len(means) < 2:
            continue
        scale = max(np.ptp(list(means.values())), max(map(abs, means.values())))
        near = [value for value, mean in means.items() if abs(mean - means[at]) <= ALIKE * scale]
        if len(near) > 1:
            told.append(f"{setting} makes hardly a difference between {near[0]:g} and {near[-1]:g}.")
        elif at in (min(means), max(means)):
            side, more = ("smallest", "smaller") if at == min(means) else ("largest", "larger")
            told.append(f"{setting} is best at the {side} value tried, {at:g}: try {more} ones.")
    return told


def _seeds(scored: Scored, group: list[TrialRecord]) -> list[str]:
    """The next best settings are within the spread over seeds."""
    groups = scored.groups()
    if len(groups) < 2 or len(group) < 2:
        return []
    means = sorted(float(np.mean([scored.metric(t) for t in trials])) for trials in groups.values())
    lead = means[-1] - means[-2] if scored.sweep.mode == "max" else means[1] - means[0]
    spread = float(np.ptp([scored.metric(t) for t in group]))
    if lead > spread:
        return []
    return [f"The best leads by {lead:.2g}, less than its spread over seeds, {spread:.2g}: more seeds would decide."]


def _falling(sweep: SweepRecord, kind: Kind, best: TrialRecord) -> list[str]:
    """The best trial's loss still fell at the end."""
    told = []
    for metric in (m.name for m in kind.metrics if m.every_epoch):
        curve = [m[metric] for _, m in sorted(best.epochs.items()) if isinstance(m.get(metric), int | float)]
        if len(curve) < 4:
            continue
        before, last = curve[-1 - len(curve) // 4], curve[-1]
        fell = (before - last) / abs(before) if before else 0.0
        if fell > FALLING:
            told.append(
                f"{metric} of the best still fell by {100 * fell:.0f} % in the last quarter of its {len(curve)} epochs:"
                " train longer."
            )
    return told
