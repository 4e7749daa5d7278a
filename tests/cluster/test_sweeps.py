"""Sweeps on Ray Tune: trials that failed run again when the sweep is run again in its folder."""

import pytest

from distrecon.cluster.space import read_space
from distrecon.cluster.sweeps import run_sweeps
from distrecon.kinds import KINDS
from distrecon.record.folder import RunFolder

SPACE = """
name: recoveries
kind: expand_cluster
base: {teacher.images: synthetic, teacher.inputs: 3, teacher.hidden: [2], teacher.activation: leaky_relu}
space: {seed: {grid: [0, 1]}}
"""


@pytest.mark.usefixtures("ray_session")
def test_failed_trials_run_again_under_their_own_names(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    folder = RunFolder(tmp_path / "run")
    in_the_way = tmp_path / "run" / "trials" / "recoveries"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where the trials' folder should be")

    def trials():
        run_sweeps([read_space(file, KINDS)], folder, {}, 0, lambda: None)
        found = folder.read("recoveries").trials
        return list(found), [trial.status for trial in found.values()]

    names, statuses = trials()
    assert statuses == ["failed", "failed"]
    in_the_way.unlink()
    assert trials() == (names, ["completed", "completed"])
