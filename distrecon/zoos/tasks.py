"""Runs a function over items as Ray tasks, a bounded number at a time, and yields the results as they come."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_IN_FLIGHT = 1000  # queued tasks: enough for any cluster, and the driver never holds more


def connect() -> None:
    """Starts a local Ray session unless one is running."""
    if not ray.is_initialized():
        ray.init(address="local", log_to_driver=False, include_dashboard=False)


def assigned_device() -> str:
    """`cuda` in a task to which Ray gave a GPU or a share of one, else `cpu`: others' GPUs are not to be touched."""
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU") if ray.is_initialized() else None
    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


def run(
    function: Callable[..., Result], items: Iterable[Item], *shared: Any, resources: dict[str, Any]
) -> Iterator[tuple[Item, Result]]:
    """`function(item, *shared)` for every item, yielded in order of completion; `shared` is sent to Ray once.

    An exception in a task cancels the rest and is raised here as itself; so does leaving the loop.
    """
    connect()
    remote = ray.remote(function).options(max_retries=3, **resources)
    references = [ray.put(value) for value in shared]
    waiting: dict[ray.ObjectRef, Item] = {}
    queue = iter(items)
    try:
        while True:
            while len(waiting) < MAX_IN_FLIGHT and (item := next(queue, None)) is not None:
                waiting[remote.remote(item, *references)] = item
            if not waiting:
                return
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            item = waiting.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            yield item, result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
