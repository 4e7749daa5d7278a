"""Convolutions of one model at a time by torch's convolution (oneDNN on CPUs), in its channels-last layout.

Best for large convolutions: oneDNN's kernels are generated for the shape at hand, and a call costs little beside them.
A first layer of few channels would leave them half empty; there a group of models shares one convolution, since all
models read the same inputs.

Legend: g models of a block, q inputs of a block, O output channels, F features.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.layers import before_activation, convolutions, place_dtype, through_activation
from distrecon.nets.workspace import Workspace

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture, Layer

Convolution = tuple["Layer", tuple[int, int], tuple[int, int]]

BLOCK_NUMBERS = 2**20  # of the largest intermediate of a block, to stay near the second-level cache
FULL_CHANNELS = 16  # of a first layer: from here on a model fills a convolution alone
GROUP_CHANNELS = 24


def block_size(arch: Architecture, inputs: int) -> tuple[int, int]:
    """(models, inputs) of a block: one model, or as many as share a convolution."""
    found = convolutions(arch)
    channels = arch.layers[0].out_features
    group = 1 if channels >= FULL_CHANNELS else -(-GROUP_CHANNELS // channels)
    sizes = [layer.out_features * prod(before) for layer, before, _ in found]
    return group, max(1, min(inputs, BLOCK_NUMBERS // max(group * sizes[0], *sizes)))


def prepare(arch: Architecture, inputs: Tensor) -> Tensor:
    """The inputs [q, channels, height, width], channels last in memory."""
    return inputs.contiguous(memory_format=torch.channels_last)


def run(
    arch: Architecture, parameters: list[tuple[Tensor, Tensor]], shared: Tensor, work: Workspace
) -> tuple[Tensor, list[Tensor]]:
    """features[g, F, q] and, for each layer, the places of the maxima, the sums and the activations.

    First those of the first layer, of all models side by side, then those of each model's other layers.
    """
    first, *others = convolutions(arch)
    weight, bias = parameters[0]
    together, seen = _layer(arch, first, shared, _channels_last(weight.flatten(0, 1)), bias.flatten(), work)
    features = []
    for m, hidden in enumerate(_models(together, len(weight))):
        for i, convolution in enumerate(others, 1):
            weight, bias = parameters[i]
            hidden, kept = _layer(arch, convolution, hidden, _channels_last(weight[m]), bias[m], work)
            seen += kept
        features.append(hidden.flatten(1).T)
    return torch.stack(features), seen


def gradient(
    arch: Architecture,
    parameters: list[tuple[Tensor, Tensor]],
    shared: Tensor,
    kept: list[Tensor],
    grad_gFq: Tensor,
    grads: list[tuple[Tensor, Tensor]],
    work: Workspace,
) -> None:
    """Adds the gradient of the convolutional layers' parameters to `grads`."""
    first, *others = convolutions(arch)
    together = kept[2]
    grad_together = work.scratch("together", tuple(together.permute(0, 2, 3, 1).shape)).permute(0, 3, 1, 2)
    models = zip(_models(together, len(grad_gFq)), grad_together.chunk(len(grad_gFq), 1), grad_gFq, strict=True)
    for m, (hidden, grad_hidden, grad_Fq) in enumerate(models):
        seen = kept[3 * (1 + m * len(others)) :][: 3 * len(others)]
        inputs = [hidden, *seen[2::3]]
        grad = grad_Fq.T.reshape(inputs[-1].shape)
        for i in range(len(others), 0, -1):
            weight = _channels_last(parameters[i][0][m])
            kept_here = (seen[3 * i - 3], seen[3 * i - 2], inputs[i - 1])
            grad, grad_weight, grad_bias = _layer_gradient(
                arch, others[i - 1], _channels_last(grad), kept_here, weight, True, work
            )
            grads[i][0][m].add_(grad_weight)
            grads[i][1][m].add_(grad_bias)
        grad_hidden.copy_(grad)
    weight, bias = parameters[0]
    _, grad_weight, grad_bias = _layer_gradient(
        arch, first, grad_together, (kept[0], kept[1], shared), _channels_last(weight.flatten(0, 1)), False, work
    )
    grads[0][0].add_(grad_weight.view(weight.shape))
    grads[0][1].add_(grad_bias.view(bias.shape))


