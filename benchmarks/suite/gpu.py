"""The behavioural loss on a GPU, if there is one: float32, bfloat16, torch.compile, and the share of peak reached."""

import time
from statistics import median

import torch

from benchmarks.suite.harness import Row, turns
from benchmarks.suite.networks import flops
from distrecon.nets import architecture, initialise


def gpu(quick: bool) -> list[Row]:
    """Wall time of forward and backward against the matrix product's own rate; no rows without a GPU."""
    if not torch.cuda.is_available():
        return []
    rows = []
    for name, models in (("cnn_small", 128), ("cnn3", 16 if quick else 64), ("lenet5", 16)):
        arch = architecture(name)
        theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).cuda().requires_grad_()
        inputs = torch.randn(256, *arch.input_shape, device="cuda")
        compiled = torch.compile(arch.forward)
        for kind, forward, dtype in (
            ("float32", arch.forward, torch.float32),
            ("bfloat16", arch.forward, torch.bfloat16),
            ("float32, torch.compile", compiled, torch.float32),
        ):

            def step(forward=forward, dtype=dtype, theta=theta_BP, inputs=inputs) -> None:
                loss = forward(theta.to(dtype), inputs).float().square().mean()
                torch.autograd.grad(loss, theta)
                torch.cuda.synchronize()

            seconds = median(turns({"step": step}, 20, time.perf_counter)["step"])
            rate = flops(arch, models, 256) / seconds
            note = f"{100 * rate / _peak(dtype):.1f} % of the matrix product's rate"
            rows.append(Row(f"{name}, {models} x 256, {kind}", seconds, note=note))
    return rows


def _peak(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)

    def product() -> None:
        a @ a
        torch.cuda.synchronize()

    return 2 * 8192**3 / median(turns({"product": product}, 5, time.perf_counter)["product"])
