"""How time and memory grow when one size is doubled three times: the exponent of cost against size.

Memory is the most that a fresh process holds (VmHWM) above what it held after the same work at an eighth of the least
size.
"""

import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.harness import Row, exponent, memory, speed, timing
from benchmarks.solvers import RULE, clouds
from benchmarks.steps import stepper, training_of
from benchmarks.zoos import random_models
from distrecon.autoencoder import losses
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import average_linkage, best_cut, cluster
from distrecon.images import load
from distrecon.nets import Architecture, activation, architecture, evaluate, fit, permute, random_permutation
from distrecon.nets.known import mlp

Work = Callable[[], object]


def _gradient(arch: Architecture, models: int, queries: int) -> Work:
    theta_BP = random_models(arch, models).requires_grad_()
    inputs = torch.randn(queries, *arch.input_shape)
    return lambda: torch.autograd.grad(arch.forward(theta_BP, inputs).square().mean(), theta_BP)


def _wide(hidden: int) -> Architecture:
    """Two equal hidden layers: P grows with the square of their width."""
    return mlp((64, hidden, hidden, 10))


def _tokens(arch: Architecture, models: int) -> Work:
    theta_BP = random_models(arch, models)
    order = random_permutation(arch, torch.Generator().manual_seed(0), models)
    return lambda: arch.detokenize(arch.tokenize(permute(arch, theta_BP, order)))


def _contrastive(models: int) -> Work:
    local_2BJ = torch.randn(2, models, 30).requires_grad_()
    return lambda: torch.autograd.grad(losses.contrastive(local_2BJ, local_2BJ, 0, 0.1).mean(), local_2BJ)


def _step(models: int, queries: int) -> Work:
    return stepper(training_of(False, models, queries=queries))


def _zoo(models: int, count: int) -> Work:
    arch, train = architecture("cnn_small"), load("digits").train
    theta_BP, lr_B = random_models(arch, models), torch.full((models,), 1e-3)
    images, labels_Q = train.images[:count], train.labels_Q[:count]
    return lambda: list(fit(arch, theta_BP, images, labels_Q, epochs=1, lr_B=lr_B))


def _evaluation(models: int, queries: int) -> Work:
    arch = architecture("cnn_small")
    theta_BP, inputs = random_models(arch, models), torch.randn(queries, *arch.input_shape)
    labels_Q = torch.zeros(queries, dtype=torch.long)
    return lambda: evaluate(arch, theta_BP, inputs, labels_Q)


def _equations(students: int, queries: int, hidden: int) -> Work:
    net = DenseNet((16, hidden, 1), activation("g"))
    theta_NP = net.random(students, torch.Generator().manual_seed(0))
    x_QI, y_QO = torch.randn(queries, 16).double(), torch.randn(queries, 1).double()
    return lambda: net.normal_equations(theta_NP, x_QI, y_QO)


def _cut(count: int) -> Work:
    pool = clouds(count)
    merges = average_linkage(pool.vectors_VK, "none")
    return lambda: best_cut(merges, pool, False, RULE)


def _clustering(count: int) -> Work:
    pool = clouds(count)
    return lambda: cluster(pool, "none", RULE)


@dataclass(frozen=True)
class Series:
    """`prepare` returns the work of one size; `scale` is what the exponent is taken in."""

    prepare: Callable[[int], Work]
    sizes: tuple[int, int, int, int]
    scale: Callable[[int], float] = float


