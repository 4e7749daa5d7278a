"""Runs a function over items: as Ray tasks where this process has joined a cluster, in threads of its own elsewhere."""

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(4, os.cpu_count() or 1)


def joined() -> bool:
    """Whether Ray runs; it is not imported to find out."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def run(
    function: Callable[..., Result], items: Iterable[Item], *shared: Any, threads: int = THREADS
) -> Iterator[tuple[Item, Result]]:
    """`function(item, *shared)` for every item, yielded in order of completion, a bounded number at a time.

    An exception is raised here as itself, after what is under way.
    """
    if joined():
        from distrecon.zoos import tasks

        yield from tasks.run(function, items, *shared, resources={"num_cpus": 1})
        return
    queue = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: dict[Future[Result], Item] = {}
        while True:
            for item in itertools.islice(queue, 2 * threads - len(waiting)):
                waiting[pool.submit(function, item, *shared)] = item
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
