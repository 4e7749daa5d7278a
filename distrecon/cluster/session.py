"""Connecting to Ray: a private local session, or a running cluster by address. Once per process."""

import contextlib
import functools
import json
import logging
import os
import platform
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from distrecon.errors import UserError

QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal is the record
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",  # sweeps queue for each other's CPUs by design
    "RAY_worker_maximum_startup_concurrency": "8",  # trials start several small processes each; fewer is warned about
}

IDLE = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}  # of a node's processes beyond one a CPU; Ray's second
# would end a reading process between two windows, and the next one takes seconds to import what it needs


def connect(address: str | None, *, verbose: bool = False) -> None:
    """Starts a local Ray session, or joins the cluster at `address` ("auto", "host:port").

    A local session listens on the loopback interface only and asks for a token that other users cannot read.
    Raises UserError when nothing answers at the address.
    """
    if not verbose:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning)
    for name, value in IDLE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # objectives come with a trial's last report
    import ray

    if address is not None:
        _check_reachable(address)
    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level, "configure_logging": True}
    if address is None:
        with _private_files():
            ray.init(address="local", _node_ip_address="127.0.0.1", **options)
    else:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"--address {address}: cannot join a Ray cluster there ({reason})") from None
    if not verbose:
        for name in ("ray", "ray.data", "ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are in the journal


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Ray writes its token with the process's umask; make that readable by this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _check_reachable(address: str) -> None:
    """A quick refusal: Ray itself retries a dead address for a minute."""
    host, colon, port = address.rpartition(":")
    if address == "auto" or "://" in address:
        return
    if not colon or not port.isdigit():
        raise UserError(f"--address {address}: wanted auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"--address {address}: nothing answers there ({error})") from None


def connected() -> bool:
    """Whether this process has joined Ray; asking does not load it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def available() -> dict[str, float]:
    """What the whole cluster has: {"CPU": ..., "GPU": ...}."""
    import ray

    resources = ray.cluster_resources()
    return {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}


def grows() -> bool:
    """Whether an autoscaler starts nodes when work waits for them; Ray does not tell how many, or of what kind.

    Ray reports every node's type. Without an autoscaler each node is a type of its own, named after it.
    """
    import ray

    return _grows(ray.get_runtime_context().gcs_address)


@functools.cache  # a cluster gets no autoscaler later
def _grows(cluster: str) -> bool:
    import ray
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    node: Any = ray._private.worker._global_node
    if node is not None and node.is_head():  # a session of this process: nothing adds nodes to it
        return False
    types = _node_types_v2() if is_autoscaler_v2() else _node_types()
    return any(kind and not kind.startswith("node_") for kind in types)


def _node_types(seconds: float = 20.0) -> set[str]:
    """The types of the autoscaler's nodes; on a cluster that has just started, when it has told them."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    end = time.monotonic() + seconds
    while True:
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report") or {}
        named = set((report.get("node_type_mapping") or {}).values())
        types = named | set(report.get("active_nodes") or ()) | set(report.get("pending_launches") or ())
        if types or time.monotonic() > end:
            return types
        time.sleep(0.5)


def _node_types_v2() -> set[str]:
    """The same of the second autoscaler, which is KubeRay's: only its nodes are given a type when they start."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}


HEAD = "node:__internal_head__"  # Ray's own name of the resource that the head alone has


def on_head() -> dict[str, float]:
    """What a process reserves to lie on the head, whose loss ends the cluster anyway; {} where it takes no work."""
    import ray

    heads = [node["Resources"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
    return {HEAD: 1e-4} if any(resources.get("CPU", 0) >= 1 for resources in heads) else {}


def check_shared(paths: Sequence[str]) -> None:
    """UserError that names a file or folder of this machine which another node of the cluster does not see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here}
    if not paths:
        return
    look = ray.remote(num_cpus=0, max_retries=0)(_seen)
    asked = {
        node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths)
        for node in others
    }
    for node, answer in asked.items():
        try:
            seen = ray.get(answer, timeout=60)
        except (ray.exceptions.RayError, TimeoutError):
            continue  # a node that is leaving, or too busy to answer, has no say
        for path, there in zip(paths, seen, strict=True):
            if not there:
                raise UserError(
                    f"the node {others[node]} does not see {path}: on several nodes zoos and --storage must lie "
                    "on s3://... or in a folder that all nodes share"
                )


def _seen(paths: Sequence[str]) -> list[bool]:
    return [os.path.exists(path) for path in paths]


def memory() -> float:
    """Bytes that a process may use: those of the cluster's largest node for work, or this machine's without Ray."""
    if not connected():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    import ray

    return max(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"])


def machine() -> str:
    """What the work runs on, for people: the cluster's CPUs and GPUs, or this process's without Ray."""
    has = available() if connected() else {"CPU": float(os.cpu_count() or 1), "GPU": 0.0}
    return f"{has['CPU']:g} CPUs, {has['GPU']:g} GPUs, {platform.system()} {platform.machine()}"
