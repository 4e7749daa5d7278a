"""Which figures a report has for each kind of sweep: titles, text alternatives, and the numbers given to `figures`.

Each drawing is a function of a sweep's record and its trials' arrays that returns a Drawing, or None where the sweep
has nothing to draw; a new one is one function and its place in `DRAWINGS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distrecon import figures, tables
from distrecon.cluster.journal import SweepRecord, TrialRecord

LOSSES = ("loss/contrastive", "loss/structural", "loss/behavioral")
NOVELTY = {  # prefix of the metrics -> name; the sampler's own points are named by their trial
    "generate/": None,
    "generate/baseline_heldout/": "held-out good models",
    "generate/baseline_noise/": "noise on a model",
    "generate/baseline_average/": "average of two",
}

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # trial -> name -> values


@dataclass(frozen=True)
class Drawing:
    """A figure with its title and the sentences that stand for it where it cannot be seen."""

    name: str
    title: str
    description: str
    figure: Any


def drawings(sweep: SweepRecord, arrays: Arrays) -> list[Drawing]:
    """All figures of a sweep that have something to show."""
    made = (draw(sweep, arrays) for draw in DRAWINGS[sweep.kind])
    return [drawing for drawing in made if drawing is not None]


# -- autoencoders -----------------------------------------------------------------------------------------------------


def losses(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    curves = {loss.split("/")[1]: _curves(sweep, loss) for loss in LOSSES}
    curves = {loss: trials for loss, trials in curves.items() if trials}
    if not curves:
        return None
    ends = "; ".join(
        f"{loss}: "
        + ", ".join(f"{trial} {points[0][1]:.2g} to {points[-1][1]:.2g}" for trial, points in trials.items())
        for loss, trials in curves.items()
    )
    return Drawing(
        "losses",
        "Losses by epoch",
        "Each loss over the training models, before scaling; a trial appears where it trains that loss. "
        f"From the first to the last epoch: {ends}.",
        figures.losses_by_epoch(curves),
    )


def _curves(sweep: SweepRecord, metric: str) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for trial in sweep.trials.values():
        points = [(e, m[metric]) for e, m in sorted(trial.epochs.items()) if isinstance(m.get(metric), int | float)]
        if points:
            curves[tables.label(trial.config)] = points
    return curves


def accuracies(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    groups = {
        tables.label(sweep.trials[trial].config): {
            "original": values["reconstruct/accuracy"][0],
            "reconstructed": values["reconstruct/accuracy"][1],
            "generated": values["generate/accuracy"],
        }
        for trial, values in arrays.items()
    }
    if not groups:
        return None
    means = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {np.mean(v):.2f}" for kind, v in sets.items()) for name, sets in groups.items()
    )
    return Drawing(
        "accuracies",
        "Accuracy of original, reconstructed and generated models",
        f"One point a model, a line at each mean. Means: {means}.",
        figures.accuracy_distributions(groups),
    )


def novelty(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    points: dict[str, list[tuple[float, float]]] = {}
    for prefix, name in NOVELTY.items():
        for trial in sweep.trials.values():
            at, accuracy = (trial.metrics.get(f"{prefix}{m}") for m in ("novelty", "accuracy_mean"))
            if isinstance(at, float) and isinstance(accuracy, float):
                points.setdefault(name or tables.label(trial.config), []).append((at, accuracy))
    if not points:
        return None
    points = {name: list(dict.fromkeys(values)) for name, values in points.items()}
    told = "; ".join(f"{name}: {values[0][1]:.2f} at {values[0][0]:.2f}" for name, values in points.items())
    return Drawing(
        "novelty",
        "Accuracy against novelty of generated models",
        "Novelty is the aligned distance to the nearest training model, 1 where a held-out good model lies. "
        "Noise on a training model and averages of two are the baselines that a generator has to beat. "
        f"Mean accuracy at novelty: {told}.",
        figures.accuracy_novelty(points),
    )


def gradients(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "gradients/structural_share" not in found:
        return None
    shares = {kind: found[f"gradients/{kind}_share"] for kind in ("structural", "behavioral")}
    cosines = {
        "predicted with behavioral": found["gradients/predicted_cosine"],
        "structural with behavioral": found["gradients/structural_cosine"],
    }
    layers = [str(name) for name in found["layers"]]
    told = "; ".join(
        f"{name}: " + ", ".join(f"{layer} {v:.2f}" for layer, v in zip(layers, values, strict=True))
        for name, values in {**shares, **cosines}.items()
    )
    return Drawing(
        "gradients",
        f"What the losses ask of each layer ({tables.heading(sweep)} {tables.label(best.config)})",
        "Left, each layer's part of the norm of the structural and of the behavioural gradient, both with respect to "
        "the reconstructed weights, mean over held-out models. Right, the cosine of the behavioural gradient with its "
        f"first-order prediction and with the structural one. {told}.",
        figures.gradients(layers, shares, cosines),
    )


def agreement(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    best = sweep.best()
    matrix = arrays.get(best.trial, {}).get("reconstruct/agreement_matrix") if best else None
    if best is None or matrix is None:
        return None
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    return Drawing(
        "agreement",
        f"Agreement of reconstructions with originals ({tables.heading(sweep)} {tables.label(best.config)})",
        "Share of test images on which two models predict the same class; a bright diagonal means that reconstructions "
        f"behave like their own originals. Mean {matrix.diagonal().mean():.2f} with the own original, "
        f"{others.mean():.2f} with the others.",
        figures.agreement(matrix),
    )


# -- recoveries -------------------------------------------------------------------------------------------------------


def sizes(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    done = _recovered(sweep)
    if not done:
        return None
    found = [sum(t.metrics["recover/layer_sizes"]) for t in done]
    true = {round(s / (1 + t.metrics["recover/size_overhead"])) for s, t in zip(found, done, strict=True)}
    labels = [tables.label(t.config) for t in done]
    verified = [bool(t.metrics["recover/verified"]) for t in done]
    told = ", ".join(
        f"{name}: {size}{'' if ok else ' (not verified)'}"
        for name, size, ok in zip(labels, found, verified, strict=True)
    )
    return Drawing(
        "sizes",
        f"Hidden neurons recovered, by {tables.heading(sweep)}",
        f"Recovered hidden neurons: {told}.",
        figures.recovered_sizes(labels, found, verified, true.pop() if len(true) == 1 else None),
    )


def dendrogram(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    best = _most_students(sweep, arrays)
    if best is None:
        return None
    data = arrays[best.trial]
    cut, cluster_V = float(data["layer1_cut"]), data["layer1_cluster"]
    return Drawing(
        "dendrogram",
        f"Clustering of the students' neurons ({tables.heading(sweep)} {tables.label(best.config)})",
        f"{cluster_V.max() + 1} clusters are kept below the cut at {cut:.1e}, of {len(cluster_V)} neurons.",
        figures.dendrogram(data["layer1_merges"], cut, cluster_V),
    )


def similarity(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    best = _most_students(sweep, arrays)
    if best is None:
        return None
    data = arrays[best.trial]
    return Drawing(
        "similarity",
        f"Similarity of the students' neurons ({tables.heading(sweep)} {tables.label(best.config)})",
        "Neurons of one cluster point the same way (cosine 1) and form blocks on the diagonal.",
        figures.similarity(data["layer1_similarity"], data["layer1_cluster"]),
    )


def _recovered(sweep: SweepRecord) -> Sequence[TrialRecord]:
    return [t for t in sweep.trials.values() if "recover/layer_sizes" in t.metrics]


def _most_students(sweep: SweepRecord, arrays: Arrays) -> TrialRecord | None:
    """The trial whose clustering shows most: the one with the most neurons clustered."""
    clustered = [t for t in _recovered(sweep) if len(arrays.get(t.trial, {}).get("layer1_merges", ())) > 1]
    return max(clustered, key=lambda t: len(arrays[t.trial]["layer1_merges"]), default=None)


DRAWINGS: dict[str, tuple[Callable[[SweepRecord, Arrays], Drawing | None], ...]] = {
    "autoencoder": (losses, accuracies, novelty, gradients, agreement),
    "expand_cluster": (sizes, dendrogram, similarity),
}
