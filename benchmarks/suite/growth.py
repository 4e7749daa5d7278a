"""How time and memory grow when one size is doubled three times: the exponent of cost against size.

Memory is the most that a fresh process holds above what it held before the call (VmHWM).
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.suite.harness import Row, exponent
from distrecon.nets import architecture, initialise
from distrecon.nets.architectures import mlp


def behavioural(models: int, queries: int) -> Callable[[], object]:
    arch = architecture("cnn3")
    theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).requires_grad_()
    inputs = torch.randn(queries, *arch.input_shape)
    return lambda: torch.autograd.grad(arch.forward(theta_BP, inputs).square().mean(), theta_BP)


def wide(hidden: int) -> Callable[[], object]:
    """32 networks of two equal hidden layers: P grows with the square of their width."""
    arch = mlp((64, hidden, hidden, 10))
    theta_BP = initialise(arch, ["kaiming_normal"] * 32, range(32)).requires_grad_()
    inputs = torch.randn(256, 64)
    return lambda: torch.autograd.grad(arch.forward(theta_BP, inputs).square().mean(), theta_BP)


def normal_equations(students: int) -> Callable[[], object]:
    from distrecon.expand_cluster.networks import DenseNet
    from distrecon.nets.activations import activation

    net = DenseNet((16, 16, 1), activation("g"))
    theta_NP = net.random(students, torch.Generator().manual_seed(0))
    x_QI, y_QO = torch.randn(900, 16).double(), torch.randn(900, 1).double()
    return lambda: net.normal_equations(theta_NP, x_QI, y_QO)


SERIES: dict[str, tuple[Callable[[int], Callable[[], object]], tuple[int, ...], Callable[[int], float]]] = {
    "behavioural loss of CNN3 against B (64 queries)": (lambda n: behavioural(n, 64), (4, 8, 16, 32), float),
    "behavioural loss of CNN3 against Q (4 models)": (lambda n: behavioural(4, n), (64, 128, 256, 512), float),
    "forward and backward of MLPs against P (width doubled)": (
        wide, (128, 256, 512, 1024), lambda n: float(mlp((64, n, n, 10)).num_parameters),
    ),
    "students' normal equations against N": (normal_equations, (5, 10, 20, 40), float),
}  # fmt: skip


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def _measure(name: str, size: int, answer: "multiprocessing.Queue[tuple[float, int]]") -> None:
    torch.set_num_threads(1)
    SERIES[name][0](min(SERIES[name][1]))()  # what is loaded and compiled once, at the smallest size
    work = SERIES[name][0](size)
    before, seconds = _high_water(), []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    answer.put((median(seconds), max(0, _high_water() - before)))


def growth(quick: bool) -> list[Row]:
    """Exponents of time and memory, each size in a process of its own."""
    rows, context = [], multiprocessing.get_context("spawn")
    for name, (_, sizes, scale) in list(SERIES.items())[: 1 if quick else None]:
        seconds, memory = [], []
        for size in sizes[:2] if quick else sizes:
            answer: multiprocessing.Queue[tuple[float, int]] = context.Queue()
            process = context.Process(target=_measure, args=(name, size, answer))
            process.start()
            found = answer.get(timeout=600)
            process.join()
            seconds.append(found[0])
            memory.append(found[1])
        measured = [scale(size) for size in sizes[: len(seconds)]]
        grown = [b for b in memory if b > 2**20]
        numbers = {"time_exponent": exponent(measured, seconds)}
        note = f"time ^ {numbers['time_exponent']:.2f}"
        if len(grown) > 1:
            numbers["memory_exponent"] = exponent(measured[-len(grown) :], [float(b) for b in grown])
            note += f", memory ^ {numbers['memory_exponent']:.2f}"
        rows.append(
            Row(name, seconds[-1], note=f"{note}; {memory[-1] / 2**20:.0f} MiB at the largest", numbers=numbers)
        )
    return rows
