"""Running, training and scoring many small networks."""

import multiprocessing
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from math import prod

import numpy as np
import torch

from benchmarks import baselines
from benchmarks.harness import Options, Row, compare, matmul_flops, speed, timing, turns
from benchmarks.zoos import random_models
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


def _against_bound(row: Row, bound: float, note: str = "") -> Row:
    """With how many times the arithmetic bound ours takes."""
    ours = f"{row['ours_seconds'] / bound:.1f} x the arithmetic bound"
    return row | {"note": f"{row['note']}{ours}{note}", "numbers": {"bound_seconds": bound}}


def behavioural(args: Namespace, name: str, models: int, queries: int) -> list[Row]:
    """The behavioural loss, forward and backward, against vmap over models with the originals evaluated again."""
    arch, device = architecture(name), args.device
    theta_BP = random_models(arch, models).to(device)
    inputs = torch.randn(queries, *arch.input_shape, device=device)
    targets_BQC = arch.forward(theta_BP, inputs).softmax(2)
    reconstructed_BP = (theta_BP + 0.01 * torch.randn_like(theta_BP)).requires_grad_()
    net = baselines.module(arch)

    def ours() -> torch.Tensor:
        loss = (arch.forward(reconstructed_BP, inputs).softmax(2) - targets_BQC).square().mean()
        return torch.autograd.grad(loss, reconstructed_BP)[0]

    def published() -> torch.Tensor:
        loss = baselines.behavioural_loss(arch, net, reconstructed_BP, theta_BP, inputs)
        return torch.autograd.grad(loss, reconstructed_BP)[0]

    assert float((ours() - published()).norm() / published().norm()) < 1e-3
    row = compare(f"behavioural loss, {name}, {models} x {queries}", ours, published, 3, device=device)
    return [_against_bound(row, flops(arch, models, queries) / matmul_flops(device))]


def evaluation(args: Namespace, loop: str, batch_size: int | None, models: int) -> list[Row]:
    """Accuracy and loss of many models on the digits' test images, against a loop over models."""
    arch, images, device = architecture("cnn_small"), load("digits"), args.device
    theta_BP = random_models(arch, models).to(device)
    inputs, labels_Q = images.test.images.to(device), images.test.labels_Q.to(device)
    states = baselines.state_dicts(arch, theta_BP[:50])
    bound = forward_flops(arch, models, len(inputs)) / matmul_flops(device)
    row = compare(
        f"evaluation of {models} models, loop: {loop}",
        lambda: evaluate(arch, theta_BP, inputs, labels_Q),
        lambda: baselines.evaluate_loop(arch, states, inputs, labels_Q, batch_size),
        5,
        models / len(states),
        f"baseline: {len(states)} models, scaled; ",
        device,
    )
    return [_against_bound(row, bound, f", the loop {row['baseline_seconds'] / bound:.0f} x")]


