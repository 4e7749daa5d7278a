"""What the kernels of the batched forward pass share: shapes of convolutions, the way back through an activation."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distrecon.nets.activations import activation

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture, Layer


def convolutions(arch: Architecture) -> list[tuple[Layer, tuple[int, int], tuple[int, int]]]:
    """Each convolution with the height and width of its outputs, before and after pooling."""
    found, (height, width) = [], arch.input_shape[1:]
    for layer in arch.layers:
        if layer.kernel:
            less = layer.kernel - 1 - 2 * layer.padding
            before = (height - less, width - less)
            height, width = before[0] // layer.pool, before[1] // layer.pool
            found.append((layer, before, (height, width)))
    return found


def multiplications(arch: Architecture) -> int:
    """Of all convolutions, for one model and one input."""
    return sum(layer.out_features * layer.fan_in * prod(before) for layer, before, _ in convolutions(arch))


def before_activation(arch: Architecture, out: Tensor, hidden: Tensor) -> Tensor:
    """What the activation's derivative is taken at: for relu and its like, it is the same at their results."""
    return hidden if activation(arch.activation).symmetry == "scaled" else out


def through_activation(arch: Architecture, grad: Tensor, before: Tensor) -> Tensor:
    """The gradient before the activation, from that after it, which is lost; `before` as kept by a kernel's `run`."""
    if arch.activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, before, 0, grad_input=grad)  # type: ignore[no-any-return]
    with torch.enable_grad():
        before = before.detach().requires_grad_(True)
        return torch.autograd.grad(activation(arch.activation)(before), before, grad)[0]


def place_dtype(positions: int) -> torch.dtype:
    """The smallest type that holds a place among so many positions."""
    return torch.uint8 if positions <= 2**8 else torch.int16 if positions <= 2**15 else torch.int64
