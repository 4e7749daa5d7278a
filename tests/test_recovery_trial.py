"""One recovery trial without Ray: synthetic teachers, and what the scores of a trained one are taken on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distrecon import images
from distrecon.errors import UserError
from distrecon.expand_cluster import Recovery
from distrecon.kinds import expand_cluster
from distrecon.kinds.expand_cluster import RecoveryRun, TeacherConfig, run
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