def zoo_training(args: Namespace) -> list[Row]:
    """Digits networks with a zoo's settings, batches of 32: per model, at once against one by one, and how they differ.

    The same initial weights, settings and batches in both ways. With several threads, wall seconds.
    """
    torch.set_num_threads(args.threads)
    arch, images, device = architecture("cnn_small"), load("digits"), args.device
    models, alone, epochs = (64, 2, 1) if args.quick else (args.models, args.alone, args.epochs)
    inputs, labels_Q = images.train.images.to(device), images.train.labels_Q.to(device)
    draw = np.random.default_rng(0)
    kinds = draw.choice(["uniform", "normal", "kaiming_uniform", "kaiming_normal"], models)
    lr_B = torch.from_numpy(draw.choice([1e-3, 2e-3], models)).float()
    decay_B = torch.from_numpy(draw.choice([1.25e-3, 2.5e-3, 5e-3], models)).float()
    theta_BP = initialise(arch, kinds.tolist(), range(models), [0.4] * models).to(device)
    trained: dict[str, torch.Tensor] = {}

    def at_once() -> None:
        settings = {"epochs": epochs, "batch_size": 32}
        groups = zip(*(values.split(args.group) for values in (theta_BP, lr_B, decay_B)), strict=True)
        states = [
            list(fit(arch, theta, inputs, labels_Q, lr_B=lr, weight_decay_B=decay, **settings))[-1].theta_BP
            for theta, lr, decay in groups
        ]
        trained["at once"] = torch.cat(states)[:alone]

    def one_by_one() -> None:
        settings = zip(theta_BP[:alone], lr_B.tolist(), decay_B.tolist(), strict=False)
        trained["one by one"] = torch.stack(
            [baselines.train_one(arch, theta_P, inputs, labels_Q, lr, epochs, decay) for theta_P, lr, decay in settings]
        )

    timer = time.perf_counter if args.threads > 1 else None
    what, factor = f"zoo training, cnn_small, {models} models", models / alone
    row = compare(what, at_once, one_by_one, 3, factor, f"baseline: {alone} models, scaled", device, timer)
    batched, single = (
        evaluate(arch, trained[way], images.test.images.to(device), images.test.labels_Q.to(device))
        for way in ("at once", "one by one")
    )
    gap_B = single.accuracy_B - batched.accuracy_B
    numbers = {
        "models_epochs_per_second": models * epochs / row["ours_seconds"],
        "ms_per_model": 1000 * row["ours_seconds"] / models,
        "ms_per_model_alone": 1000 * row["baseline_seconds"] / models,
        "accuracy": float(batched.accuracy_B.mean()),
        "accuracy_alone": float(single.accuracy_B.mean()),
        "gap_error": float(gap_B.std() / len(gap_B) ** 0.5),
        "same_answers": float((single.predictions_BQ == batched.predictions_BQ).float().mean()),
    }
    row["note"] += (
        f", epochs {epochs}; test accuracy {numbers['accuracy_alone']:.4f}, at once {numbers['accuracy']:.4f} "
        f"(difference ± {numbers['gap_error']:.4f}), {100 * numbers['same_answers']:.1f} % of all answers the same"
    )
    return [row | {"numbers": numbers}]


def threads(args: Namespace) -> list[Row]:
    """The behavioural loss of CNN3 on one and two threads, wall time, each in a process of its own.

    A process that changes its number of threads all the time measures little else.
    """
    models, seconds = 2 if args.quick else 8, {}
    for count in (1, 2):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds[count] = pool.submit(_with_threads, count, models).result()
    what, ratio = f"CNN3, {models} x 256: two threads, over one", seconds[1] / seconds[2]
    return [timing(what, seconds[2], seconds[1], [ratio], "wall, least of nine")]


def _with_threads(count: int, models: int) -> float:
    torch.set_num_threads(count)
    arch = architecture("cnn3")
    theta_BP = random_models(arch, models).requires_grad_()
    inputs = torch.randn(256, *arch.input_shape)

    def step() -> None:
        torch.autograd.grad(arch.forward(theta_BP, inputs).square().mean(), theta_BP)

    return min(turns({"step": step}, 9, time.perf_counter)["step"])


OPTIONS: Options = {
    "--models": {"type": int, "default": 256},
    "--group": {"type": int, "default": 256, "help": "how many are trained at a time"},
    "--alone": {"type": int, "default": 4, "help": "how many of them also one by one"},
    "--epochs": {"type": int, "default": 1},
    "--threads": {"type": int, "default": 1},
}
PARTS = {
    "behavioural": speed(
        behavioural,
        [("cnn_small", 128, 256), ("cnn3", 16, 256), ("cnn3", 64, 256), ("lenet5", 16, 256)],
        [("cnn_small", 32, 128), ("cnn3", 4, 128), ("lenet5", 4, 128)],
    ),
    "threads": speed(threads),
    "zoo_training": speed(zoo_training, options=OPTIONS),
    "evaluation": speed(
        evaluation,
        [("loader, batches of 32", 32, 1000), ("one batch from memory", None, 1000)],
        [("loader, batches of 32", 32, 200), ("one batch from memory", None, 200)],
    ),
}
