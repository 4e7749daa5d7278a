"""Several nodes on one machine: a lost node costs time, not results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent.parent


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
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(set(told["before"])) == workers, "two workers were on one node"
    assert told["victim"] in told["before"]
    assert told["victim"] not in told["after"]
    assert len(set(told["after"])) == min(workers, nodes - 1)
    assert told["epochs"] == [12, 12]
    assert told["steps"][0] == told["steps"][1]
    assert set(told["rows"]) == {told["states"]}, "an epoch saw more or fewer rows than the zoo has"
    assert told["largest_gap"] < tolerance
