"""Convolutions of one model at a time by torch's convolution (oneDNN on CPUs), in its channels-last layout.

Best for large convolutions: oneDNN's kernels are generated for the shape at hand, and a call costs little beside them.
A first layer of few channels would leave them half empty; there a group of models shares one convolution, since all
models read the same inputs.

Legend: g models of a block, q inputs of a block, O output channels, F features.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.convolution.kernel import Parameters, activation_backward, activation_saved, index_dtype
from distrecon.nets.convolution.workspace import Workspace
from distrecon.nets.layers import Chain, Convolution, Layer, convolutions

BLOCK_NUMBERS = 2**20  # of the largest intermediate of a block, to stay near the second-level cache
FULL_CHANNELS = 16  # of a first layer: from here on a model fills a convolution alone
GROUP_CHANNELS = 24


def block_size(chain: Chain, inputs: int) -> tuple[int, int]:
    """(models, inputs) of a block: one model, or as many as share a convolution."""
    layers = convolutions(chain)
    channels = chain.layers[0].out_features
    group = 1 if channels >= FULL_CHANNELS else -(-GROUP_CHANNELS // channels)
    sizes = [layer.out_features * prod(before) for layer, before, _ in layers]
    return group, max(1, min(inputs, BLOCK_NUMBERS // max(group * sizes[0], *sizes)))


def prepare(chain: Chain, inputs: Tensor) -> Tensor:
    """The inputs [q, channels, height, width], channels last in memory."""
    return inputs.contiguous(memory_format=torch.channels_last)


def forward(chain: Chain, parameters: Parameters, shared: Tensor, work: Workspace) -> tuple[Tensor, list[Tensor]]:
    """features[g, F, q] and, for each layer, the indices of the maxima, the sums and the activations.

    First those of the first layer, of all models side by side, then those of each model's other layers.
    """
    first, *others = convolutions(chain)
    weight, bias = parameters[0]
    grouped, saved = _layer(chain, first, shared, _channels_last(weight.flatten(0, 1)), bias.flatten(), work)
    features = []
    for m, hidden in enumerate(_models(grouped, len(weight))):
        for i, convolution in enumerate(others, 1):
            weight, bias = parameters[i]
            hidden, of_layer = _layer(chain, convolution, hidden, _channels_last(weight[m]), bias[m], work)
            saved += of_layer
        features.append(hidden.flatten(1).T)
    return torch.stack(features), saved


def backward(
    chain: Chain,
    parameters: Parameters,
    shared: Tensor,
    saved: list[Tensor],
    grad_gFq: Tensor,
    grads: Parameters,
    work: Workspace,
) -> None:
    """Adds the gradient of the convolutional layers' parameters to `grads`."""
    first, *others = convolutions(chain)
    grouped = saved[2]
    grad_grouped = work.scratch("grouped", tuple(grouped.permute(0, 2, 3, 1).shape)).permute(0, 3, 1, 2)
    models = zip(_models(grouped, len(grad_gFq)), grad_grouped.chunk(len(grad_gFq), 1), grad_gFq, strict=True)
    for m, (hidden, grad_hidden, grad_Fq) in enumerate(models):
        own = saved[3 * (1 + m * len(others)) :][: 3 * len(others)]
        inputs = [hidden, *own[2::3]]
        grad = grad_Fq.T.reshape(inputs[-1].shape)
        for i in range(len(others), 0, -1):
            weight = _channels_last(parameters[i][0][m])
            of_layer = (own[3 * i - 3], own[3 * i - 2], inputs[i - 1])
            grad, grad_weight, grad_bias = _layer_backward(
                chain, others[i - 1], _channels_last(grad), of_layer, weight, True, work
            )
            grads[i][0][m].add_(grad_weight)
            grads[i][1][m].add_(grad_bias)
        grad_hidden.copy_(grad)
    weight, bias = parameters[0]
    _, grad_weight, grad_bias = _layer_backward(
        chain, first, grad_grouped, (saved[0], saved[1], shared), _channels_last(weight.flatten(0, 1)), False, work
    )
    grads[0][0].add_(grad_weight.view(weight.shape))
    grads[0][1].add_(grad_bias.view(bias.shape))


