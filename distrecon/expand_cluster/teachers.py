"""Teachers: dense networks of known weights to try recovery on, trained on images or drawn from a synthetic family."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.expand_cluster.weights import Weights
from distrecon.nets.activations import activation as find_activation


def train_teacher(
    images_QI: Tensor,
    labels_Q: Tensor,
    hidden: Sequence[int],
    activation: str = "tanh",
    seed: int = 0,
    epochs: int = 60,
    learning_rate: float = 3e-3,
    batch: int = 64,
) -> Weights:
    """A classifier of the images as [(W, b), ...] in float64: cross entropy, Adam, PyTorch's default initialisation."""
    act = find_activation(activation)
    generator = torch.Generator().manual_seed(seed)
    sizes = [images_QI.shape[1], *hidden, int(labels_Q.max()) + 1]
    parameters: list[Tensor] = []
    for fan_in, out in itertools.pairwise(sizes):
        for shape in ((out, fan_in), (out,)):
            uniform = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameters.append((uniform / math.sqrt(fan_in)).requires_grad_())
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    images, labels = images_QI.double(), labels_Q.long()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            h = images[rows]
            for i in range(0, len(parameters), 2):
                h = F.linear(h, parameters[i], parameters[i + 1])
                h = act(h) if i < len(parameters) - 2 else h
            optimiser.zero_grad()
            F.cross_entropy(h, labels[rows]).backward()
            optimiser.step()
    flat = [p.detach() for p in parameters]
    return list(zip(flat[::2], flat[1::2], strict=True))


def synthetic_teacher(inputs: int, width: int, activation: str = "g", seed: int = 0) -> Weights:
    """One problem of the synthetic family: w = 1.5 randn / sqrt(I), b = 0.5 randn, |a| in [0.5, 1.5], random signs."""
    find_activation(activation)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, b = 1.5 * draw(width, inputs) / math.sqrt(inputs), 0.5 * draw(width)
    size = 0.5 + torch.rand(1, width, generator=generator, dtype=torch.float64)
    sign = torch.randint(2, (1, width), generator=generator).double() * 2 - 1
    return [(w, b), (size * sign, torch.zeros(1, dtype=torch.float64))]


def synthetic_problem(inputs: int, width: int, activation: str, number: int) -> Weights:
    """Problem `number` of the benchmark's cell of `inputs` and `width`: the synthetic family, a seed of its own."""
    return synthetic_teacher(inputs, width, activation, seed=100_000 * inputs + 1_000 * width + number)
