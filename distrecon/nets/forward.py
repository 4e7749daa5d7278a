"""Batched forward pass: B different models on the same Q inputs.

Two ways to one result:

- `plain` is written in differentiable torch operations: every transform of autograd works on it (double backward,
  forward mode, torch.func, torch.compile), on any device. Activations are laid out [B, channels, Q * positions]: every
  layer is a batched matrix product, and the first layer, whose input all models share, is one dense product.
- `convolution.py` runs convolutional networks on the CPU several times faster, with a backward pass of its own.

`forward` takes the fast way where it applies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from distrecon.errors import UserError
from distrecon.nets import convolution
from distrecon.nets.activations import activation

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture, Layer


def forward(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape]; differentiable in theta and in the inputs.

    Under autocast convolutional networks compute in autocast's type, as torch's own convolutions do.
    """
    if tuple(inputs.shape[1:]) != arch.input_shape:
        raise UserError(
            f"{arch.name} reads inputs of shape [Q, {', '.join(map(str, arch.input_shape))}], not {tuple(inputs.shape)}"
        )
    arch.check(theta_BP)
    if not _fast(arch, theta_BP, inputs):
        return plain(arch, theta_BP, inputs)
    if torch.is_autocast_enabled(theta_BP.device.type) and theta_BP.dtype == torch.float32:
        theta_BP = theta_BP.to(torch.get_autocast_dtype(theta_BP.device.type))
    return convolution.forward(arch, theta_BP, inputs.to(theta_BP.dtype))


def _fast(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> bool:
    """Whether only a backward pass in theta can be asked for, of a convolutional network on the CPU."""
    return (
        arch.layers[0].kernel > 0
        and not arch.layers[-1].kernel
        and theta_BP.device.type == inputs.device.type == "cpu"
        and len(theta_BP) > 0
        and len(inputs) > 0
        and not inputs.requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(theta_BP).tangent is None
        and forward_ad.unpack_dual(inputs).tangent is None
    )


def plain(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] by differentiable operations alone; see `forward`."""
    inputs = inputs.to(theta_BP.dtype)
    act = activation(arch.activation)
    parameters = arch.weights_and_biases(theta_BP)
    # [B or 1, channels, Q, *spatial]; 1 while all models share it
    hidden = inputs.transpose(0, 1)[None]
    for i, (layer, (weight, bias_BO)) in enumerate(zip(arch.layers, parameters, strict=True)):
        weight_BOF = weight.flatten(2)
        columns, spatial = _columns(layer, hidden)
        if len(columns) == 1:  # shared by all models: one dense product
            out = (weight_BOF.flatten(0, 1) @ columns[0]).unflatten(0, weight_BOF.shape[:2])
            out = out + bias_BO[:, :, None]
        else:
            out = torch.baddbmm(bias_BO[:, :, None], weight_BOF, columns)
        hidden = out.unflatten(2, (len(inputs), *spatial))
        if layer.pool > 1:
            hidden = F.max_pool2d(hidden.flatten(0, 1), layer.pool).unflatten(0, out.shape[:2])
        if i + 1 < len(arch.layers):
            hidden = act(hidden)
    return hidden.transpose(1, 2)


def _columns(layer: Layer, hidden: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What each output of the layer reads, [B or 1, fan_in, Q * positions], and the output's spatial shape."""
    if not layer.kernel:
        return (hidden.movedim(2, -1).flatten(1, -2) if hidden.ndim > 3 else hidden), ()
    if layer.padding:
        hidden = F.pad(hidden, (layer.padding,) * 4)
    patches = hidden.unfold(3, layer.kernel, 1).unfold(4, layer.kernel, 1)  # [B, C, Q, h, w, k, k]
    spatial = tuple(patches.shape[3:5])
    return patches.movedim((5, 6), (2, 3)).flatten(4).flatten(1, 3), spatial
