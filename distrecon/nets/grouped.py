"""The batched forward pass for GPUs: each layer of B convolutional models is one grouped convolution.

- Activations are laid out [Q, B * channels, height, width], a group of channels a model; nothing is unfolded into
  columns. The first layer, whose inputs all models share, is one dense convolution to B * channels.
- Each layer's weights are brought together first, those of all models, which convolutions would do one by one.
- Linear layers are batched matrix products.
- Of a pool only the places of its maxima are kept for the backward pass, in two bytes each, not what it read.
- It runs on the CPU too, where `convolution/` is faster.

Legend: B models, Q inputs, C classes, O output channels, F fan-in.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.layers import Chain


def forward(chain: Chain, theta_BP: Tensor, inputs: Tensor, transformed: bool = False) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape] of theta's type; the first layer convolves.

    Backward passes work to any order; other transforms of autograd have to be told of (`transformed`).
    """
    pool = _Pool.apply if theta_BP.requires_grad and not transformed else F.max_pool2d
    act, models = activation(chain.activation), len(theta_BP)
    parts = chain.weights_and_biases(theta_BP, torch.split if transformed else _Split.apply)
    hidden, features_BQF = inputs, None
    for i, (layer, (weight, bias_BO)) in enumerate(zip(chain.layers, parts, strict=True)):
        if layer.kernel:
            groups = models if i else 1
            hidden = F.conv2d(hidden, weight.flatten(0, 1), bias_BO.flatten(), padding=layer.padding, groups=groups)
            hidden = act(pool(hidden, layer.pool) if layer.pool > 1 else hidden)
            continue
        if features_BQF is None:
            features_BQF = hidden.reshape(len(inputs), models, -1).transpose(0, 1)
        features_BQF = torch.baddbmm(bias_BO[:, None], features_BQF, weight.transpose(1, 2))
        if i + 1 < len(chain.layers):
            features_BQF = act(features_BQF)
    assert features_BQF is not None
    return features_BQF


class _Split(torch.autograd.Function):
    """Columns of a matrix, in parts that are contiguous each: one kernel for all of them."""

    @staticmethod
    def forward(ctx: Any, theta_BP: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
        parts = tuple(theta_BP.new_empty(len(theta_BP), size) for size in sizes)
        torch.split_with_sizes_copy(theta_BP, sizes, dim, out=parts)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(grads, dim=1), None, None


class _Pool(torch.autograd.Function):
    """Max pooling by disjoint squares."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, size: int) -> Tensor:
        pooled, index = F.max_pool2d(images, size, return_indices=True)
        positions = images.shape[2] * images.shape[3]
        ctx.save_for_backward(index.to(torch.int16) if positions <= 2**15 else index)
        ctx.shape = images.shape
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        zeros = grad.new_zeros(*ctx.shape[:2], ctx.shape[2] * ctx.shape[3])
        return zeros.scatter_(2, index.flatten(2).long(), grad.flatten(2)).view(ctx.shape), None
