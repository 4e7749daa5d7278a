"""Trains on nodes with room for one worker each, twice; in the second training one dies after the first epoch.

    python node_loss.py FOLDER NODES WORKERS MIN_WORKERS

Run by test_nodes.py in a process of its own, since a test session holds one Ray session. Prints one JSON line.
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
import torch
from ray._private.state import actors
from ray.cluster_utils import Cluster

from distrecon import config
from distrecon.cluster.training import AutoencoderRun, train_autoencoder
from distrecon.kinds import KINDS
from distrecon.zoos.settings import SMOKE_ZOO
from distrecon.zoos.train import ensure

EPOCHS = 12


def worker_nodes() -> list[str]:
    """Ids of the nodes on which training workers are alive."""
    return [
        actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["ActorClassName"] == "RayTrainWorker" and actor["State"] == "ALIVE"
    ]


def kill_a_node_with_a_worker(cluster: Cluster, folder: Path, left: int, seen: dict) -> None:
    while not list(folder.glob("checkpoint_*/training.pt")):
        time.sleep(0.1)
    seen["before"] = worker_nodes()
    victim = next(node for node in cluster.worker_nodes if node.node_id in seen["before"])
    seen["victim"] = victim.node_id
    cluster.remove_node(victim, allow_graceful=False)
    while seen["victim"] in (nodes := worker_nodes()) or len(nodes) < left:
        time.sleep(0.5)
    seen["after"] = nodes


def final_state(folder: Path) -> dict:
    checkpoints = [torch.load(path, weights_only=True) for path in folder.glob("checkpoint_*/training.pt")]
    return max(checkpoints, key=lambda state: state["epoch"])


def main(folder: Path, nodes: int, workers: int, min_workers: int) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(nodes):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    zoo = ensure(SMOKE_ZOO, folder / "zoo")
    values = {
        **KINDS["autoencoder"].smoke,
        "optim.epochs": EPOCHS,
        "optim.batch_size": 16,
        "resources.num_workers": workers,
        "resources.min_workers": min_workers,
        "resources.cpus_per_worker": 2.0,  # one worker fills a node, and the head cannot hold one
        "resources.max_failures": 3,
    }
    run = config.replace(AutoencoderRun(), values)
    quiet = train_autoencoder(run, [zoo], str(folder), "quiet")
    seen: dict = {}
    arguments = (cluster, folder / "lossy", min(workers, nodes - 1), seen)
    killer = threading.Thread(target=kill_a_node_with_a_worker, args=arguments, daemon=True)
    killer.start()
    lossy = train_autoencoder(run, [zoo], str(folder), "lossy")
    killer.join(timeout=5)
    one, two = final_state(folder / "quiet"), final_state(folder / "lossy")
    gaps = [
        (two["training"]["autoencoder"][name] - tensor).abs().max().item()
        for name, tensor in one["training"]["autoencoder"].items()
    ]
    rows = [metrics["data/rows"] for result in (quiet, lossy) for _, metrics in result.best_checkpoints]
    answer = {
        **seen,
        "epochs": [one["epoch"], two["epoch"]],
        "steps": [s["training"]["steps_done"] for s in (one, two)],
    }
    print(json.dumps({**answer, "largest_gap": max(gaps), "rows": rows, "states": len(zoo.rows("train"))}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
