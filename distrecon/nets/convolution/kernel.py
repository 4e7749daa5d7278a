"""What a kernel is: the convolutional layers of one block, forward and backward; and what both kernels share.

Legend: b models of a block, q inputs of a block, F features after the convolutions.
"""

from typing import Protocol

import torch
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.convolution.workspace import Workspace
from distrecon.nets.layers import Chain

Parameters = list[tuple[Tensor, Tensor]]  # weight [b, *weight_shape] and bias [b, out] of each layer


class Kernel(Protocol):
    """How the convolutional layers of one block are computed; the modules `direct` and `modelwise` are two."""

    def block_size(self, chain: Chain, inputs: int) -> tuple[int, int]:
        """(models, inputs) of a block."""

    def prepare(self, chain: Chain, inputs: Tensor) -> Tensor:
        """The inputs [q, *input_shape] in the form in which the first layer reads them, made once for all models."""

    def forward(
        self, chain: Chain, parameters: Parameters, shared: Tensor, work: Workspace
    ) -> tuple[Tensor, list[Tensor]]:
        """features[b, F, q] from the prepared inputs, and the tensors saved for `backward`."""

    def backward(
        self,
        chain: Chain,
        parameters: Parameters,
        shared: Tensor,
        saved: list[Tensor],
        grad_bFq: Tensor,
        grads: Parameters,
        work: Workspace,
    ) -> None:
        """Adds the gradient of the convolutional layers' parameters to `grads`."""


def activation_saved(chain: Chain, out: Tensor, hidden: Tensor) -> Tensor:
    """Which of an activation's input and result `activation_backward` needs: for relu and leaky_relu the result."""
    return hidden if activation(chain.activation).symmetry == "scaled" else out


def activation_backward(chain: Chain, grad: Tensor, saved: Tensor) -> Tensor:
    """The gradient of the activation's input, from that of its result, which is overwritten."""
    if chain.activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, saved, 0, grad_input=grad)  # type: ignore[no-any-return]
    with torch.enable_grad():
        saved = saved.detach().requires_grad_(True)
        return torch.autograd.grad(activation(chain.activation)(saved), saved, grad)[0]


def index_dtype(positions: int) -> torch.dtype:
    """The smallest type that holds an index into so many positions."""
    return torch.uint8 if positions <= 2**8 else torch.int16 if positions <= 2**15 else torch.int64
