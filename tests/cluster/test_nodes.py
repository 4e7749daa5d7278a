"""Several nodes on one machine: a lost node costs time, not results."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

CHECKOUT = Path(__file__).resolve().parent.parent.parent


SHARED = """
import sys
import ray
from ray.cluster_utils import Cluster
from distrecon.cluster.session import check_shared
from distrecon.errors import UserError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
shared, absent = sys.argv[1:]
check_shared([absent])  # one node alone sees whatever it sees
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
check_shared([])
check_shared([shared])
try:
    check_shared([shared, absent])
except UserError as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


def answer(stdout: str) -> dict:
    """The line of JSON among what Ray says."""
    (line,) = [line for line in stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.slow
def test_a_folder_that_another_node_does_not_see_is_refused_in_a_line(tmp_path):
    """Nodes of one machine see the same files: what another machine would lack is a folder that is not there."""
    absent = tmp_path / "absent"
    done = subprocess.run(
        [sys.executable, "-c", SHARED, str(tmp_path), str(absent)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if "does not see" in line]
    assert str(absent) in line
    assert "s3://" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "workers", "min_workers", "tolerance"),
    [(3, 2, 0, 1e-5), (3, 3, 1, 2e-4)],
    ids=["another-node-takes-over", "elastic"],
)
def test_a_training_that_loses_a_node_ends_like_an_undisturbed_one(tmp_path, nodes, workers, min_workers, tolerance):
    """Elastic: three workers, of which the two that are left go on; their sums are rounded in another order."""
    script = Path(__file__).with_name("node_loss.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(nodes), str(workers), str(min_workers)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = answer(done.stdout)
    assert len(set(told["before"])) == workers, "two workers were on one node"
    assert told["victim"] in told["before"]
    assert told["victim"] not in told["after"]
    assert len(set(told["after"])) == min(workers, nodes - 1)
    assert told["epochs"] == [12, 12]
    assert told["steps"][0] == told["steps"][1]
    assert set(told["rows"]) == {told["states"]}, "an epoch saw more or fewer rows than the zoo has"
    assert told["largest_gap"] < tolerance


@pytest.mark.slow
def test_a_sweep_goes_on_without_the_node_of_a_trials_driver(tmp_path):
    """Through Tune: the trial begins again on another node, from its last epoch, and ends as if nothing was."""
    script = Path(__file__).with_name("driver_loss.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = answer(done.stdout)
    assert told["victim"] in told["before"].values()
    assert told["started"][0] == 1
    assert told["started"][1] > 1, "the trial did not begin again"
    assert told["status"] == ["completed"], told["errors"]
    for epochs in told["epochs"][1].values():
        assert epochs == sorted(set(epochs)), "a finished epoch was trained again"
        assert epochs[-1] == 12
    assert told["largest_gap"] < 1e-5
    assert told["score_gap"] < 1e-5


@pytest.mark.slow
def test_a_sweep_on_gpus_that_come_when_they_are_asked_for(tmp_path):
    """From a head without GPUs: the autoscaler starts nodes, both are used, and nothing needs a real GPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).with_name("autoscaling_cluster.py")
    tune = "-m distrecon.tune --use-gpu --set resources.device=cpu --smoke --address auto --out out".split()
    tune += ["--set", "optim.epochs=200"]  # so long that the second node is there before the first trial has ended
    done = subprocess.run(
        [sys.executable, str(script), str(port), sys.executable, *tune],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = answer(done.stdout)
    assert len(told["workers"]) == 2, "the sweep's two autoencoder trials shared a node"
    assert set(told["workers"]) <= set(told["nodes"])
