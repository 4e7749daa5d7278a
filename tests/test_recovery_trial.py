"""One recovery trial without Ray: synthetic teachers."""

import numpy as np
import pytest

from distrecon.errors import UserError
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


@pytest.mark.parametrize(("values", "message"), [({"hidden": (2, 2)}, "one layer"), ({"inputs": 0}, "teacher.inputs")])
def test_wrong_synthetic_teachers_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        TeacherConfig(images="synthetic", **values)
