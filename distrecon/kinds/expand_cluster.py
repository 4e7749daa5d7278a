"""Recovery trials: a teacher network, trained on an image set or drawn, is recovered from its answers alone.

`run` and its configuration, the metrics, and the report's figures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from distrecon import images
from distrecon.cluster.resources import ResourcesConfig
from distrecon.config import check, setting
from distrecon.errors import UserError
from distrecon.expand_cluster import Recovery, network, recover_network, score
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.convolution.files import stored_chain
from distrecon.expand_cluster.shown import shown
from distrecon.expand_cluster.teachers import synthetic_problem, train_teacher
from distrecon.expand_cluster.weights import Weights, read_weights
from distrecon.nets import ACTIVATIONS
from distrecon.record.artifacts import ARRAYS
from distrecon.record.journal import SweepRecord, TrialRecord
from distrecon.record.kind import (
    Arrays,
    Drawing,
    Kind,
    Metric,
    Needs,
    Served,
    Trial,
    percent,
    scientific,
    sizes,
    whole,
    yes_or_no,
)
from distrecon.report import place, recovered, tables

SYNTHETIC = "synthetic"  # in the place of an image set's name


@dataclass(frozen=True)
class TeacherConfig:
    """The black box of a recovery trial, known to scores only: a classifier of an image set, trained on the spot.

    Or, with images "synthetic", one of Expand-and-Cluster's random problems of `inputs` inputs and one hidden layer.
    """

    images: str = setting("digits", 'an image set\'s name, or "synthetic"')
    hidden: tuple[int, ...] = setting((20,), "sizes of the hidden layers", least=1, filled=True)
    activation: str = setting("tanh", choices=ACTIVATIONS)
    seed: int = setting(0, "of the teacher's training", least=0)
    inputs: int = setting(8, "of a synthetic teacher", least=1)

    def __post_init__(self) -> None:
        check(self, "teacher")
        if self.images == SYNTHETIC and len(self.hidden) != 1:
            raise UserError(f"teacher.hidden of a synthetic teacher is one layer, not {list(self.hidden)}")


@dataclass(frozen=True)
class RecoveryRun(RecoveryConfig):
    """One Expand-and-Cluster trial: its teacher, the recovery, what it takes."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)


def run(config: RecoveryRun, trial: Trial) -> Mapping[str, Any]:
    """Makes the teacher, recovers and scores it; leaves the network and the arrays for figures.

    The recovery sees the training images and what it asks the teacher; the scores use the test images and the teacher.
    """
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    teacher, train_QI, test_QI = _teacher(config.teacher)
    recovery = recover_network(
        network(teacher, config.teacher.activation),
        input_size=teacher[0][0].shape[1],
        activation=config.teacher.activation,
        hidden_layers=len(config.teacher.hidden),
        seed=config.seed,
        config=config,
        data=train_QI,
    )
    metrics = recovery.metrics | score(recovery, teacher, test_QI)
    recovery.save(trial.folder / "network.safetensors")
    np.savez_compressed(trial.folder / ARRAYS, allow_pickle=False, **picture_arrays(recovery, teacher))
    return metrics


def _teacher(config: TeacherConfig) -> tuple[Weights, Tensor | None, Tensor | None]:
    """The teacher's weights, and its training and test images [Q, I] where it has any."""
    if config.images == SYNTHETIC:
        return synthetic_problem(config.inputs, config.hidden[0], config.activation, config.seed), None, None
    image_set = images.load(config.images)
    train_QI = image_set.train.images.flatten(1).double()
    labels_Q = image_set.train.labels_Q
    weights = train_teacher(train_QI, labels_Q, config.hidden, config.activation, config.seed)
    return weights, train_QI, image_set.test.images.flatten(1).double()


def picture_arrays(recovery: Recovery, teacher: Weights | None = None) -> dict[str, np.ndarray]:
    """All that the report draws a recovery from."""
    return clustering_arrays(recovery) | shown(recovery, teacher)


def clustering_arrays(recovery: Recovery) -> dict[str, np.ndarray]:
    """Per hidden layer the linkage [V - 1, 4], its cut, each vector's cluster (-1: none) and the similarity [V, V]."""
    arrays = {}
    for i, layer in enumerate(recovery.linkage, start=1):
        cluster_V = np.full(len(layer.students), -1)
        for number, members in enumerate(layer.clusters):
            cluster_V[members] = number
        arrays[f"layer{i}_merges"] = layer.merges
        arrays[f"layer{i}_cut"] = np.array(layer.cut)
        arrays[f"layer{i}_cluster"] = cluster_V
        arrays[f"layer{i}_similarity"] = layer.similarity().numpy().astype(np.float16)
    return arrays


def needs(config: RecoveryRun) -> Needs:
    """The CPUs of one worker; GPUs do not help a recovery."""
    amounts = {"CPU": config.resources.cpus_per_worker}
    return Needs(amounts, amounts, amounts)


