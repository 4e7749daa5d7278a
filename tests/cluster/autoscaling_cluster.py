"""A Ray cluster on one machine: a head of two CPUs alone, and simulated GPU nodes that come when work waits for them.

    python autoscaling_cluster.py PORT COMMAND...

runs the command with the cluster up (its address in RAY_ADDRESS), prints the ids of the nodes on which training workers
ran as its last line, in JSON, and exits as the command does. Ray's own `fake_multinode`
provider: nodes are processes of this machine, their GPUs a number. The processes of this session alone are ended.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
HEAD = "ray.head.default"  # as the provider calls it
NO_COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def configuration(address: str, nodes: int) -> dict:
    """What `ray up` would hand the head: `nodes` nodes of one CPU and one GPU at most, none to begin with."""
    worker = {"CPU": 1, "GPU": 1, "object_store_memory": 200 * 2**20}
    return {
        "cluster_name": "fake_multinode",
        "max_workers": nodes,
        # all nodes have one address, and there is no machine behind them to log in to
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
        },
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in NO_COMMANDS},
        "available_node_types": {
            HEAD: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": nodes},
        },
    }


def start(folder: Path, port: int, nodes: int, environment: dict[str, str]) -> subprocess.Popen:
    config = folder / "cluster.json"
    config.write_text(json.dumps(configuration(f"127.0.0.1:{port}", nodes)))
    busy = {"AUTOSCALER_HEARTBEAT_TIMEOUT_S": "900"}  # a busy machine's node is not a lost one
    environment = {**environment, **busy, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    command = [
        RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", "--block",
        "--include-dashboard=false", f"--autoscaling-config={config}", "--object-store-memory=300000000",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    with (folder / "ray.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(environment: dict[str, str], seconds: float = 120) -> None:
    """Until the head answers."""
    end = time.monotonic() + seconds
    while (asked := subprocess.run([RAY, "status"], env=environment, capture_output=True, text=True)).returncode:
        if time.monotonic() > end:
            raise TimeoutError(asked.stderr)
        time.sleep(1)


def stop(head: subprocess.Popen) -> None:
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(head.pid)], capture_output=True, text=True).stdout
    for pid in listed.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    head.wait()


def nodes_of_workers() -> dict[str, list[str]]:
    """The nodes on which training workers ran, and those that the cluster has had with a GPU or lost since."""
    import ray
    from ray._private.state import actors

    ray.init(address="auto", logging_level="error", log_to_driver=False)
    workers = [actor for actor in actors().values() if actor["ActorClassName"] == "RayTrainWorker"]
    found = {
        "workers": sorted({actor["Address"]["NodeID"] for actor in workers}),
        "nodes": sorted(n["NodeID"] for n in ray.nodes() if "node:__internal_head__" not in n["Resources"]),
    }
    ray.shutdown()
    return found


def main(port: int, command: list[str], nodes: int = 2) -> int:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = start(Path(folder), port, nodes, environment)
        try:
            wait(environment)
            code = subprocess.run(command, env=environment).returncode
            os.environ.update(environment)
            print(json.dumps(nodes_of_workers()), flush=True)
            return code
        finally:
            stop(head)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
