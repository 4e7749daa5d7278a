"""Batched forward pass: B different models on the same Q inputs, by the fastest of three ways to one result.

- `plain.py`: differentiable torch operations, for every network, transform of autograd and device.
- `convolution/`: convolutional networks on the CPU, several times faster, with a backward pass of its own.
- `grouped.py`: convolutional networks on other devices, as grouped convolutions.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distrecon.errors import UserError
from distrecon.nets import convolution, grouped, plain
from distrecon.nets.layers import Chain


def forward(chain: Chain, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape]; differentiable in theta and in the inputs.

    Under autocast convolutional networks compute in autocast's type, as torch's own convolutions do.
    """
    if tuple(inputs.shape[1:]) != chain.input_shape:
        wanted = ", ".join(map(str, chain.input_shape))
        raise UserError(f"{chain.name} reads inputs of shape [Q, {wanted}], not {tuple(inputs.shape)}")
    chain.check(theta_BP)
    if not _convolutional(chain) or not len(theta_BP) or not len(inputs):
        return plain.forward(chain, theta_BP, inputs)
    on_cpu = theta_BP.device.type == inputs.device.type == "cpu"
    plainly = _only_backward(theta_BP, inputs)
    if on_cpu and (not plainly or inputs.requires_grad):
        return plain.forward(chain, theta_BP, inputs)
    if torch.is_autocast_enabled(theta_BP.device.type) and theta_BP.dtype == torch.float32:
        theta_BP = theta_BP.to(torch.get_autocast_dtype(theta_BP.device.type))  # once, before anything is built of it
    inputs = inputs.to(theta_BP.dtype)
    if on_cpu:
        return convolution.forward(chain, theta_BP, inputs)
    return grouped.forward(chain, theta_BP, inputs, transformed=not plainly)


def _convolutional(chain: Chain) -> bool:
    """Whether convolutions come first and linear layers last."""
    return chain.layers[0].kernel > 0 and not chain.layers[-1].kernel


def _only_backward(theta_BP: Tensor, inputs: Tensor) -> bool:
    """Whether no transform of autograd but backward passes can be asked for."""
    return (
        not torch.compiler.is_compiling()
        # private, but the question torch's own autograd.Function.apply asks; there is no public one
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(theta_BP).tangent is None
        and forward_ad.unpack_dual(inputs).tangent is None
    )