SERIES = {
    "behavioural loss of CNN3 against B (64 queries)": Series(
        lambda n: _gradient(architecture("cnn3"), n, 64), (4, 8, 16, 32)
    ),
    "behavioural loss of CNN3 against Q (4 models)": Series(
        lambda n: _gradient(architecture("cnn3"), 4, n), (64, 128, 256, 512)
    ),
    "behavioural loss of 32 MLPs against P (256 queries)": Series(
        lambda n: _gradient(_wide(n), 32, 256), (128, 256, 512, 1024), lambda n: _wide(n).num_parameters
    ),
    "demo step of the autoencoder against B (256 queries)": Series(lambda n: _step(n, 256), (16, 32, 64, 128)),
    "demo step of the autoencoder against Q (32 models)": Series(lambda n: _step(32, n), (64, 128, 256, 512)),
    "permute, tokenise, detokenise cnn_small against B": Series(
        lambda n: _tokens(architecture("cnn_small"), n), (128, 256, 512, 1024)
    ),
    "permute, tokenise, detokenise 32 MLPs against P": Series(
        lambda n: _tokens(_wide(n), 32), (64, 128, 256, 512), lambda n: _wide(n).num_parameters
    ),
    "contrastive loss against B": Series(_contrastive, (128, 256, 512, 1024)),
    "an epoch of zoo training against B (256 images)": Series(lambda n: _zoo(n, 256), (32, 64, 128, 256)),
    "an epoch of zoo training against Q, the images (64 models)": Series(lambda n: _zoo(64, n), (125, 250, 500, 1000)),
    "evaluation of cnn_small against B (512 images)": Series(lambda n: _evaluation(n, 512), (64, 128, 256, 512)),
    "evaluation of cnn_small against Q (64 models)": Series(lambda n: _evaluation(64, n), (512, 1024, 2048, 4096)),
    "students' normal equations against N": Series(lambda n: _equations(n, 900, 16), (5, 10, 20, 40)),
    "students' normal equations against Q": Series(lambda n: _equations(10, n, 16), (450, 900, 1800, 3600)),
    "students' normal equations against P (width doubled)": Series(
        lambda n: _equations(10, 900, n), (8, 16, 32, 64), lambda n: 18 * n + 1
    ),
    "cut of a tree against V, the vectors": Series(_cut, (1000, 2000, 4000, 8000)),
    "whole clustering against V, the vectors": Series(_clustering, (500, 1000, 2000, 4000)),
}


def _measure(name: str, size: int) -> tuple[float, int]:
    """Seconds and bytes, in a fresh process."""
    torch.set_num_threads(1)
    series = SERIES[name]
    series.prepare(max(1, min(series.sizes) // 8))()  # what is loaded and compiled once, with little memory
    work = series.prepare(size)
    before, seconds = memory("VmHWM"), []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return median(seconds), max(0, memory("VmHWM") - before)


def growth(args: Namespace, name: str) -> list[Row]:
    """Exponents of time and memory of one series, each size in a process of its own."""
    context, series = multiprocessing.get_context("forkserver"), SERIES[name]
    context.set_forkserver_preload([__name__])  # imported once; no process has worked yet when it is forked
    found, sizes = [], series.sizes[:2] if args.quick else series.sizes
    for size in sizes:
        with ProcessPoolExecutor(1, context) as pool:
            found.append(pool.submit(_measure, name, size).result())
    print(f"measured: {name}", file=sys.stderr, flush=True)
    seconds, held = zip(*found, strict=True)
    return [_row(name, sizes, [series.scale(size) for size in sizes], seconds, held)]


def _row(
    name: str, sizes: Sequence[int], scales: Sequence[float], seconds: Sequence[float], held: Sequence[int]
) -> Row:
    """Memory below a MiB is not told apart from the process's own."""
    numbers = {"time_exponent": exponent(scales, seconds)}
    note = f"{sizes[0]:,} to {sizes[-1]:,}: time ^ {numbers['time_exponent']:.2f}"
    if min(held[-2:]) > 2**20:
        grown = [i for i, most in enumerate(held) if most > 2**20]
        numbers["memory_exponent"] = exponent([scales[i] for i in grown], [float(held[i]) for i in grown])
        note += f", memory ^ {numbers['memory_exponent']:.2f}"
    return timing(name, seconds[-1], note=f"{note}; {held[-1] / 2**20:.0f} MiB at the largest", **numbers)


PARTS = {"growth": speed(growth, [(name,) for name in SERIES], [(next(iter(SERIES)),)])}
