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
from distrecon.nets.workspace import Workspace

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture, Layer

BLOCK_NUMBERS = 500_000  # of the largest intermediate of a block: it and its gradient fit a second-level cache
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
    patches = _patches(arch.layers[0], inputs.movedim(0, -1)[None].contiguous())
    return patches.reshape(1, arch.layers[0].fan_in, -1)


def run(
    arch: Architecture, parameters: list[tuple[Tensor, Tensor]], shared: Tensor, work: Workspace
) -> tuple[Tensor, list[Tensor]]:
    """features[b, F, q] and, for each layer, the places of the maxima, the sums and the activations."""
    act, hidden, seen = activation(arch.activation), shared, []
    for i, (layer, (height, width), _) in enumerate(convolutions(arch)):
        weight_bOK, bias_bO = parameters[i][0].flatten(2), parameters[i][1]
        models, channels = bias_bO.shape
        q = shared.shape[2] // prod(convolutions(arch)[0][1])
        shape = (models, channels, height * width * q)
        out = work.keep(shape) if layer.pool == 1 else work.scratch("out", shape)
        if i == 0:  # all models read the same columns
            torch.mm(weight_bOK.flatten(0, 1), shared[0], out=out.flatten(0, 1))
        else:
            torch.bmm(weight_bOK, _columns(layer, hidden, work), out=out)
        out, places = _pooled(layer, out.unflatten(2, (height, width, q)), work)
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
    work: Workspace,
) -> None:
    """Adds the gradient of the convolutional layers' parameters to `grads`."""
    found = convolutions(arch)
    grad = grad_bFq
    for i in range(len(found) - 1, -1, -1):
        layer, spatial, _ = found[i]
        places, before, hidden = kept[3 * i : 3 * i + 3]
        grad = through_activation(arch, grad.view(hidden.shape), before)
        grads[i][1].add_(grad.flatten(2).sum(2))
        grad_bON = _unpooled(layer, grad, places, spatial, work).flatten(2)
        if i == 0:
            grad_OK = grad_bON.flatten(0, 1) @ shared[0].T
            grads[i][0].add_(grad_OK.view(grads[i][0].shape))
            return
        inputs = kept[3 * i - 1]
        columns = _columns(layer, inputs, work)  # copied again rather than kept: kernel^2 times the activations
        grads[i][0].flatten(2).add_(torch.bmm(grad_bON, columns.transpose(1, 2)))
        # the columns have been read: their gradient takes their place
        grad_bKN = torch.bmm(parameters[i][0].flatten(2).transpose(1, 2), grad_bON, out=columns)
        grad = _folded(layer, grad_bKN, inputs.shape, spatial, work)


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


def pooled_into(layer: Layer, images: Tensor, largest: Tensor, work: Workspace) -> Tensor:
    """Writes the maxima of channels-last images to `largest`; returns their places in scratch memory."""
    n, channels, height, width = largest.shape
    places = work.scratch("places", (n, height, width, channels), torch.int64).permute(0, 3, 1, 2)
    torch.ops.aten.max_pool2d_with_indices.out(images, [layer.pool] * 2, [layer.pool] * 2, out=largest, indices=places)
    return places


def maxima(images: Tensor, pool: int, largest: Tensor, work: Workspace) -> Tensor:
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


def unpooled(layer: Layer, grad: Tensor, places: Tensor, spatial: tuple[int, int], work: Workspace) -> Tensor:
    """The gradient of channels-last images before pooling, in scratch memory."""
    n, channels = grad.shape[:2]
    spread = work.scratch("spread", (n, *spatial, channels)).permute(0, 3, 1, 2)
    places_long = work.scratch("places", (n, *grad.shape[2:], channels), torch.int64).permute(0, 3, 1, 2)
    torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
        grad, spread, [layer.pool] * 2, [layer.pool] * 2, [0, 0], [1, 1], False, places_long.copy_(places),
        grad_input=spread,
    )  # fmt: skip
    return spread


# -- pieces ------------------------------------------------------------------------------------------------------------


def _patches(layer: Layer, hidden: Tensor) -> Tensor:
    """View [b, channels, k, k, h, w, q] of what each output reads of hidden [b, channels, height, width, q]."""
    if layer.padding:
        hidden = F.pad(hidden, (0, 0, *(layer.padding,) * 4))
    return hidden.unfold(2, layer.kernel, 1).unfold(3, layer.kernel, 1).permute(0, 1, 5, 6, 2, 3, 4)


def _columns(layer: Layer, hidden: Tensor, work: Workspace) -> Tensor:
    """[b, K, N] of hidden [b, channels, height, width, q], in scratch memory."""
    patches = _patches(layer, hidden)
    columns = work.scratch("columns", tuple(patches.shape)).copy_(patches)
    return columns.view(len(hidden), layer.fan_in, -1)


def _folded(layer: Layer, grad_bKN: Tensor, shape: torch.Size, spatial: tuple[int, int], work: Workspace) -> Tensor:
    """The adjoint of `_columns`: the gradient of hidden, of `shape`."""
    k, p, (h, w) = layer.kernel, layer.padding, spatial
    b, channels, height, width, q = shape
    patches = grad_bKN.view(b, channels, k, k, h, w, q)
    grad = work.scratch("folded", (b, channels, height + 2 * p, width + 2 * p, q)).zero_()
    for y in range(k):
        for x in range(k):
            grad[:, :, y : y + h, x : x + w].add_(patches[:, :, y, x])
    return grad[:, :, p : p + height, p : p + width].contiguous() if p else grad


def _channels_last(hidden: Tensor) -> Tensor:
    """[b, O, h, w, q] seen as images with q channels, for which torch's pooling is vectorised."""
    return hidden.flatten(0, 1).permute(0, 3, 1, 2)


def _pooled(layer: Layer, out: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """The maxima [b, O, h, w, q] and their places (empty without pooling), both kept."""
    if layer.pool == 1:
        return out, out.new_empty(0, dtype=torch.uint8)
    b, channels, height, width, q = out.shape
    shape = (b, channels, height // layer.pool, width // layer.pool, q)
    largest = work.keep(shape)
    if not work.backward:
        return maxima(out, layer.pool, largest, work), out.new_empty(0, dtype=torch.uint8)
    places = work.keep(shape, place_dtype(height * width))
    _channels_last(places).copy_(pooled_into(layer, _channels_last(out), _channels_last(largest), work))
    return largest, places


def _unpooled(layer: Layer, grad: Tensor, places: Tensor, spatial: tuple[int, int], work: Workspace) -> Tensor:
    """The gradient [b, O, height, width, q] before pooling."""
    if layer.pool == 1:
        return grad
    b, channels, _, _, q = grad.shape
    spread = unpooled(layer, _channels_last(grad), _channels_last(places), spatial, work)
    return spread.permute(0, 2, 3, 1).view(b, channels, *spatial, q)
