"""Pictures of what an autoencoder makes of models: the latent space, reconstructions, generated models' relatives."""

from collections.abc import Mapping, Sequence

import numpy as np

from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Arrays, Drawing
from distrecon.report import tables

SETS = {"map/train": "training", "map/heldout": "held-out", "map/generated": "generated"}
PASSES = {"reconstruct/accuracy": "reconstructed", "reconstruct/refined/accuracy": "refined"}
PANELS = 6  # trials whose reconstructions are drawn, at most
AGREEMENTS = {"reconstruct/agreement": "as encoded", "reconstruct/refined/agreement": "refined"}
CODE = ("model.latent", "tasks.refine")  # the settings that agreement is drawn against


def latent_map(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    """The best trial's latent space on two principal components."""
    from distrecon.report import figures

    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "map/share" not in found:
        return None
    sets = {name: found[key] for key, name in SETS.items()}
    share = found["map/share"].tolist()
    centre, radius = _spread(sets["training"])
    said = "; ".join(
        f"{len(points)} {name} models of accuracy {points[:, 2].mean():.2f}, at {_distance(points, centre, radius):.1f}"
        for name, points in sets.items()
    )
    return Drawing(
        "latent_map",
        f"Map of the latent space ({tables.heading(sweep)} {tables.label(best.config)})",
        "One point a model, coloured by its accuracy, on the two directions in which the training models' latents "
        f"vary most: {100 * share[0]:.0f} % and {100 * share[1]:.0f} % of their variance, so that distances on the map "
        "are a part of those in the space. Generated models were encoded again. Mean distance on the map from the "
        f"training models' centre, in their own root mean square: {said}.",
        figures.latent_map(sets, share),
    )


def _spread(points_B3: np.ndarray) -> tuple[np.ndarray, float]:
    centre_2 = points_B3[:, :2].mean(0)
    return centre_2, max(1e-12, float(np.sqrt(np.square(points_B3[:, :2] - centre_2).sum(1).mean())))


def _distance(points_B3: np.ndarray, centre_2: np.ndarray, radius: float) -> float:
    return float(np.linalg.norm(points_B3[:, :2] - centre_2, axis=1).mean()) / radius


def reconstructions(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    """Each trial's reconstructions, their accuracy against their originals'."""
    from distrecon.report import figures

    panels: dict[str, Mapping[str, np.ndarray]] = {}
    for trial, found in arrays.items():
        kinds = {name: found[key] for key, name in PASSES.items() if key in found}
        if kinds:
            panels[tables.label(sweep.trials[trial].config)] = kinds
    if not panels:
        return None
    left_out = len(panels) - PANELS
    panels = dict(list(panels.items())[:PANELS])
    said = "; ".join(
        f"{trial}: " + ", ".join(f"{kind} {_correlation(pair):.2f}" for kind, pair in kinds.items())
        for trial, kinds in panels.items()
    )
    return Drawing(
        "reconstructions",
        "Reconstructions against originals",
        "One point a held-out model: its accuracy, and that of its reconstruction; on the dotted line they are equal. "
        "A flat cloud means that all models became alike. Correlation of the two, model by model: "
        f"{said}." + (f" The first {PANELS} trials; {left_out} more are in summary.json." if left_out > 0 else ""),
        figures.reconstructions(panels),
    )


def _correlation(pair_2B: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return float(np.corrcoef(pair_2B)[0, 1]) if pair_2B.shape[1] > 1 and (pair_2B.std(1) > 1e-9).all() else 0.0


def relatives(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    """The best trial's generated models beside the training models that are nearest to them."""
    from distrecon.report import figures

    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "generate/relatives" not in found:
        return None
    (distance_M, relative_M), accuracy_M = found["generate/relatives"], found["generate/accuracy"]
    return Drawing(
        "relatives",
        f"Generated models and their nearest relatives ({tables.heading(sweep)} {tables.label(best.config)})",
        "Each generated model with the training model that is nearest in weights after matching units: how far that is "
        "(at 0 it is a copy, at 1 as far as a held-out good model is from its own nearest), and both accuracies. "
        f"{len(distance_M)} models at distances {distance_M.min():.2f} to {distance_M.max():.2f} (mean "
        f"{distance_M.mean():.2f}); {(accuracy_M > relative_M).sum()} are more accurate than their relative; means "
        f"{accuracy_M.mean():.2f} and {relative_M.mean():.2f}.",
        figures.relatives(distance_M, accuracy_M, relative_M),
    )


def agreement_by_code(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    """Agreement against the size of the latent and the steps of refinement, where these are swept."""
    from distrecon.report import figures

    panels = {}
    for setting in CODE:
        lines = {name: _means(sweep, setting, metric) for metric, name in AGREEMENTS.items()}
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if lines:
            panels[setting] = lines
    if not panels:
        return None
    said = "; ".join(
        f"{setting}, {name}: " + ", ".join(f"{x:g} {mean:.3f}" for x, mean, _, _ in points)
        for setting, lines in panels.items()
        for name, points in lines.items()
    )
    tops = {s: max((p for points in lines.values() for p in points), key=lambda p: p[1]) for s, lines in panels.items()}
    return Drawing(
        "agreement_by_code",
        "Agreement against " + " and ".join(panels),
        "Share of test images on which reconstructions predict as their originals, mean over trials that share a value "
        f"(bars: least to most). {said}.",
        figures.against(panels, "agreement", {setting: top[:2] for setting, top in tops.items()}),
    )


def _means(sweep: SweepRecord, setting: str, metric: str) -> Sequence[tuple[float, float, float, float]]:
    values: dict[float, list[float]] = {}
    for trial in sweep.trials.values():
        value, number = trial.config.get(setting), trial.metrics.get(metric)
        if isinstance(value, int | float) and isinstance(number, int | float):
            values.setdefault(value, []).append(number)
    return [(x, float(np.mean(v)), min(v), max(v)) for x, v in sorted(values.items())]