# -- pieces ------------------------------------------------------------------------------------------------------------


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _models(together: Tensor, count: int) -> list[Tensor]:
    """Each model's own channels [q, O, h, w]."""
    return [_channels_last(part) for part in together.chunk(count, 1)]


def _layer(
    arch: Architecture, convolution: Convolution, inputs: Tensor, weight: Tensor, bias: Tensor, work: Workspace
) -> tuple[Tensor, list[Tensor]]:
    """Activations after convolution and pooling, and what `run` keeps of them."""
    layer, (height, width), (h, w) = convolution
    out, places = F.conv2d(inputs, weight, bias, padding=layer.padding), inputs.new_empty(0, dtype=torch.uint8)
    if layer.pool > 1:
        shape = (len(inputs), h, w, len(bias))
        images, largest = _channels_last(out), work.keep(shape)
        out = largest.permute(0, 3, 1, 2)
        if work.backward:
            places = work.keep(shape, place_dtype(height * width)).permute(0, 3, 1, 2)
            places.copy_(_pooled_into(layer, images, out, work))
        else:
            _maxima(images.permute(0, 2, 3, 1), layer.pool, largest, work)
    hidden = out.relu_() if arch.activation == "relu" else activation(arch.activation)(out)
    return hidden, [places, before_activation(arch, out, hidden), hidden]


def _layer_gradient(
    arch: Architecture,
    convolution: Convolution,
    grad: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    with_inputs: bool,
    work: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer's inputs (if wanted), weight and bias; `kept` are places, sums and the layer's inputs."""
    layer, spatial, _ = convolution
    places, before, inputs = kept
    grad = through_activation(arch, grad, before)
    grad_bias = grad.sum((0, 2, 3))  # the same before pooling, on more numbers
    if layer.pool > 1:
        grad = _unpooled(layer, _channels_last(grad), places, spatial, work)
    found = torch.ops.aten.convolution_backward(
        grad, inputs, weight, None, [1, 1], [layer.padding] * 2, [1, 1], False, [0, 0], 1, [with_inputs, True, False]
    )
    return found[0], found[1], grad_bias


def _pooled_into(layer: Layer, images: Tensor, largest: Tensor, work: Workspace) -> Tensor:
    """Writes the maxima of channels-last images to `largest`; returns their places in scratch memory."""
    n, channels, height, width = largest.shape
    places = work.scratch("places", (n, height, width, channels), torch.int64).permute(0, 3, 1, 2)
    torch.ops.aten.max_pool2d_with_indices.out(images, [layer.pool] * 2, [layer.pool] * 2, out=largest, indices=places)
    return places


def _maxima(images: Tensor, pool: int, largest: Tensor, work: Workspace) -> Tensor:
    """Writes the maxima of images [..., height, width, n] to `largest` and returns it, faster than with places."""
    h, w = largest.shape[-3:-1]
    rows = work.scratch("rows", (*images.shape[:-3], h, *images.shape[-2:]))
    _maximum([images[..., y : h * pool : pool, :, :] for y in range(pool)], rows)
    return _maximum([rows[..., x : w * pool : pool, :] for x in range(pool)], largest)


def _maximum(parts: list[Tensor], out: Tensor) -> Tensor:
    torch.maximum(parts[0], parts[1], out=out)
    for part in parts[2:]:
        torch.maximum(out, part, out=out)
    return out


def _unpooled(layer: Layer, grad: Tensor, places: Tensor, spatial: tuple[int, int], work: Workspace) -> Tensor:
    """The gradient of channels-last images before pooling, in scratch memory."""
    n, channels = grad.shape[:2]
    spread = work.scratch("spread", (n, *spatial, channels)).permute(0, 3, 1, 2)
    places_long = work.scratch("places", (n, *grad.shape[2:], channels), torch.int64).permute(0, 3, 1, 2)
    torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
        grad, spread, [layer.pool] * 2, [layer.pool] * 2, [0, 0], [1, 1], False, places_long.copy_(places),
        grad_input=spread,
    )  # fmt: skip
    return spread
