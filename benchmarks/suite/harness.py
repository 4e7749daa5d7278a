"""How everything in this suite is measured.

- Ours and the baseline take turns (A B A B ...), after one warm-up each; a ratio is the median over the turns.
- Times are processor seconds of this process, on one thread unless a row says otherwise, so that other work on the
  machine counts little; it still shares caches, which is why only ratios of one run mean anything.
"""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One line of a table. `ratio` is baseline over ours; `low` and `high` are its extremes over the turns."""

    what: str
    ours_seconds: float
    baseline_seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every way in every turn, after one unmeasured call of each."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return seconds


def clock(device: torch.device) -> Callable[[], float]:
    """Processor seconds of this process; wall time on a GPU, once it has done all it was given."""
    if device.type == "cpu":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished


def compare(
    what: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    repeats: int,
    factor: float = 1.0,
    note: str = "",
    device: torch.device = CPU,
) -> Row:
    """One row; `factor` is what the baseline's time has to be multiplied by to be that of equal work."""
    seconds = turns({"baseline": baseline, "ours": ours}, repeats, clock(device))
    ratios = [factor * b / o for b, o in zip(seconds["baseline"], seconds["ours"], strict=True)]
    return Row(
        what,
        median(seconds["ours"]),
        factor * median(seconds["baseline"]),
        median(ratios),
        min(ratios),
        max(ratios),
        note,
    )


def matmul_flops(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of torch's matrix product, with the present number of threads."""
    size = 768 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = turns({"product": lambda: a @ b}, 9, clock(device))["product"]
    return 2 * size**3 / median(seconds)


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of log cost against log size, by least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(costs).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"processor": name, "python": platform.python_version(), "torch": torch.__version__}
