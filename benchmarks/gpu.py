"""What only a GPU has: bfloat16, torch.compile, CUDA graphs, and the share of the device's peak that is reached.

Peak is the rate of a large matrix product of the same number type on the same device. All ways of one network take
turns, so that the fastest says what pays.
"""

from argparse import Namespace
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.harness import Row, clock, matmul_flops, speed, timing, turns
from benchmarks.networks import flops
from benchmarks.steps import paper_step
from benchmarks.zoos import random_models
from distrecon.nets import Architecture, architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gpu(args: Namespace) -> list[Row]:
    """Wall time of the behavioural loss and of the paper's whole step; no rows without a GPU."""
    if not torch.cuda.is_available():
        return []
    quick, device = args.quick, torch.device("cuda")
    args.device = device  # with or without --device
    peaks = {name: matmul_flops(device, dtype) for name, dtype in DTYPES.items()}
    rows = []
    for name, models in (("cnn_small", 128), ("cnn3", 16 if quick else 64), ("lenet5", 16)):
        rows += _behavioural(architecture(name), models, device, peaks)
    return rows + _steps(4 if quick else 64, device)


def _behavioural(arch: Architecture, models: int, device: torch.device, peaks: dict[str, float]) -> list[Row]:
    """Forward and backward over 256 inputs in every number type, plain, compiled and as a graph."""
    theta_BP = random_models(arch, models).to(device)
    inputs = torch.randn(256, *arch.input_shape, device=device)
    ways = {}
    for name, dtype in DTYPES.items():
        typed_BP, typed_inputs = theta_BP.to(dtype).requires_grad_(), inputs.to(dtype)

        def run(theta: Tensor, inputs: Tensor = typed_inputs) -> Tensor:
            return arch.forward(theta, inputs)

        ways[name] = _loss(run, typed_BP)
        ways[f"{name}, compiled"] = _loss(torch.compile(run, dynamic=False), typed_BP)
        sample_BP = typed_BP.detach().clone().requires_grad_()
        ways[f"{name}, CUDA graph"] = _loss(torch.cuda.make_graphed_callables(run, (sample_BP,)), typed_BP)
    rows = []
    for way, seconds in turns(ways, 20, clock(device)).items():
        share = flops(arch, models, 256) / median(seconds) / peaks[way.split(",")[0]]
        what, note = f"behavioural loss, {arch.name}, {models} x 256, {way}", f"{100 * share:.1f} % of peak"
        rows.append(timing(what, median(seconds), note=note, share_of_peak=share))
    return rows


def _loss(run: Callable[[Tensor], Tensor], theta_BP: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(run(theta_BP).float().square().mean(), theta_BP)[0]


def _steps(models: int, device: torch.device) -> list[Row]:
    """The whole training step at the paper's size."""
    ways = {
        f"{precision}{', compiled' if compiled else ''}": paper_step(models, precision, device, compiled)
        for precision in ("float32", "bf16")
        for compiled in (False, True)
    }
    return [
        timing(f"whole step, cnn3, {models} models x 256 queries, 256 wide, 8+8 layers, {way}", median(seconds))
        for way, seconds in turns(ways, 5, clock(device)).items()
    ]


PARTS = {"gpu": speed(gpu)}