# -- steps -------------------------------------------------------------------------------------------------------------


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _models(grouped: Tensor, count: int) -> list[Tensor]:
    """Each model's own channels [q, O, h, w]."""
    return [_channels_last(part) for part in grouped.chunk(count, 1)]


def _layer(
    chain: Chain, convolution: Convolution, inputs: Tensor, weight: Tensor, bias: Tensor, work: Workspace
) -> tuple[Tensor, list[Tensor]]:
    """Activations after convolution and pooling, and what `forward` saves of them."""
    layer, (height, width), (h, w) = convolution
    out, indices = F.conv2d(inputs, weight, bias, padding=layer.padding), inputs.new_empty(0, dtype=torch.uint8)
    if layer.pool > 1:
        shape = (len(inputs), h, w, len(bias))
        images, largest = _channels_last(out), work.allocate(shape)
        out = largest.permute(0, 3, 1, 2)
        if work.backward:
            indices = work.allocate(shape, index_dtype(height * width)).permute(0, 3, 1, 2)
            indices.copy_(_pooled_into(layer, images, out, work))
        else:
            _maxima(images.permute(0, 2, 3, 1), layer.pool, largest, work)
    hidden = out.relu_() if chain.activation == "relu" else activation(chain.activation)(out)
    return hidden, [indices, activation_saved(chain, out, hidden), hidden]


def _layer_backward(
    chain: Chain,
    convolution: Convolution,
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    with_inputs: bool,
    work: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer's inputs (if wanted), weight and bias; `saved` are indices, sums and the layer's inputs."""
    layer, spatial, _ = convolution
    indices, before, inputs = saved
    grad = activation_backward(chain, grad, before)
    grad_bias = grad.sum((0, 2, 3))  # the same before pooling, on more numbers
    if layer.pool > 1:
        grad = _unpooled(layer, _channels_last(grad), indices, spatial, work)
    grad_inputs, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, inputs, weight, None, [1, 1], [layer.padding] * 2, [1, 1], False, [0, 0], 1, [with_inputs, True, False]
    )
    return grad_inputs, grad_weight, grad_bias


def _pooled_into(layer: Layer, images: Tensor, largest: Tensor, work: Workspace) -> Tensor:
    """Writes the maxima of channels-last images to `largest`; returns their indices in scratch memory."""
    n, channels, height, width = largest.shape
    indices = work.scratch("indices", (n, height, width, channels), torch.int64).permute(0, 3, 1, 2)
    torch.ops.aten.max_pool2d_with_indices.out(images, [layer.pool] * 2, [layer.pool] * 2, out=largest, indices=indices)
    return indices


def _maxima(images: Tensor, pool: int, largest: Tensor, work: Workspace) -> Tensor:
    """Writes the maxima of images [..., height, width, n] to `largest` and returns it, faster than with indices."""
    h, w = largest.shape[-3:-1]
    rows = work.scratch("rows", (*images.shape[:-3], h, *images.shape[-2:]))
    _maximum([images[..., y : h * pool : pool, :, :] for y in range(pool)], rows)
    return _maximum([rows[..., x : w * pool : pool, :] for x in range(pool)], largest)


def _maximum(parts: list[Tensor], out: Tensor) -> Tensor:
    torch.maximum(parts[0], parts[1], out=out)
    for part in parts[2:]:
        torch.maximum(out, part, out=out)
    return out


def _unpooled(layer: Layer, grad: Tensor, indices: Tensor, spatial: tuple[int, int], work: Workspace) -> Tensor:
    """The gradient of channels-last images before pooling, in scratch memory."""
    n, channels = grad.shape[:2]
    unpooled = work.scratch("unpooled", (n, *spatial, channels)).permute(0, 3, 1, 2)
    positions = work.scratch("indices", (n, *grad.shape[2:], channels), torch.int64).permute(0, 3, 1, 2)
    torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
        grad, unpooled, [layer.pool] * 2, [layer.pool] * 2, [0, 0], [1, 1], False, positions.copy_(indices),
        grad_input=unpooled,
    )  # fmt: skip
    return unpooled
