"""Batched forward pass: B different models on the same Q inputs, by the faster of two ways to one result.

- `plain.py`: differentiable torch operations, for every transform of autograd and every device.
- `convolution/`: convolutional networks on the CPU, several times faster, with a backward pass of its own.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distrecon.errors import UserError
from distrecon.nets import convolution, plain
from distrecon.nets.layers import Chain


def forward(chain: Chain, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape]; differentiable in theta and in the inputs.

    Under autocast convolutional networks compute in autocast's type, as torch's own convolutions do.
    """
    if tuple(inputs.shape[1:]) != chain.input_shape:
        wanted = ", ".join(map(str, chain.input_shape))
        raise UserError(f"{chain.name} reads inputs of shape [Q, {wanted}], not {tuple(inputs.shape)}")
    chain.check(theta_BP)
    if not _fast(chain, theta_BP, inputs):
        return plain.forward(chain, theta_BP, inputs)
    if torch.is_autocast_enabled(theta_BP.device.type) and theta_BP.dtype == torch.float32:
        theta_BP = theta_BP.to(torch.get_autocast_dtype(theta_BP.device.type))
    return convolution.forward(chain, theta_BP, inputs.to(theta_BP.dtype))


def _fast(chain: Chain, theta_BP: Tensor, inputs: Tensor) -> bool:
    """Whether only a backward pass in theta can be asked for, of a convolutional network on the CPU."""
    return (
        chain.layers[0].kernel > 0
        and not chain.layers[-1].kernel
        and theta_BP.device.type == inputs.device.type == "cpu"
        and len(theta_BP) > 0
        and len(inputs) > 0
        and not inputs.requires_grad
        and not torch.compiler.is_compiling()
        # private, but the question torch's own autograd.Function.apply asks; there is no public one
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(theta_BP).tangent is None
        and forward_ad.unpack_dual(inputs).tangent is None
    )
