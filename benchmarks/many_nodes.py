"""What more nodes cost: Ray clusters of 1, 8 and 16 nodes on this machine, a worker on each, the zoo in a bucket.

Each node is a raylet of its own with one CPU, and gets the zoo's address and nothing else. Zoo and batch grow with the
nodes, so that a worker's step and share stay the same; its network is as small as can be, and what is left is overhead.
All nodes share this machine's cores: wall times are what a machine under N times the load needs, processor seconds of a
worker and bytes sent are what nodes of their own would need too.
"""

import logging
import os
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from benchmarks.harness import CPU, Cell, Options, Part, Row, Table, value
from benchmarks.pipeline import ray_processes
from benchmarks.remote import BUCKET, late_store
from benchmarks.zoos import ARCH, random_zoo
from distrecon import config as configuration
from distrecon.autoencoder.model import ZooSample
from distrecon.autoencoder.training import Training
from distrecon.cluster.training import AutoencoderRun, sample_of, train_epochs
from distrecon.errors import UserError
from distrecon.record.usage import cpu_seconds
from distrecon.zoos import open_zoo
from distrecon.zoos.stream import plan

STATES = 3_200  # of each worker's share: 15 MiB
MODELS = 32  # of each worker in a step
NODE_MIB = 1_000  # of memory, of all of a node's processes
HELD = 2**30  # bytes of models that a worker may keep: its share, which it reads once
STORE_BYTES = 100 * 2**20  # of a node's object store
SMALL = {
    "loss.terms": "S", "model.width": 8, "model.layers": 1, "model.heads": 1, "model.latent": 4, "data.align": False,
    "data.views": "none",
}  # fmt: skip


@ray.remote(num_cpus=1)
class Worker:
    """One rank of a training, on a node of its own."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def begin(self, address: str, rank: int, world: int, meeting: str, epochs: int) -> None:
        """Opens the zoo and makes the training, as `cluster.training` does."""
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"tcp://{meeting}", rank=rank, world_size=world)
        run = configuration.replace(
            AutoencoderRun(), SMALL | {"optim.batch_size": world * MODELS, "optim.epochs": epochs}
        )
        zoo = open_zoo(address)
        sample = ZooSample(zoo.architecture, sample_of(zoo, 0, CPU), zoo.images())
        self.steps = plan([zoo], batch_size=world * MODELS).steps(0)
        training = Training(run.autoencoder, [sample], epochs * self.steps)
        self.epochs = train_epochs(run, [zoo], training, 1, rank, world, HELD)

    def epoch(self) -> dict[str, float]:
        """Trains one; seconds of this process's processors and of waiting for data, and how many steps."""
        cpu, start = cpu_seconds(), time.monotonic()
        metrics = next(self.epochs)[1]
        wall = time.monotonic() - start
        waited = metrics["time/data_wait_share"] * wall
        return {"cpu": cpu_seconds() - cpu, "waited": waited, "steps": self.steps, "rows": metrics["data/rows"]}


