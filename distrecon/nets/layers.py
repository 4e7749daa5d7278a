"""Networks as data: a chain of weighted layers, and where the parameters of each lie in a model's vector theta[P].

The flat order is the state dict's: layer by layer, weight then bias.

Legend: B models, P parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.activations import activation


@dataclass(frozen=True)
class Layer:
    """A weighted layer: a convolution (kernel > 0) or a linear map (kernel = 0), then max pooling, then the activation.

    `positions` is the number of spatial positions that each incoming channel has after flattening: a linear layer
    that follows a convolution reads `in_features = channels * positions` numbers, channel by channel.
    """

    name: str  # prefix in the state dict
    in_features: int
    out_features: int
    kernel: int = 0
    padding: int = 0
    pool: int = 1
    positions: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        square = (self.kernel, self.kernel) if self.kernel else ()
        return (self.out_features, self.in_features, *square)

    @property
    def fan_in(self) -> int:
        """Weights of one output channel."""
        return prod(self.weight_shape[1:])

    @property
    def num_parameters(self) -> int:
        return self.out_features * (self.fan_in + 1)


@dataclass(frozen=True)
class Chain:
    """Layers one behind the other, all but the last followed by `activation`.

    `input_shape` is (I,) for vectors or (channels, height, width) for images. UserError for an unknown activation.
    """

    name: str
    layers: tuple[Layer, ...]
    activation: str
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        activation(self.activation)

    @cached_property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def num_outputs(self) -> int:
        return self.layers[-1].out_features

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer's parameters start in theta, and the end of the last."""
        starts = [0]
        for layer in self.layers:
            starts.append(starts[-1] + layer.num_parameters)
        return tuple(starts)

    def weights_and_biases(
        self, theta_BP: Tensor, split: Callable[[Tensor, list[int], int], Sequence[Tensor]] = torch.split
    ) -> list[tuple[Tensor, Tensor]]:
        """Views of theta, or what else `split` makes: per layer the weight [B, *weight_shape] and the bias [B, out]."""
        self.check(theta_BP)
        sizes = [size for layer in self.layers for size in (layer.out_features * layer.fan_in, layer.out_features)]
        parts = split(theta_BP, sizes, 1)  # at once: the gradient is then one concatenation
        pairs = zip(self.layers, parts[::2], parts[1::2], strict=True)
        return [(weight.unflatten(1, layer.weight_shape), bias_BO) for layer, weight, bias_BO in pairs]

    def check(self, theta_BP: Tensor) -> None:
        """Raises UserError unless theta is [B, P]."""
        if theta_BP.ndim != 2 or theta_BP.shape[1] != self.num_parameters:
            raise UserError(
                f"{self.name} has {self.num_parameters} parameters a model; "
                f"got weights of shape {tuple(theta_BP.shape)}, wanted [models, {self.num_parameters}]"
            )


Convolution = tuple[Layer, tuple[int, int], tuple[int, int]]  # sizes of its outputs before and after pooling


def convolutions(chain: Chain) -> list[Convolution]:
    """Each convolution with the height and width of its outputs, before and after pooling."""
    result, (height, width) = [], chain.input_shape[1:]
    for layer in chain.layers:
        if layer.kernel:
            less = layer.kernel - 1 - 2 * layer.padding
            before = (height - less, width - less)
            height, width = before[0] // layer.pool, before[1] // layer.pool
            result.append((layer, before, (height, width)))
    return result
