"""Convolutions of several models at once, as batched matrix products over columns; best for small convolutions.

The inputs are the innermost axis of every array, [b, channels, height, width, q]: columns are copied in runs of q
numbers, pooling is vectorised over q, and the result of a product needs no rearrangement.

Legend: b models, q inputs, K fan-in, O output channels, N = positions * q.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture, Layer

BLOCK_NUMBERS = 200_000  # of the largest intermediate of a block: it and its gradient fit a second-level cache
BLOCK_INPUTS = 256


def convolutions(arch: Architecture) -> list[tuple[Layer, tuple[int, int], tuple[int, int]]]:
    """Each convolution with the height and width of its outputs, before and after pooling."""
    found, (height, width) = [], arch.input_shape[1:]
    for layer in arch.layers:
        if layer.kernel:
            less = layer.kernel - 1 - 2 * layer.padding
            before = (height - less, width - less)
            height, width = before[0] // layer.pool, before[1] // layer.pool
            found.append((layer, before, (height, width)))
    return found


def multiplications(arch: Architecture) -> int:
    """Of all convolutions, for one model and one input."""
    return sum(layer.out_features * layer.fan_in * prod(before) for layer, before, _ in convolutions(arch))


def block_size(arch: Architecture, inputs: int) -> tuple[int, int]:
    """(models, inputs) of a block."""
    found = convolutions(arch)
    widest = max(
        (layer.out_features if i == 0 else max(layer.out_features, layer.fan_in)) * prod(before)
        for i, (layer, before, _) in enumerate(found)
    )
    q = min(BLOCK_INPUTS, inputs, max(16, BLOCK_NUMBERS // widest))
    return max(1, BLOCK_NUMBERS // (widest * q)), q


def prepare(arch: Architecture, inputs: Tensor) -> Tensor:
    """Columns of the inputs, [1, K, N]."""
    return _columns(arch.layers[0], inputs.movedim(0, -1)[None])


def run(arch: Architecture, parameters: list[tuple[Tensor, Tensor]], shared: Tensor) -> tuple[Tensor, list[Tensor]]:
    """features[b, F, q] and, for each layer, the places of the maxima, the sums and the activations."""
    act, columns, seen = activation(arch.activation), shared, []
    hidden = shared
    for i, (layer, (height, width), _) in enumerate(convolutions(arch)):
        weight_bOK, bias_bO = parameters[i][0].flatten(2), parameters[i][1]
        if i == 0:  # all models read the same columns
            out = (weight_bOK.flatten(0, 1) @ columns[0]).unflatten(0, weight_bOK.shape[:2])
        else:
            out = torch.bmm(weight_bOK, _columns(layer, hidden))
        out = out.unflatten(2, (height, width, -1))
        out, places = _pooled(layer, out)
        out.add_(bias_bO[:, :, None, None, None])  # the same after pooling, on fewer numbers
        hidden = out.relu_() if arch.activation == "relu" else act(out)
        seen += [places, before_activation(arch, out, hidden), hidden]
    return hidden.flatten(1, 3), seen


def gradient(
    arch: Architecture,
    parameters: list[tuple[Tensor, Tensor]],
    shared: Tensor,
    kept: list[Tensor],
    grad_bFq: Tensor,
    grads: list[tuple[Tensor, Tensor]],
) -> None:
    """Adds the gradient of the convolutional layers' parameters to `grads`."""
    found = convolutions(arch)
    grad = grad_bFq
    for i in range(len(found) - 1, -1, -1):
        layer, (height, width), _ = found[i]
        places, before, hidden = kept[3 * i : 3 * i + 3]
        grad = through_activation(arch, grad.view(hidden.shape), before)
        grads[i][1].add_(grad.sum((2, 3, 4)))
        grad_bON = _unpooled(layer, grad, places, (height, width)).flatten(2)
        if i == 0:
            grad_OK = grad_bON.flatten(0, 1) @ shared[0].T
            grads[i][0].add_(grad_OK.view(grads[i][0].shape))
            return
        columns = _columns(layer, kept[3 * i - 1])  # copied again rather than kept: kernel^2 times the activations
        grads[i][0].flatten(2).add_(torch.bmm(grad_bON, columns.transpose(1, 2)))
        grad_bKN = torch.bmm(parameters[i][0].flatten(2).transpose(1, 2), grad_bON)
        grad = _folded(layer, grad_bKN, kept[3 * i - 1].shape, (height, width))


