"""Running, training and scoring many small networks."""

import multiprocessing
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from math import prod

import numpy as np
import torch

from benchmarks import baselines
from benchmarks.harness import Row, Table, compare, matmul_flops, single, speed, timing, turns, value
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


def behavioural(args: Namespace) -> list[Row]:
    """The behavioural loss, forward and backward, against vmap over models with the originals evaluated again."""
    quick, device = args.quick, args.device
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
        note = f"{row['ours_seconds'] / bound:.1f} x the arithmetic bound"
        rows.append(row | {"note": note, "numbers": {"bound_seconds": bound}})
    return rows


def zoo_training(args: Namespace) -> list[Row]:
    """Zoo training on digits, batch 32, one epoch: per model, against one model at a time."""
    quick, device = args.quick, args.device
    arch, images, models = architecture("cnn_small"), load("digits"), 64 if quick else 256
    count = 320 if quick else 1000
    inputs, labels_Q = images.train.images[:count].to(device), images.train.labels_Q[:count].to(device)
    theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).to(device)
    alone = 2 if quick else 4

    def ours() -> None:
        list(fit(arch, theta_BP, inputs, labels_Q, epochs=1, lr_B=torch.full((models,), 1e-3)))

    def one_by_one() -> None:
        for theta_P in theta_BP[:alone]:
            baselines.train_one(arch, theta_P, inputs, labels_Q, 1e-3)

    note = f"baseline: {alone} models, scaled"
    row = compare(f"zoo training, cnn_small, {models} models", ours, one_by_one, 3, models / alone, note, device)
    return [row | {"numbers": {"models_epochs_per_second": models / row["ours_seconds"]}}]


def zoo_accuracy(args: Namespace) -> list[Row]:
    """Models with the settings of a zoo, trained together and one by one: milliseconds a model, and how they differ.

    The same initial weights, settings and size of batches. Processor seconds of one thread, so that other work on the
    machine does not count; with more threads, wall seconds of a process that may use as many in both ways.
    """
    torch.set_num_threads(args.threads)
    arch, images = architecture("cnn_small"), load("digits")
    models, alone, epochs = (32, 2, 1) if args.quick else (args.models, args.alone, args.epochs)
    inputs, labels_Q = images.train.images, images.train.labels_Q
    rng = np.random.default_rng(0)
    kinds = rng.choice(["uniform", "normal", "kaiming_uniform", "kaiming_normal"], models)
    lr_B = torch.from_numpy(rng.choice([1e-3, 2e-3], models)).float()
    decay_B = torch.from_numpy(rng.choice([1.25e-3, 2.5e-3, 5e-3], models)).float()
    theta_BP = initialise(arch, kinds.tolist(), range(models), [0.4] * models)

    def together(theta_BP: torch.Tensor, epochs: int) -> torch.Tensor:
        trained = []
        for rows in torch.arange(len(theta_BP)).split(args.group):
            settings = {"epochs": epochs, "lr_B": lr_B[rows], "weight_decay_B": decay_B[rows], "batch_size": 32}
            (*_, last) = fit(arch, theta_BP[rows], inputs, labels_Q, **settings)
            trained.append(last.theta_BP)
        return torch.cat(trained)

    def one_by_one(theta_BP: torch.Tensor, epochs: int) -> torch.Tensor:
        settings = zip(theta_BP, lr_B.tolist(), decay_B.tolist(), strict=False)
        return torch.stack(
            [baselines.train_one(arch, theta_P, inputs, labels_Q, lr, epochs, decay) for theta_P, lr, decay in settings]
        )

    clock = time.process_time if args.threads == 1 else time.perf_counter
    trained, milliseconds = {}, {}
    ways: dict[str, tuple[Callable[[torch.Tensor, int], torch.Tensor], int]] = {
        f"{min(args.group, models)} at once": (together, models),
        "one by one": (one_by_one, alone),
    }
    for way, (train, count) in ways.items():
        train(theta_BP[:1], 1)  # what a process does once does not count
        start = clock()
        trained[way] = train(theta_BP[:count], epochs)
        milliseconds[way] = 1000 * (clock() - start) / count
    batched, single = (
        evaluate(arch, theta_BP[:alone], images.test.images, images.test.labels_Q) for theta_BP in trained.values()
    )
    gap_B = single.accuracy_B - batched.accuracy_B
    difference = {
        "accuracy": float(batched.accuracy_B.mean()),
        "faster": milliseconds["one by one"] / next(iter(milliseconds.values())),
        "gap": float(gap_B.mean()),
        "gap_error": float(gap_B.std() / len(gap_B) ** 0.5),
        "same_answers": float((single.predictions_BQ == batched.predictions_BQ).float().mean()),
    }
    extra = [difference, {"accuracy": float(single.accuracy_B.mean())}]
    return [
        {"way": way, "models": ways[way][1], "epochs": epochs, "ms_per_model": milliseconds[way]} | more
        for way, more in zip(ways, extra, strict=True)
    ]


def evaluation(args: Namespace) -> list[Row]:
    """Accuracy and loss of 1,000 models on the digits' test images, against a loop over models."""
    quick, device = args.quick, args.device
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
        note = f"baseline: {len(states)} models, scaled; {row['ours_seconds'] / bound:.1f} x the arithmetic bound"
        note += f", the loop {row['baseline_seconds'] / bound:.0f} x"
        rows.append(row | {"note": note, "numbers": {"bound_seconds": bound}})
    return rows


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
    theta_BP = initialise(arch, ["kaiming_normal"] * models, range(models)).requires_grad_()
    inputs = torch.randn(256, *arch.input_shape)

    def step() -> None:
        torch.autograd.grad(arch.forward(theta_BP, inputs).square().mean(), theta_BP)

    return min(turns({"step": step}, 9, time.perf_counter)["step"])


ACCURACIES = Table(
    (
        value("models", "models"),
        value("epochs", "epochs"),
        value("ms a model", "ms_per_model", "{:.1f}".format),
        value("times faster", "faster", "{:.1f}".format),
        value("test accuracy of the models in both", "accuracy", "{:.4f}".format),
        value("one by one less at once", "gap", "{:+.4f}".format),
        value("standard error", "gap_error", "{:.4f}".format),
        value("same answers", "same_answers", "{:.4f}".format),
    ),
    by=lambda row: row["way"],
)
OPTIONS = {
    "--models": {"type": int, "default": 256},
    "--group": {"type": int, "default": 256, "help": "how many are trained at a time"},
    "--alone": {"type": int, "default": 24, "help": "how many of them also one by one"},
    "--epochs": {"type": int, "default": 8},
    "--threads": {"type": int, "default": 1},
}
PARTS = {
    "behavioural": speed(behavioural),
    "threads": speed(threads),
    "zoo_training": speed(zoo_training),
    "zoo_accuracy": single(zoo_accuracy, tables=(ACCURACIES,), options=OPTIONS),
    "evaluation": speed(evaluation),
}
