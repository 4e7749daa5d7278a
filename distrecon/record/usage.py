"""What a piece of work takes of its machine: metrics `system/...`, which MLflow shows on a page of their own."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def usage(began: float, cpu: float) -> dict[str, float]:
    """Of this process since the monotonic time `began`, when it had used `cpu` seconds: the share of a CPU that it had,
    in percent (threads add up), its peak memory in GiB, and torch's on the GPU where it used one."""
    wall = max(time.monotonic() - began, 1e-9)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    found = {
        "system/cpu_percent": 100 * (cpu_seconds() - cpu) / wall,
        "system/memory_peak_gib": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["system/gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def cpu_seconds() -> float:
    """That this process has used so far."""
    times = os.times()
    return times.user + times.system


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """A dict that is filled when the block ends."""
    began, cpu, found = time.monotonic(), cpu_seconds(), dict[str, float]()
    yield found
    found |= usage(began, cpu)
