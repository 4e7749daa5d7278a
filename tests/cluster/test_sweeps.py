"""Sweeps on Ray Tune: trials that failed run again when the sweep is run again in its folder."""

import threading
from pathlib import Path

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


@pytest.mark.usefixtures("ray_session")
def test_sweeps_side_by_side_keep_their_own_settings(tmp_path):
    """Also those that start after another sweep of the same kind began."""
    sweeps, folder = [], RunFolder(tmp_path / "run")
    for name, size in (("small", 1), ("large", 3)):
        file = tmp_path / f"{name}.yaml"
        text = SPACE.replace("recoveries", name).replace("[2]", f"[{size}]")
        file.write_text(f"{text}max_concurrent: 1\n")
        sweeps.append(read_space(file, KINDS))
    run_sweeps(sweeps, folder, {}, 0, lambda: None)
    for name, size in (("small", 1), ("large", 3)):
        found = folder.read(name).trials.values()
        assert [trial.metrics["recover/layer_sizes"] for trial in found] == [[size]] * 2
        assert {path.name for path in Path(folder.trials(name)).iterdir()} == {trial.trial for trial in found}


@pytest.mark.usefixtures("ray_session")
def test_leaving_sweeps_ends_their_threads_and_they_can_go_on(tmp_path):
    """A thread that used Ray after its shutdown would end the process with Ray's exit code."""
    file = tmp_path / "space.yaml"
    file.write_text(SPACE.replace("[0, 1]", "[0, 1, 2]") + "max_concurrent: 1\n")
    folder = RunFolder(tmp_path / "run")
    sweeps = [read_space(file, KINDS)]

    def leave():
        if folder.read("recoveries").trials:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweeps(sweeps, folder, {}, 0, leave)
    assert "recoveries" not in {thread.name for thread in threading.enumerate()}
    assert len(folder.read("recoveries").trials) < 3
    run_sweeps(sweeps, folder, {}, 0, lambda: None)
    assert [trial.status for trial in folder.read("recoveries").trials.values()] == ["completed"] * 3
