"""Convolutions of many models by compiled loops over the images themselves; best for small convolutions.

The inputs are the innermost axis of every array, [b, channels, height, width, q], so that the loops (`loops.py`) run
over long rows and are vectorised whatever the kernel's size.

Legend: b models, q inputs, O output channels, F features.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.convolution import loops
from distrecon.nets.convolution.kernel import Parameters, activation_backward, activation_saved, index_dtype
from distrecon.nets.convolution.workspace import Workspace
from distrecon.nets.layers import Chain, Layer, convolutions

DTYPES = (torch.float32, torch.float64)
ROWS_NUMBERS = 4096  # of one channel's sums: they and the rows they are summed from fit a first-level cache
BLOCK_NUMBERS = 500_000  # of the largest activations of a block: they and their gradient fit a second-level cache
FEWEST_INPUTS, MOST_INPUTS = 16, 256  # of a block: a vector instruction's width; what the linear layers need to be fast


def block_size(chain: Chain, inputs: int) -> tuple[int, int]:
    """(models, inputs) of a block."""
    layers = convolutions(chain)
    widest = max(prod(before) for _, before, _ in layers)
    q = min(inputs, MOST_INPUTS, max(FEWEST_INPUTS, ROWS_NUMBERS // widest))
    return max(1, BLOCK_NUMBERS // (q * max(layer.out_features * prod(after) for layer, _, after in layers))), q


def prepare(chain: Chain, inputs: Tensor) -> Tensor:
    """The inputs as images [1, channels, height, width, q], padded for the first layer."""
    return _padded(chain.layers[0], inputs.movedim(0, -1)[None]).contiguous()


def forward(chain: Chain, parameters: Parameters, shared: Tensor, work: Workspace) -> tuple[Tensor, list[Tensor]]:
    """features[b, F, q] and, for each layer, the indices of the maxima, the sums and the activations."""
    act, hidden, saved = activation(chain.activation), shared, []
    for i, (layer, (rows, width), pooled) in enumerate(convolutions(chain)):
        weight_bOK, bias_bO = parameters[i][0].flatten(2), parameters[i][1]
        images = _padded(layer, hidden) if i else shared
        q = images.shape[-1]
        out, indices = work.allocate((*bias_bO.shape, *pooled, q)), _indices(layer, (*bias_bO.shape, *pooled, q), work)
        arguments = weight_bOK, bias_bO, images.flatten(1), *_runs(layer, images), layer.pool, out, indices
        _loop(loops.convolve, arguments, (rows, width * q), work)
        hidden = out.relu_() if chain.activation == "relu" else act(out)
        saved += [indices, activation_saved(chain, out, hidden), hidden]
    return hidden.flatten(1, 3), saved


def backward(
    chain: Chain,
    parameters: Parameters,
    shared: Tensor,
    saved: list[Tensor],
    grad_bFq: Tensor,
    grads: Parameters,
    work: Workspace,
) -> None:
    """Adds the gradient of the convolutional layers' parameters to `grads`."""
    grad = grad_bFq
    for i, (layer, (rows, width), _) in reversed(list(enumerate(convolutions(chain)))):
        indices, before, hidden = saved[3 * i : 3 * i + 3]
        grad = activation_backward(chain, grad.reshape(hidden.shape), before)
        grads[i][1].add_(grad.flatten(2).sum(2))
        images = _padded(layer, saved[3 * i - 1]) if i else shared
        weight_bKO = parameters[i][0].flatten(2).transpose(1, 2)
        grad_weight = work.scratch("weight", (len(grad), layer.out_features, layer.fan_in)).zero_()
        grad_images = work.scratch(f"images{i}", tuple(images.shape) if i else (0,) * 5).zero_()
        arguments = weight_bKO, images.flatten(1), *_runs(layer, images), layer.pool, grad, indices
        results = grad_weight, grad_images.view(len(grad_images), images[0].numel())
        unpooled_shape = layer.out_features, rows, width * images.shape[-1]
        _loop(loops.gradients, (*arguments, *results), unpooled_shape, work)
        grads[i][0].add_(grad_weight.view_as(grads[i][0]))
        grad = _unpadded(layer, grad_images)


# -- steps -------------------------------------------------------------------------------------------------------------


def _padded(layer: Layer, images: Tensor) -> Tensor:
    return F.pad(images, (0, 0, *(layer.padding,) * 4)) if layer.padding else images


def _unpadded(layer: Layer, images: Tensor) -> Tensor:
    p = layer.padding
    return images[:, :, p : images.shape[2] - p, p : images.shape[3] - p]


def _indices(layer: Layer, shape: tuple[int, ...], work: Workspace) -> Tensor:
    """Memory for the indices of the maxima in their pools, empty without pooling."""
    return work.allocate(shape if layer.pool > 1 else (0,) * 5, index_dtype(layer.pool**2))


def _runs(layer: Layer, images: Tensor) -> tuple[np.ndarray, int]:
    """Where the run of each tap [K] starts in one model's images, and how much later that of the next row does."""
    _, channels, height, width, q = images.shape
    pixels = np.arange(channels * height * width).reshape(channels, height, width)
    return pixels[:, : layer.kernel, : layer.kernel].ravel() * q, width * q


def _loop(loop: Callable[..., Any], arguments: tuple[Any, ...], scratch: tuple[int, ...], work: Workspace) -> None:
    """Runs a loop, its tensors as arrays, the last one scratch memory."""
    tensors = (*arguments, work.scratch("loop", scratch))
    loop(*(a.detach().contiguous().numpy() if isinstance(a, Tensor) else a for a in tensors))
