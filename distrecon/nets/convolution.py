"""Fast forward and backward pass of many convolutional networks on shared inputs, in blocks that stay in cache.

- The work is cut into blocks of some models x some inputs. A block runs through the whole network before the next one
  begins, so that only the pooled activations, not the convolutions' outputs, ever leave the cache.
- Kept for the backward pass: pooled activations and, in one or two bytes each, where each pool's maximum was.
- The gradient with respect to the inputs, which nobody asked for, is not computed.
- The convolutions of a block are done by one of two kernels: `modelwise.py`, one model at a time by oneDNN, best
  for large convolutions; `direct.py`, several models at once by compiled loops, best for small ones.
- Double backward (create_graph=True) falls back to `forward.plain`, which autograd can differentiate again.

Legend: B models, b models of a block, Q inputs, q inputs of a block, C classes, F features after the convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from distrecon.nets import direct, modelwise
from distrecon.nets.activations import activation
from distrecon.nets.layers import convolutions, multiplications, place_dtype, through_activation
from distrecon.nets.workspace import Workspace

if TYPE_CHECKING:
    from distrecon.nets.architectures import Architecture

Parameters = list[tuple[Tensor, Tensor]]  # weight [b, *weight_shape] and bias [b, out] of each layer

LARGE_CONVOLUTION = 800_000  # multiplications a model and input, from which a model fills oneDNN's convolutions
VECTOR = 16  # inputs: what one vector instruction works on
FEW_INPUTS = 8  # below, one model's convolutions are too small for calls of their own


class Kernel(Protocol):
    """How the convolutional layers of one block are computed; `direct` and `modelwise` are such modules."""

    def block_size(self, arch: Architecture, inputs: int) -> tuple[int, int]:
        """(models, inputs) of a block."""

    def prepare(self, arch: Architecture, inputs: Tensor) -> Tensor:
        """The inputs [q, *input_shape] in the form in which the first layer reads them, made once for all models."""

    def run(
        self, arch: Architecture, parameters: Parameters, shared: Tensor, work: Workspace
    ) -> tuple[Tensor, list[Tensor]]:
        """features[b, F, q], and what `gradient` needs to see again."""

    def gradient(
        self,
        arch: Architecture,
        parameters: Parameters,
        shared: Tensor,
        kept: list[Tensor],
        grad_bFq: Tensor,
        grads: Parameters,
        work: Workspace,
    ) -> None:
        """Adds the gradient of the convolutional layers' parameters to `grads`."""


def choose(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> Kernel:
    """The faster kernel for this architecture, number type and number of inputs."""
    if theta_BP.dtype not in direct.DTYPES:
        return modelwise
    if theta_BP.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return direct
    large = multiplications(arch) >= LARGE_CONVOLUTION
    return modelwise if large and len(inputs) >= FEW_INPUTS else direct


def forward(arch: Architecture, theta_BP: Tensor, inputs: Tensor, kernel: Kernel | None = None) -> Tensor:
    """logits[B, Q, C] on shared inputs [Q, *input_shape] of theta's type; B and Q at least 1."""
    kernel = kernel or choose(arch, theta_BP, inputs)
    if torch.is_grad_enabled() and theta_BP.requires_grad:
        return _Forward.apply(theta_BP, inputs, arch, kernel)  # type: ignore[no-any-return]
    return _run(arch, theta_BP.detach(), inputs, kernel, None)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta_BP: Tensor, inputs: Tensor, arch: Architecture, kernel: Kernel) -> Tensor:
        kept: list[list[Tensor]] = []
        with torch.autocast(theta_BP.device.type, enabled=False):
            logits_BQC = _run(arch, theta_BP, inputs, kernel, kept)
        ctx.arch, ctx.kernel, ctx.sizes = arch, kernel, [len(seen) for seen in kept]
        ctx.save_for_backward(theta_BP, inputs, *chain.from_iterable(kept))
        return logits_BQC

    @staticmethod
    def backward(ctx: Any, grad_BQC: Tensor) -> tuple[Tensor | None, ...]:
        theta_BP, inputs, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            from distrecon.nets.forward import plain  # imported here, since it imports this module

            (grad_BP,) = torch.autograd.grad(plain(ctx.arch, theta_BP, inputs), theta_BP, grad_BQC, create_graph=True)
            return grad_BP, None, None, None
        tensors = iter(flat)
        kept = [list(islice(tensors, size)) for size in ctx.sizes]
        return _gradient(ctx.arch, theta_BP, inputs, ctx.kernel, kept, grad_BQC), None, None, None


