"""The forward and backward pass in blocks of some models x some inputs.

- A block runs through the whole network before the next one begins, so that only the pooled activations, not the
  convolutions' outputs, ever leave the cache.
- Saved for the backward pass: pooled activations and, in one or two bytes each, the indices of each pool's maximum.
- The gradient with respect to the inputs, which nobody asked for, is not computed.
- Double backward (create_graph=True) goes through `plain.py`, which autograd can differentiate again.

Legend: B models, b models of a block, Q inputs, q inputs of a block, C classes, F features after the convolutions.
"""

from collections.abc import Iterator
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor

from distrecon.nets import plain
from distrecon.nets.convolution import direct, linear, modelwise
from distrecon.nets.convolution.kernel import Kernel, Parameters, index_dtype
from distrecon.nets.convolution.workspace import Workspace
from distrecon.nets.layers import Chain, convolutions

LARGE_CONVOLUTION = 800_000  # multiplications a model and input, from which a model fills oneDNN's convolutions
VECTOR = 16  # inputs: what one vector instruction works on
FEW_INPUTS = 8  # below, one model's convolutions are too small for calls of their own


def forward(chain: Chain, theta_BP: Tensor, inputs: Tensor, kernel: Kernel | None = None) -> Tensor:
    """logits[B, Q, C] on inputs [Q, *input_shape] of theta's type, differentiable in theta; B and Q at least 1."""
    kernel = kernel or choose(chain, theta_BP, inputs)
    if torch.is_grad_enabled() and theta_BP.requires_grad:
        return _Forward.apply(theta_BP, inputs, chain, kernel)  # type: ignore[no-any-return]
    return _forward(chain, theta_BP.detach(), inputs, kernel, None)


def choose(chain: Chain, theta_BP: Tensor, inputs: Tensor) -> Kernel:
    """The faster kernel for this network, number type and number of inputs."""
    if theta_BP.dtype not in direct.DTYPES:
        return modelwise
    if theta_BP.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return direct
    work = sum(layer.out_features * layer.fan_in * prod(before) for layer, before, _ in convolutions(chain))
    return modelwise if work >= LARGE_CONVOLUTION and len(inputs) >= FEW_INPUTS else direct


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta_BP: Tensor, inputs: Tensor, chain: Chain, kernel: Kernel) -> Tensor:
        saved: list[list[Tensor]] = []
        with torch.autocast(theta_BP.device.type, enabled=False):
            logits_BQC = _forward(chain, theta_BP, inputs, kernel, saved)
        ctx.chain, ctx.kernel, ctx.counts = chain, kernel, [len(tensors) for tensors in saved]
        ctx.save_for_backward(theta_BP, inputs, *(tensor for tensors in saved for tensor in tensors))
        return logits_BQC

    @staticmethod
    def backward(ctx: Any, grad_BQC: Tensor) -> tuple[Tensor | None, ...]:
        theta_BP, inputs, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            again_BQC = plain.forward(ctx.chain, theta_BP, inputs)
            (grad_BP,) = torch.autograd.grad(again_BQC, theta_BP, grad_BQC, create_graph=True)
            return grad_BP, None, None, None
        tensors = iter(flat)
        saved = [list(islice(tensors, count)) for count in ctx.counts]
        return _backward(ctx.chain, theta_BP, inputs, ctx.kernel, saved, grad_BQC), None, None, None


def slices(total: int, most: int, multiple: int = 1) -> list[slice]:
    """Even parts of range(total), none longer than `most`, all but the last a multiple of `multiple` (or of `most`)."""
    even = -(-total // -(-total // most))
    size = min(most, -(-even // multiple) * multiple)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _blocks(
    chain: Chain, theta_BP: Tensor, inputs: Tensor, kernel: Kernel
) -> Iterator[tuple[slice, slice, Parameters, Tensor]]:
    """Of every block: its models, its inputs, its models' parameters and its prepared inputs."""
    models, count = kernel.block_size(chain, len(inputs))
    parts = [(b, chain.weights_and_biases(theta_BP[b])) for b in slices(len(theta_BP), models)]
    for q in slices(len(inputs), count, VECTOR):
        shared = kernel.prepare(chain, inputs[q])
        for b, parameters in parts:
            yield b, q, parameters, shared


def _forward(
    chain: Chain, theta_BP: Tensor, inputs: Tensor, kernel: Kernel, saved: list[list[Tensor]] | None
) -> Tensor:
    """logits[B, Q, C]; what the backward pass needs of each block is appended to `saved`."""
    logits_BCQ = theta_BP.new_empty(len(theta_BP), chain.num_outputs, len(inputs))
    models, count = kernel.block_size(chain, len(inputs))
    at_once = models * count if saved is None else len(theta_BP) * len(inputs)
    work = Workspace(theta_BP, at_once * _saved_bytes(chain, theta_BP.dtype), backward=saved is not None)
    for b, q, parameters, shared in _blocks(chain, theta_BP, inputs, kernel):
        features_bFq, of_convolutions = kernel.forward(chain, parameters, shared, work)
        logits_BCQ[b, :, q], of_linears = linear.forward(chain, parameters, features_bFq)
        if saved is None:
            work.reset()
        else:
            saved.append(of_convolutions + of_linears)
    return logits_BCQ.transpose(1, 2)


def _backward(
    chain: Chain,
    theta_BP: Tensor,
    inputs: Tensor,
    kernel: Kernel,
    saved: list[list[Tensor]],
    grad_BQC: Tensor,
) -> Tensor:
    """The gradient [B, P], from the gradient of the logits."""
    grad_BP = torch.zeros_like(theta_BP)
    work = Workspace(theta_BP)
    for tensors, (b, q, parameters, shared) in zip(saved, _blocks(chain, theta_BP, inputs, kernel), strict=True):
        grads = chain.weights_and_biases(grad_BP[b])
        split = len(tensors) - linear.SAVED * linear.count(chain)
        grad_bFq = linear.backward(chain, parameters, tensors[split:], grad_BQC[b, q].transpose(1, 2), grads)
        kernel.backward(chain, parameters, shared, tensors[:split], grad_bFq, grads, work)
    return grad_BP


def _saved_bytes(chain: Chain, dtype: torch.dtype) -> int:
    """Of the convolutional layers, for one model and one input, with room for alignment."""
    total = 0
    for layer, before, after in convolutions(chain):
        index = index_dtype(prod(before)).itemsize if layer.pool > 1 else 0
        total += layer.out_features * prod(after) * (dtype.itemsize + index) + 2
    return total