def cluster_of(nodes: int, seconds: dict[str, float]) -> Any:
    """Ray with so many nodes of one CPU each; the driver is on a head of its own, which takes no work."""
    from ray.cluster_utils import Cluster

    start = time.monotonic()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    for _ in range(nodes):
        cluster.add_node(wait=False, num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes(timeout=600)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    seconds["cluster"] = time.monotonic() - start
    return cluster


def trained(nodes: int, epochs: int, milliseconds: float) -> list[Row]:
    """A training on so many nodes: its start, and of an epoch after the first what a worker spends."""
    free = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")) // 1024
    if free < nodes * NODE_MIB:
        raise UserError(f"{nodes} nodes take {nodes * NODE_MIB} MiB of memory, {free} are free: --nodes with fewer")
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    seconds: dict[str, float] = {}
    with late_store("moto", milliseconds) as late:
        with tempfile.TemporaryDirectory() as folder:
            random_zoo(Path(folder), nodes * STATES, size=STATES)
            pafs.copy_files(folder, f"{BUCKET}/zoo", destination_filesystem=late.direct)
        cluster = cluster_of(nodes, seconds)
        try:
            start = time.monotonic()
            group = placement_group([{"CPU": 1}] * nodes, "STRICT_SPREAD")
            workers = [
                Worker.options(  # type: ignore[attr-defined]
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=n)
                ).remote()
                for n in range(nodes)
            ]
            assert len(set(ray.get([worker.node.remote() for worker in workers]))) == nodes
            seconds["workers"] = time.monotonic() - start
            address = f"s3://{BUCKET}/zoo?endpoint_override={late.address}&scheme=http&region=us-east-1"
            asked = [late.asked()]
            meeting = f"127.0.0.1:{_free_port()}"
            ray.get([w.begin.remote(address, rank, nodes, meeting, epochs) for rank, w in enumerate(workers)])
            asked.append(late.asked())
            seconds["begin"] = time.monotonic() - start - seconds["workers"]
            found, walls = [], []
            for _ in range(epochs):
                start = time.monotonic()
                found.append(ray.get([worker.epoch.remote() for worker in workers]))
                walls.append(time.monotonic() - start)
                asked.append(late.asked())
            memory = sum(_proportional(pid) for pid, _ in ray_processes())
        finally:
            ray.shutdown()
            cluster.shutdown()
    assert {each["rows"] for epoch in found for each in epoch} == {nodes * STATES}
    later, steps = found[1:], sum(epoch[0]["steps"] for epoch in found[1:])
    before, read = ({k: b[k] - a[k] for k in b} for a, b in ((asked[0], asked[1]), (asked[1], asked[-1])))
    return [
        {
            **{f"{what}_seconds": spent for what, spent in seconds.items()},
            "first_epoch_seconds": walls[0],
            "step_ms": 1e3 * sum(walls[1:]) / steps,
            "step_cpu_ms": 1e3 * sum(each["cpu"] for epoch in later for each in epoch) / nodes / steps,
            "waited": sum(each["waited"] for epoch in later for each in epoch) / nodes / sum(walls[1:]),
            "begin_mib": before["bytes"] / nodes / 2**20,
            "read_mib": read["bytes"] / nodes / 2**20,
            "share_mib": STATES * 4 * ARCH.num_parameters / 2**20,
            "requests": (sum(before.values()) + sum(read.values()) - before["bytes"] - read["bytes"]) / nodes,
            "node_mib": memory / nodes / 2**20,
        }
    ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _proportional(pid: str) -> int:
    """Bytes of a process, of shared pages its part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def cells(args: Namespace) -> Iterator[Cell]:
    for nodes in (1, 2) if args.quick else args.nodes:
        key = {"nodes": nodes, "epochs": args.epochs, "latency": args.latency}
        yield Cell(key, partial(trained, nodes, args.epochs, args.latency))


_tenth, _whole = "{:.1f}".format, "{:,.0f}".format
TABLE = Table(
    (
        value("cluster, s", "cluster_seconds", _whole),
        value("workers, s", "workers_seconds", _whole),
        value("begin, s", "begin_seconds", _tenth),
        value("first epoch, s", "first_epoch_seconds", _tenth),
        value("step, ms", "step_ms", _tenth),
        value("CPU ms of a worker's step", "step_cpu_ms", _tenth),
        value("waiting for data", "waited", "{:.0%}".format),
        value("MiB a node before the first step", "begin_mib", _tenth),
        value("MiB a node in all epochs", "read_mib", _tenth),
        value("its share, MiB", "share_mib", _tenth),
        value("requests a node", "requests", _tenth),
        value("MiB of memory a node", "node_mib", _whole),
    ),
    by=lambda row: str(row["nodes"]),
    heading="nodes",
)
OPTIONS: Options = {
    "--nodes": {"type": int, "nargs": "+", "default": [1, 8, 16]},
    "--epochs": {"type": int, "default": 3},
    "--latency": {"type": float, "default": 0.0, "help": "milliseconds before each of the bucket's answers"},
}
PARTS = {"many_nodes": Part(cells, (TABLE,), OPTIONS)}
