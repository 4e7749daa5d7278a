"""Batched forward pass: B different models on the same Q inputs, without a loop over models.

Activations are laid out [B, channels, Q * positions], so that every layer is a batched matrix product
weights[B, out, fan_in] @ patches[B, fan_in, Q * positions] and the first layer, whose input all models share, is one
dense product with B * out rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.activations import activation

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture, Layer


def forward(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape]; differentiable in theta and in the inputs."""
    if tuple(inputs.shape[1:]) != arch.input_shape:
        raise UserError(
            f"{arch.name} reads inputs of shape [Q, {', '.join(map(str, arch.input_shape))}], not {tuple(inputs.shape)}"
        )
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