def serve(folder: Path) -> Served:
    """The recovered network of a trial's files: inputs [Q, I] (or images) to outputs [Q, O], in float64."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        activation = opened.metadata()["activation"]
    chain = stored_chain(file)
    model: Callable[[Tensor], Tensor] = chain.module().requires_grad_(False) if chain else _dense(file, activation)
    inputs = chain.hypothesis.input_shape if chain else (read_weights(file)[0][0].shape[1],)

    def call(array: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))).numpy()

    return Served(model, call, np.zeros((1, *inputs)))


def _dense(file: Path, activation: str) -> Callable[[Tensor], Tensor]:
    return network(read_weights(file), activation)


# -- figures ----------------------------------------------------------------------------------------------------------


def recovered_sizes(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    done = _recovered(sweep)
    if not done:
        return None
    found = [sum(t.metrics["recover/layer_sizes"]) for t in done]
    true = {  # where the teacher is known
        round(size / (1 + t.metrics["recover/size_overhead"]))
        for size, t in zip(found, done, strict=True)
        if "recover/size_overhead" in t.metrics
    }
    labels = [tables.label(t.config) for t in done]
    verified = [bool(t.metrics["recover/verified"]) for t in done]
    numbers = ", ".join(
        f"{name}: {size}{'' if ok else ' (not verified)'}"
        for name, size, ok in zip(labels, found, verified, strict=True)
    )
    return Drawing(
        "sizes",
        f"Hidden neurons recovered, by {tables.heading(sweep)}",
        f"Recovered hidden neurons: {numbers}.",
        figures.recovered_sizes(labels, found, verified, true.pop() if len(true) == 1 else None),
    )


def dendrogram(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    best = _most_students(sweep, arrays)
    if best is None:
        return None
    data = arrays[best.trial]
    cut, cluster_V = float(data["layer1_cut"]), data["layer1_cluster"]
    return Drawing(
        "dendrogram",
        f"Clustering of {_clustered(best)} ({tables.heading(sweep)} {tables.label(best.config)})",
        f"{cluster_V.max() + 1} clusters are kept below the cut at {cut:.1e}, of {len(cluster_V)} vectors.",
        figures.dendrogram(data["layer1_merges"], cut, cluster_V),
    )


def similarity(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    best = _most_students(sweep, arrays)
    if best is None:
        return None
    data = arrays[best.trial]
    return Drawing(
        "similarity",
        f"Similarity of {_clustered(best)} ({tables.heading(sweep)} {tables.label(best.config)})",
        "Vectors of one cluster point the same way (cosine 1) and form blocks on the diagonal.",
        figures.similarity(data["layer1_similarity"], data["layer1_cluster"]),
    )


def _recovered(sweep: SweepRecord) -> Sequence[TrialRecord]:
    return [t for t in sweep.trials.values() if "recover/layer_sizes" in t.metrics]


def _clustered(trial: TrialRecord) -> str:
    """What the clustered vectors of a recovery are."""
    return "the bends along lines" if trial.metrics.get("recover/lines") else "the students' neurons"


def _most_students(sweep: SweepRecord, arrays: Arrays) -> TrialRecord | None:
    """The trial whose clustering shows most: the one with the most neurons clustered."""
    clustered = [t for t in _recovered(sweep) if len(arrays.get(t.trial, {}).get("layer1_merges", ())) > 1]
    return max(clustered, key=lambda t: len(arrays[t.trial]["layer1_merges"]), default=None)


# -- the kind ---------------------------------------------------------------------------------------------------------

METRICS = (
    Metric("recover/layer_sizes", "sizes", sizes, "recovered hidden layer sizes", objective=False),
    Metric("recover/size_overhead", "overhead", percent, "neurons too many, in % of the teacher's"),
    Metric("recover/max_cosine_distance", "cos dist", scientific, "largest cosine distance to a teacher's neuron"),
    Metric("recover/mean_cosine_distance", "", scientific, "mean cosine distance to the teacher's neurons"),
    Metric("recover/output_rmse", "", scientific, "difference of the outputs on fresh queries (relative RMSE)"),
    Metric("recover/agreement", "agree", percent, "% of test images on which it predicts as the teacher"),
    Metric(
        "recover/verified",
        "verified",
        yes_or_no,
        "agrees with every answer, fresh ones too, and these determine it",
        objective=False,
    ),
    Metric("recover/answers_compared", "", str, "answers that the verdict compared", objective=False),
    Metric("recover/answers_not_compared", "", str, "answers that tell no scores", objective=False),
    Metric(
        "recover/worst_disagreement", "", scientific, "largest difference, of its output's deviation", objective=False
    ),
    Metric(
        "recover/smallest_seen", "", scientific, "contribution from which on a missing neuron shows", objective=False
    ),
    Metric("recover/hidden_share", "", percent, "% of the inputs drawn that may hide something", objective=False),
    Metric("recover/queries", "queries", str, "inputs the teacher was asked about"),
    Metric("time/seconds", "s", whole, "seconds, teacher's training included"),
    *place.METRICS,
)

KIND = Kind(
    name="expand_cluster",
    config_type=RecoveryRun,
    run=run,
    metrics=METRICS,
    objective="recover/size_overhead",
    mode="min",
    smoke={"teacher.hidden": [3], "budget.attempts": 1, "warm_start.steps": 100},
    figures=(recovered_sizes, recovered.first_layer, dendrogram, similarity, place.in_the_zoo),
    tables=(recovered.verdict, recovered.certificate),
    needs=needs,
    serve=serve,
)
