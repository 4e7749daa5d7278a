"""Runs a sweep on Tune twice; in the second run the node of a trial's driver dies after the first epoch.

    python driver_loss.py FOLDER

The head may not hold work here, so that the drivers lie on nodes that can be lost. Run by test_nodes.py in a process of
its own, since a test session holds one Ray session. Prints one JSON line.
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

from distrecon.cluster.space import read_space
from distrecon.cluster.sweeps import run_sweeps
from distrecon.kinds import KINDS
from distrecon.record.folder import RunFolder
from distrecon.zoos.settings import SMOKE_ZOO
from distrecon.zoos.train import ensure

EPOCHS = 12  # enough that the node dies in mid-training, also when the machine is slow to notice
SPACE = """
name: seeds
kind: autoencoder
space: {seed: {grid: [0]}}
"""
SETTINGS = {
    **KINDS["autoencoder"].smoke,
    "optim.epochs": EPOCHS,
    "optim.batch_size": 16,
    "resources.cpus_per_worker": 2.0,
    "resources.max_failures": 3,
}


def drivers() -> dict[str, str]:
    """Actor id -> node id of the trials' processes that are alive.

    Ray calls the class of a process's second sweep wrap_function.<locals>.ImplicitFunc.
    """
    return {
        actor["ActorID"]: actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["ActorClassName"].endswith("ImplicitFunc") and actor["State"] == "ALIVE"
    }


def kill_a_drivers_node(cluster: Cluster, folder: RunFolder, seen: dict) -> None:
    victims: list = []
    while not victims:
        time.sleep(0.1)
        if epochs(folder):  # an epoch was told, so its checkpoint is there
            seen["before"] = drivers()
            victims = [node for node in cluster.worker_nodes if node.node_id in seen["before"].values()]
    seen["victim"] = victims[0].node_id
    cluster.remove_node(victims[0], allow_graceful=False)


def sweep(path: Path, space: Path, zoos: dict) -> RunFolder:
    folder = RunFolder(path)
    run_sweeps([read_space(space, KINDS, SETTINGS)], folder, zoos, 0, lambda: None)
    return folder


def final_states(folder: RunFolder) -> dict[int, dict]:
    """Seed -> the last checkpoint of its trial."""
    found = {}
    for trial in folder.read("seeds").trials.values():
        files = (Path(folder.trials("seeds")) / trial.trial).glob("checkpoint_*/training.pt")
        states = [torch.load(file, weights_only=True) for file in files]
        found[trial.config["seed"]] = max(states, key=lambda state: state["epoch"])
    return found


def epochs(folder: RunFolder) -> dict[str, list[int]]:
    """Trial -> the epochs that it reported, in their order; the scores come with the last."""
    told: dict[str, list[int]] = {}
    for event in folder.journal("seeds").read()[0]:
        if event["event"] == "metrics" and "time/models_per_second" in event["metrics"]:
            told.setdefault(event["trial"], []).append(event["epoch"])
    return told


def main(path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    zoos = {"smoke": ensure(SMOKE_ZOO, path / "zoo")}
    space = path / "space.yaml"
    space.write_text(SPACE)
    quiet = sweep(path / "quiet", space, zoos)
    seen: dict = {}
    killer = threading.Thread(target=kill_a_drivers_node, args=(cluster, RunFolder(path / "lossy"), seen), daemon=True)
    killer.start()
    lossy = sweep(path / "lossy", space, zoos)
    killer.join(timeout=5)
    one, two = final_states(quiet), final_states(lossy)
    gaps = [
        (two[seed]["training"]["autoencoder"][name] - tensor).abs().max().item()
        for seed in one
        for name, tensor in one[seed]["training"]["autoencoder"].items()
    ]
    scores = [
        {t.config["seed"]: t.metrics["reconstruct/output_mse"] for t in folder.read("seeds").trials.values()}
        for folder in (quiet, lossy)
    ]
    answer = {
        **seen,
        "started": [sum(e["event"] == "started" for e in f.journal("seeds").read()[0]) for f in (quiet, lossy)],
        "status": [t.status for t in lossy.read("seeds").trials.values()],
        "errors": [t.error for t in lossy.read("seeds").trials.values()],
        "epochs": [epochs(quiet), epochs(lossy)],
        "largest_gap": max(gaps),
        "score_gap": max(abs(scores[0][seed] - scores[1][seed]) for seed in scores[0]),
    }
    print(json.dumps(answer))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
