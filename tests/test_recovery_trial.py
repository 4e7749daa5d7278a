"""One recovery trial without Ray: synthetic teachers, scores of trained ones, the clustering shown."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distrecon import images
from distrecon.errors import UserError
from distrecon.expand_cluster import Recovery
from distrecon.kinds import expand_cluster
from distrecon.kinds.expand_cluster import RecoveryRun, TeacherConfig, run
from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Trial


@pytest.mark.parametrize(("activation", "clustered"), [("tanh", True), ("leaky_relu", False)])
def test_a_synthetic_teacher_is_recovered_and_scored(tmp_path, activation, clustered):
    """Students' neurons are clustered; the bends of one layer of leaky_relu are not."""
    teacher = TeacherConfig(images="synthetic", inputs=4, hidden=(2,), activation=activation, seed=3)
    metrics = run(RecoveryRun(teacher=teacher), Trial("0", {}, str(tmp_path), tmp_path))
    assert metrics["recover/verified"] == 1
    assert metrics["recover/layer_sizes"] == [2]
    assert metrics["recover/max_cosine_distance"] < 1e-6
    assert (tmp_path / "network.safetensors").exists()
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert ("layer1_cluster" in arrays) == clustered
        assert not clustered or set(arrays["layer1_cluster"]) >= {0, 1}


def test_agreement_is_counted_on_test_images(tmp_path, monkeypatch):
    """The teacher tells x > 0 from the rest, what was recovered x > 1: they differ on two of four test images."""

    def threshold(x):
        return [
            (torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([-x], dtype=torch.float64)),
            (torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)),
        ]

    def split(*pixels):
        return SimpleNamespace(images=torch.tensor(pixels).view(-1, 1, 1, 1), labels_Q=torch.zeros(len(pixels)).long())

    asked = {}

    def recover(network, **settings):
        asked.update(settings)
        return Recovery(threshold(1.0), "tanh", verified=False, reason="off by one")

    pictures = SimpleNamespace(train=split(-2.0, 3.0), test=split(-1.0, 0.25, 0.75, 2.0))
    monkeypatch.setattr(images, "load", lambda name: pictures)
    monkeypatch.setattr(expand_cluster, "train_teacher", lambda *settings: threshold(0.0))
    monkeypatch.setattr(expand_cluster, "recover_network", recover)
    config = RecoveryRun(teacher=TeacherConfig(hidden=(1,)))
    metrics = run(config, Trial("0", {}, str(tmp_path), tmp_path))
    assert metrics["recover/agreement"] == 0.5
    assert asked["data"].flatten().tolist() == [-2.0, 3.0]  # the recovery sees none of them


@pytest.mark.parametrize(("values", "message"), [({"hidden": (2, 2)}, "one layer"), ({"inputs": 0}, "teacher.inputs")])
def test_wrong_synthetic_teachers_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        TeacherConfig(images="synthetic", **values)


@pytest.mark.parametrize(("merges", "shown"), [({"few": 1}, None), ({"few": 1, "some": 2, "most": 3}, "most")])
def test_the_clustering_shown_is_the_one_of_most_vectors_and_a_pair_is_none(merges, shown):
    """Merges of n + 1 vectors in a chain; two vectors have nothing to be cut from."""
    sweep = SweepRecord("students", "expand_cluster", "recover/max_cosine_distance", "min")
    arrays = {}
    for name, count in merges.items():
        sweep.apply({"event": "started", "trial": name, "config": {"students.count": name}, "time": 0.0})
        event = {"event": "metrics", "trial": name, "epoch": 1, "metrics": {"recover/layer_sizes": [2]}, "time": 1.0}
        sweep.apply(event)
        chain = [[0 if i == 0 else count + i, i + 1, 10.0 ** (i - 5), i + 2] for i in range(count)]
        cluster_V = np.zeros(count + 1, int)
        arrays[name] = {"layer1_merges": np.array(chain), "layer1_cut": np.array(0.1), "layer1_cluster": cluster_V}
    drawing = expand_cluster.dendrogram(sweep, arrays)
    assert (drawing and drawing.title) == (shown and f"Clustering of the students' neurons (students.count {shown})")