# -- shared with the other kernel --------------------------------------------------------------------------------------


def before_activation(arch: Architecture, out: Tensor, hidden: Tensor) -> Tensor:
    """What the activation's derivative is taken at: for relu and its like, it is the same at their results."""
    return hidden if activation(arch.activation).symmetry == "scaled" else out


def through_activation(arch: Architecture, grad: Tensor, before: Tensor) -> Tensor:
    """The gradient before the activation, from that after it; `before` as kept by `run`."""
    if arch.activation == "relu":
        return torch.ops.aten.threshold_backward(grad, before, 0)  # type: ignore[no-any-return]
    with torch.enable_grad():
        before = before.detach().requires_grad_(True)
        return torch.autograd.grad(activation(arch.activation)(before), before, grad)[0]


def place_dtype(positions: int) -> torch.dtype:
    """The smallest type that holds a place among so many positions."""
    return torch.uint8 if positions <= 2**8 else torch.int16 if positions <= 2**15 else torch.int64


# -- pieces ------------------------------------------------------------------------------------------------------------


def _columns(layer: Layer, hidden: Tensor) -> Tensor:
    """[b, K, N] of hidden [b, channels, height, width, q]."""
    if layer.padding:
        hidden = F.pad(hidden, (0, 0, *(layer.padding,) * 4))
    patches = hidden.unfold(2, layer.kernel, 1).unfold(3, layer.kernel, 1)  # [b, C, h, w, q, k, k]
    return patches.permute(0, 1, 5, 6, 2, 3, 4).reshape(len(hidden), layer.fan_in, -1)


def _folded(layer: Layer, grad_bKN: Tensor, shape: torch.Size, spatial: tuple[int, int]) -> Tensor:
    """The adjoint of `_columns`: the gradient of hidden, of `shape`."""
    k, p, (h, w) = layer.kernel, layer.padding, spatial
    b, channels, height, width, q = shape
    patches = grad_bKN.view(b, channels, k, k, h, w, q)
    grad = grad_bKN.new_zeros(b, channels, height + 2 * p, width + 2 * p, q)
    for y in range(k):
        for x in range(k):
            grad[:, :, y : y + h, x : x + w].add_(patches[:, :, y, x])
    return grad[:, :, p : p + height, p : p + width].contiguous() if p else grad


def _channels_last(hidden: Tensor) -> Tensor:
    """[b, O, h, w, q] seen as images with q channels, for which torch's pooling is vectorised."""
    return hidden.flatten(0, 1).permute(0, 3, 1, 2)


def _pooled(layer: Layer, out: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima [b, O, h, w, q] and their places (empty without pooling)."""
    if layer.pool == 1:
        return out, out.new_empty(0, dtype=torch.uint8)
    largest, places = torch.ops.aten.max_pool2d_with_indices(_channels_last(out), [layer.pool] * 2, [layer.pool] * 2)
    back = [t.permute(0, 2, 3, 1).contiguous().unflatten(0, out.shape[:2]) for t in (largest, places)]
    return back[0], back[1].to(place_dtype(out.shape[2] * out.shape[3]))


def _unpooled(layer: Layer, grad: Tensor, places: Tensor, spatial: tuple[int, int]) -> Tensor:
    """The gradient [b, O, height, width, q] before pooling."""
    if layer.pool == 1:
        return grad
    b, channels, _, _, q = grad.shape
    like = grad.new_empty(b * channels, *spatial, q).permute(0, 3, 1, 2)  # only its shape and layout matter
    spread = torch.ops.aten.max_pool2d_with_indices_backward(
        _channels_last(grad), like, [layer.pool] * 2, [layer.pool] * 2, [0, 0], [1, 1], False,
        _channels_last(places.long()),
    )  # fmt: skip
    return spread.permute(0, 2, 3, 1).contiguous().view(b, channels, *spatial, q)  # type: ignore[no-any-return]