def slices(total: int, most: int, multiple: int = 1) -> list[slice]:
    """Even parts of range(total), none longer than `most`, all but the last a multiple of `multiple` (or of `most`)."""
    even = -(-total // -(-total // most))
    size = min(most, -(-even // multiple) * multiple)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _blocks(
    arch: Architecture, theta_BP: Tensor, inputs: Tensor, kernel: Kernel
) -> Iterator[tuple[slice, slice, Parameters, Tensor]]:
    """Of every block: its models, its inputs, its models' parameters and its prepared inputs."""
    models, count = kernel.block_size(arch, len(inputs))
    parts = [(b, arch.weights_and_biases(theta_BP[b])) for b in slices(len(theta_BP), models)]
    for q in slices(len(inputs), count, VECTOR):
        shared = kernel.prepare(arch, inputs[q])
        for b, parameters in parts:
            yield b, q, parameters, shared


def _run(
    arch: Architecture, theta_BP: Tensor, inputs: Tensor, kernel: Kernel, kept: list[list[Tensor]] | None
) -> Tensor:
    """logits[B, Q, C]; what the backward pass needs of each block is appended to `kept`."""
    logits_BCQ = theta_BP.new_empty(len(theta_BP), arch.num_outputs, len(inputs))
    models, count = kernel.block_size(arch, len(inputs))
    at_once = models * count if kept is None else len(theta_BP) * len(inputs)
    work = Workspace(theta_BP, at_once * _kept_bytes(arch, theta_BP.dtype), backward=kept is not None)
    for b, q, parameters, shared in _blocks(arch, theta_BP, inputs, kernel):
        features_bFq, seen = kernel.run(arch, parameters, shared, work)
        logits_BCQ[b, :, q], hidden = _linear(arch, parameters, features_bFq)
        if kept is None:
            work.reset()
        else:
            kept.append(seen + hidden)
    return logits_BCQ.transpose(1, 2)


def _gradient(
    arch: Architecture,
    theta_BP: Tensor,
    inputs: Tensor,
    kernel: Kernel,
    kept: list[list[Tensor]],
    grad_BQC: Tensor,
) -> Tensor:
    """The gradient [B, P], from the gradient of the logits."""
    grad_BP = torch.zeros_like(theta_BP)
    work = Workspace(theta_BP)
    linear = 2 * _linear_layers(arch)
    for seen, (b, q, parameters, shared) in zip(kept, _blocks(arch, theta_BP, inputs, kernel), strict=True):
        grads = arch.weights_and_biases(grad_BP[b])
        grad_bCq = grad_BQC[b, q].transpose(1, 2)
        grad_bFq = _linear_gradient(arch, parameters, seen[len(seen) - linear :], grad_bCq, grads)
        kernel.gradient(arch, parameters, shared, seen[: len(seen) - linear], grad_bFq, grads, work)
    return grad_BP


def _kept_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Of the convolutional layers, for one model and one input, with room for alignment."""
    total = 0
    for layer, before, after in convolutions(arch):
        place = place_dtype(prod(before)).itemsize if layer.pool > 1 else 0
        total += layer.out_features * prod(after) * (dtype.itemsize + place) + 2
    return total


# -- the linear layers behind the convolutions -------------------------------------------------------------------------


def _linear_layers(arch: Architecture) -> int:
    return sum(not layer.kernel for layer in arch.layers)


def _linear(arch: Architecture, parameters: Parameters, hidden_bFq: Tensor) -> tuple[Tensor, list[Tensor]]:
    """logits[b, C, q], and each layer's input and that input before the activation."""
    act, seen, before = activation(arch.activation), [], hidden_bFq
    for i, layer in enumerate(arch.layers):
        if layer.kernel:
            continue
        weight_bOF, bias_bO = parameters[i]
        seen += [hidden_bFq, before]
        before = torch.baddbmm(bias_bO[:, :, None], weight_bOF, hidden_bFq)
        hidden_bFq = act(before)
    return before, seen


def _linear_gradient(
    arch: Architecture, parameters: Parameters, seen: list[Tensor], grad: Tensor, grads: Parameters
) -> Tensor:
    """Adds the linear layers' gradients to `grads`; returns the gradient of the features [b, F, q]."""
    first = len(arch.layers) - _linear_layers(arch)
    for i in range(len(arch.layers) - 1, first - 1, -1):
        hidden_bFq, before = seen[2 * (i - first)], seen[2 * (i - first) + 1]
        grads[i][0].add_(torch.bmm(grad, hidden_bFq.transpose(1, 2)))
        grads[i][1].add_(grad.sum(2))
        grad = torch.bmm(parameters[i][0].transpose(1, 2), grad)
        if i > first:
            grad = through_activation(arch, grad, before)
    return grad
