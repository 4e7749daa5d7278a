"""The linear layers behind the convolutions of one block, forward and backward.

Legend: b models, q inputs, F features after the convolutions, I inputs and O outputs of a layer, C classes.
"""

import torch
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.convolution.kernel import Parameters, activation_backward
from distrecon.nets.layers import Chain

SAVED = 2  # tensors a layer that `forward` saves


def count(chain: Chain) -> int:
    return sum(not layer.kernel for layer in chain.layers)


def forward(chain: Chain, parameters: Parameters, hidden_bIq: Tensor) -> tuple[Tensor, list[Tensor]]:
    """logits[b, C, q] from features[b, F, q], and of each layer its input, after and before the activation."""
    act, saved, before = activation(chain.activation), [], hidden_bIq
    for i, layer in enumerate(chain.layers):
        if layer.kernel:
            continue
        weight_bOI, bias_bO = parameters[i]
        saved += [hidden_bIq, before]
        before = torch.baddbmm(bias_bO[:, :, None], weight_bOI, hidden_bIq)
        hidden_bIq = act(before)
    return before, saved


def backward(chain: Chain, parameters: Parameters, saved: list[Tensor], grad: Tensor, grads: Parameters) -> Tensor:
    """Adds the linear layers' gradients to `grads`; returns the gradient of the features [b, F, q]."""
    first = len(chain.layers) - count(chain)
    for i in range(len(chain.layers) - 1, first - 1, -1):
        hidden_bIq, before = saved[SAVED * (i - first)], saved[SAVED * (i - first) + 1]
        grads[i][0].add_(torch.bmm(grad, hidden_bIq.transpose(1, 2)))
        grads[i][1].add_(grad.sum(2))
        grad = torch.bmm(parameters[i][0].transpose(1, 2), grad)
        if i > first:
            grad = activation_backward(chain, grad, before)
    return grad
