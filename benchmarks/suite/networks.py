"""Running, training and scoring many small networks."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from math import prod

import torch

from benchmarks.suite import baselines
from benchmarks.suite.harness import CPU, Row, compare, matmul_flops, turns
from distrecon.images import load
from distrecon.nets import Architecture, architecture, evaluate, fit, initialise
from distrecon.nets.layers import convolutions


def _products(arch: Architecture) -> list[int]:
    """Multiplications of each layer, for one model and one input."""
    work = [layer.out_features * layer.fan_in * prod(before) for layer, before, _ in convolutions(arch)]
    return work + [layer.out_features * layer.fan_in for layer in arch.layers if not layer.kernel]


def forward_flops(arch: Architecture, models: int, queries: int) -> float:
    """Floating-point operations of a forward pass."""
    return 2.0 * models * queries * sum(_products(arch))


def flops(arch: Architecture, models: int, queries: int) -> float:
    """Of a forward and backward pass: twice the forward products for the gradients, once for the first layer's."""
    work = _products(arch)
    return 2.0 * models * queries * (3 * sum(work) - work[0])


def behavioural(quick: bool, device: torch.device = CPU) -> list[Row]:
    """The behavioural loss, forward and backward, against vmap over models with the originals evaluated again."""
    cases = [("cnn_small", 128, 256), ("cnn3", 16, 256), ("cnn3", 64, 256), ("lenet5", 16, 256)]
    if quick:
        cases = [("cnn_small", 32, 128), ("cnn3", 4, 128), ("lenet5", 4, 128)]
    rows = []
    for name, models, queries in cases:
        arch = architecture(name)
        theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).to(device)
        inputs = torch.randn(queries, *arch.input_shape, device=device)
        targets_BQC = arch.forward(theta_BP, inputs).softmax(2)
        reconstructed_BP = (theta_BP + 0.01 * torch.randn_like(theta_BP)).requires_grad_()
        net = baselines.module(arch)

        def ours(arch=arch, theta=reconstructed_BP, inputs=inputs, targets=targets_BQC) -> torch.Tensor:
            loss = (arch.forward(theta, inputs).softmax(2) - targets).square().mean()
            return torch.autograd.grad(loss, theta)[0]

        def published(arch=arch, net=net, theta=reconstructed_BP, original=theta_BP, inputs=inputs) -> torch.Tensor:
            return torch.autograd.grad(baselines.behavioural_loss(arch, net, theta, original, inputs), theta)[0]

        assert float((ours() - published()).norm() / published().norm()) < 1e-3
        row = compare(f"behavioural loss, {name}, {models} x {queries}", ours, published, 3, device=device)
        bound = flops(arch, models, queries) / matmul_flops(device)
        note = f"{row.ours_seconds / bound:.1f} x the arithmetic bound"
        rows.append(Row(**{**row.to_dict(), "note": note, "numbers": {"bound_seconds": bound}}))
    return rows


def zoo_training(quick: bool, device: torch.device = CPU) -> list[Row]:
    """Zoo training on digits, batch 32, one epoch: per model, against one model at a time."""
    arch, images, models = architecture("cnn_small"), load("digits"), 64 if quick else 256
    count = 320 if quick else 1000
    inputs, labels_Q = images.train.images[:count].to(device), images.train.labels_Q[:count].to(device)
    theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).to(device)
    alone = 2 if quick else 4

    def ours() -> None:
        list(fit(arch, theta_BP, inputs, labels_Q, epochs=1, lr_B=torch.full((models,), 1e-3)))

    def one_by_one() -> None:
        for theta_P in theta_BP[:alone]:
            baselines.train_one(arch, theta_P, inputs, labels_Q, 1e-3, 0)

    note = f"baseline: {alone} models, scaled"
    row = compare(f"zoo training, cnn_small, {models} models", ours, one_by_one, 3, models / alone, note, device)
    return [Row(**{**row.to_dict(), "numbers": {"models_epochs_per_second": models / row.ours_seconds}})]


def evaluation(quick: bool, device: torch.device = CPU) -> list[Row]:
    """Accuracy and loss of 1,000 models on the digits' test images, against a loop over models."""
    arch, images, models = architecture("cnn_small"), load("digits"), 200 if quick else 1000
    theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).to(device)
    inputs, labels_Q = images.test.images.to(device), images.test.labels_Q.to(device)
    states = baselines.state_dicts(arch, theta_BP[:50])
    bound = forward_flops(arch, models, len(inputs)) / matmul_flops(device)
    rows = []
    for name, batch_size in (("loader, batches of 32", 32), ("one batch from memory", None)):
        row = compare(
            f"evaluation of {models} models, loop: {name}",
            lambda: evaluate(arch, theta_BP, inputs, labels_Q),
            lambda size=batch_size: baselines.evaluate_loop(arch, states, inputs, labels_Q, size),
            5,
            models / len(states),
            device=device,
        )
        note = f"baseline: {len(states)} models, scaled; {row.ours_seconds / bound:.1f} x the arithmetic bound"
        note += f", the loop {(row.baseline_seconds or 0) / bound:.0f} x"
        rows.append(Row(**{**row.to_dict(), "note": note, "numbers": {"bound_seconds": bound}}))
    return rows


def threads(quick: bool) -> list[Row]:
    """The behavioural loss of CNN3 on one and two threads, wall time, each in a process of its own.

    A process that changes its number of threads all the time measures little else.
    """
    models, seconds = 2 if quick else 8, {}
    for count in (1, 2):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds[count] = pool.submit(_with_threads, count, models).result()
    ratio = seconds[1] / seconds[2]
    return [
        Row(f"CNN3, {models} x 256: two threads, over one", seconds[2], seconds[1], ratio, note="wall, least of nine")
    ]


def _with_threads(count: int, models: int) -> float:
    torch.set_num_threads(count)
    arch = architecture("cnn3")
    theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).requires_grad_()
    inputs = torch.randn(256, *arch.input_shape)

    def step() -> None:
        torch.autograd.grad(arch.forward(theta_BP, inputs).square().mean(), theta_BP)

    return min(turns({"step": step}, 9, time.perf_counter)["step"])
