"""The batched forward pass in differentiable torch operations: B different models on the same Q inputs.

Every transform of autograd works on it (double backward, forward mode, torch.func, torch.compile), on any device.
Activations are laid out [B, channels, Q * positions]: every layer is a batched matrix product, and the first layer,
whose input all models share, is one dense product.

Legend: B models, Q inputs, C classes, O output channels, F fan-in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.layers import Chain, Layer


def forward(chain: Chain, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape]; differentiable in both, any number of times."""
    inputs = inputs.to(theta_BP.dtype)
    act = activation(chain.activation)
    parameters = chain.weights_and_biases(theta_BP)
    # [B or 1, channels, Q, *spatial]; 1 while all models share it
    hidden = inputs.transpose(0, 1)[None]
    for i, (layer, (weight, bias_BO)) in enumerate(zip(chain.layers, parameters, strict=True)):
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
        if i + 1 < len(chain.layers):
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
