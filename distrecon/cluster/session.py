"""Connecting to Ray: a private local session, or a running cluster by address. Once per process."""

import contextlib
import logging
import os
import platform
import socket
import sys
import warnings
from collections.abc import Iterator
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


def connect(address: str | None, *, verbose: bool = False) -> None:
    """Starts a local Ray session, or joins the cluster at `address` ("auto", "host:port").

    A local session listens on the loopback interface only and asks for a token that other users cannot read.
    Raises UserError when nothing answers at the address.
    """
    if not verbose:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning)
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


def largest() -> dict[str, float]:
    """What the cluster can grow to where an autoscaler's configuration says so, else what it has."""
    from ray._private.state import (
        state,
    )  # the only place that knows the autoscaler's limits; Ray's libraries use it too

    limits = state.get_max_resources_from_cluster_config() or {}
    return {name: max(amount, float(limits.get(name, 0))) for name, amount in available().items()}


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
