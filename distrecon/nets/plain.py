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
    hidden = first_hidden(inputs.to(theta_BP.dtype))
    for i, (weight, bias_BO) in enumerate(chain.weights_and_biases(theta_BP)):
        columns, spatial = read(chain.layers[i], hidden)
        sums = weighted_sums(weight.flatten(2), bias_BO, columns)
        hidden = pass_on(chain, i, sums.unflatten(2, (len(inputs), *spatial)))
    return hidden.transpose(1, 2)


# -- the steps of one layer --------------------------------------------------------------------------------------------


def first_hidden(inputs: Tensor) -> Tensor:
    """Inputs [Q, ...] as the first layer reads them, [1, channels, Q, *spatial]: 1 while all models share them."""
    return inputs.transpose(0, 1)[None]


def read(layer: Layer, hidden: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What each output of the layer reads, [B or 1, fan_in, Q * positions], and the output's spatial shape."""
    if not layer.kernel:
        return (hidden.movedim(2, -1).flatten(1, -2) if hidden.ndim > 3 else hidden), ()
    if layer.padding:
        hidden = F.pad(hidden, (layer.padding,) * 4)
    patches = hidden.unfold(3, layer.kernel, 1).unfold(4, layer.kernel, 1)  # [B, C, Q, h, w, k, k]
    spatial = tuple(patches.shape[3:5])
    return patches.movedim((5, 6), (2, 3)).flatten(4).flatten(1, 3), spatial


def weighted_sums(weight_BOF: Tensor, bias_BO: Tensor, columns: Tensor) -> Tensor:
    """[B, O, Q * positions] of what was read, [B or 1, F, Q * positions]."""
    if len(columns) != 1:
        return torch.baddbmm(bias_BO[:, :, None], weight_BOF, columns)
    out = (weight_BOF.flatten(0, 1) @ columns[0]).unflatten(0, weight_BOF.shape[:2])  # one dense product
    return out + bias_BO[:, :, None]


def pass_on(chain: Chain, index: int, sums: Tensor) -> Tensor:
    """What layer `index` makes of its sums [B, O, Q, *spatial]: pooled, then activated unless it is the last."""
    layer = chain.layers[index]
    if layer.pool > 1:
        sums = F.max_pool2d(sums.flatten(0, 1), layer.pool).unflatten(0, sums.shape[:2])
    return activation(chain.activation)(sums) if index + 1 < len(chain.layers) else sums
