"""Training speed: 256 models at once against one by one, the same process count and thread, and their accuracies.

    python benchmarks/zoo_training.py [--alone 24] [--epochs 8] [--threads 1]

One by one is plain PyTorch: nn modules, torch.optim.Adam, the same initial weights, hyper-parameters and batches. Times
are processor seconds of one thread, so that other work on the machine does not count; with more threads, wall seconds
of one process that may use as many in both ways.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distrecon.images import load
from distrecon.nets import architecture, evaluate, fit, initialise

ARCH, IMAGES = architecture("cnn_small"), load("digits")


def module(state: dict[str, torch.Tensor]) -> nn.Module:
    """The same network in torch modules."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip
    layers = [m for m in net if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, own in zip(ARCH.layers, layers, strict=True):
        own.load_state_dict({part: state[f"{layer.name}.{part}"] for part in ("weight", "bias")})
    return net


def one_by_one(theta_BP: torch.Tensor, lr_B: torch.Tensor, decay_B: torch.Tensor, epochs: int) -> torch.Tensor:
    """Trained weights [B, P]."""
    trained = []
    for theta_P, lr, decay in zip(theta_BP, lr_B.tolist(), decay_B.tolist(), strict=True):
        net = module(ARCH.unflatten(theta_P))
        adam, order = torch.optim.Adam(net.parameters(), lr, weight_decay=decay), torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for batch in torch.randperm(len(IMAGES.train), generator=order).split(32):
                adam.zero_grad(set_to_none=True)
                F.cross_entropy(net(IMAGES.train.images[batch]), IMAGES.train.labels_Q[batch]).backward()
                adam.step()
        trained.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return torch.stack(trained)


def together(
    theta_BP: torch.Tensor, lr_B: torch.Tensor, decay_B: torch.Tensor, epochs: int, group: int
) -> torch.Tensor:
    """The same, `group` models at a time."""
    trained = []
    for rows in torch.arange(len(theta_BP)).split(group):
        settings = {"epochs": epochs, "lr_B": lr_B[rows], "weight_decay_B": decay_B[rows], "batch_size": 32}
        (*_, last) = fit(ARCH, theta_BP[rows], IMAGES.train.images, IMAGES.train.labels_Q, **settings)
        trained.append(last.theta_BP)
    return torch.cat(trained)


def timed(function: Callable[..., torch.Tensor], *arguments: object) -> tuple[torch.Tensor, float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    return function(*arguments), clock() - start


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--models", type=int, default=256)
    options.add_argument("--group", type=int, default=256, help="how many are trained at a time")
    options.add_argument("--alone", type=int, default=24, help="how many of them also one by one")
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    kinds = rng.choice(["uniform", "normal", "kaiming_uniform", "kaiming_normal"], args.models)
    lr_B = torch.from_numpy(rng.choice([1e-3, 2e-3], args.models)).float()
    decay_B = torch.from_numpy(rng.choice([1.25e-3, 2.5e-3, 5e-3], args.models)).float()
    theta_BP = initialise(ARCH, kinds.tolist(), range(args.models), [0.4] * args.models)
    few = slice(args.alone)
    together(theta_BP[:2], lr_B[:2], decay_B[:2], 1, 2)  # what a process does once does not count
    one_by_one(theta_BP[:1], lr_B[:1], decay_B[:1], 1)
    vectorised, fast = timed(together, theta_BP, lr_B, decay_B, args.epochs, args.group)
    alone, slow = timed(one_by_one, theta_BP[few], lr_B[few], decay_B[few], args.epochs)
    per_model = fast / args.models, slow / args.alone
    print(f"{args.group:3} at once     {1000 * per_model[0]:8.1f} ms a model ({args.epochs} epochs)")
    print(f"one by one      {1000 * per_model[1]:8.1f} ms a model")
    print(f"faster by       {per_model[1] / per_model[0]:8.1f}")
    test = IMAGES.test.images, IMAGES.test.labels_Q
    a, b = evaluate(ARCH, alone, *test), evaluate(ARCH, vectorised[few], *test)
    gap_B = a.accuracy_B - b.accuracy_B
    error = float(gap_B.std() / len(gap_B) ** 0.5)
    print(f"test accuracy   {float(a.accuracy_B.mean()):.4f} one by one, {float(b.accuracy_B.mean()):.4f} at once")
    print(f"difference      {float(gap_B.mean()):+.4f} with a standard error of {error:.4f}")
    print(f"same answers    {float((a.predictions_BQ == b.predictions_BQ).float().mean()):.4f} of the test images")


if __name__ == "__main__":
    main()
