"""One recovery trial: a teacher network, trained on an image set or drawn, is recovered from its answers alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon import images
from distrecon.cluster.kinds import SYNTHETIC, RecoveryRun, TeacherConfig
from distrecon.expand_cluster import Recovery, network, recover_network, score
from distrecon.expand_cluster.teachers import synthetic_problem, train_teacher
from distrecon.expand_cluster.weights import Weights


def recover_teacher(run: RecoveryRun, folder: Path) -> dict[str, Any]:
    """Makes the teacher, recovers and scores it; leaves the network and the arrays for figures in `folder`.

    The recovery sees the training images and what it asks the teacher; the scores use the test images and the teacher.
    """
    torch.set_num_threads(max(1, int(run.resources.cpus_per_worker)))
    teacher, train_QI, test_QI = _teacher(run.teacher)
    recovery = recover_network(
        network(teacher, run.teacher.activation),
        input_size=teacher[0][0].shape[1],
        activation=run.teacher.activation,
        hidden_layers=len(run.teacher.hidden),
        seed=run.seed,
        config=run,
        data=train_QI,
    )
    metrics = recovery.metrics | score(recovery, teacher, test_QI)
    recovery.save(folder / "network.safetensors")
    np.savez_compressed(folder / "arrays.npz", allow_pickle=False, **clustering_arrays(recovery))
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
