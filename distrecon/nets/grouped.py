"""The batched forward pass for GPUs: each layer of B convolutional models is one grouped convolution.

- Activations are laid out [Q, B * channels, height, width], a group of channels a model; nothing is unfolded into
  columns. The first layer, whose inputs all models share, is one dense convolution to B * channels.
- Linear layers are batched matrix products that read the same memory without a copy.
- Ordinary torch operations: every transform of autograd works, on the CPU too, where `convolution/` is faster.

Legend: B models, Q inputs, C classes, O output channels, F fan-in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets.activations import activation
from distrecon.nets.layers import Chain


def forward(chain: Chain, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C] of B models on shared inputs [Q, *input_shape] of theta's type; the first layer convolves."""
    act, models = activation(chain.activation), len(theta_BP)
    hidden, features_BQF = inputs, None
    for i, (layer, (weight, bias_BO)) in enumerate(zip(chain.layers, chain.weights_and_biases(theta_BP), strict=True)):
        if layer.kernel:
            groups = models if i else 1
            hidden = F.conv2d(hidden, weight.flatten(0, 1), bias_BO.flatten(), padding=layer.padding, groups=groups)
            hidden = act(F.max_pool2d(hidden, layer.pool) if layer.pool > 1 else hidden)
            continue
        if features_BQF is None:
            features_BQF = hidden.reshape(len(inputs), models, -1).transpose(0, 1)
        features_BQF = torch.baddbmm(bias_BO[:, None], features_BQF, weight.transpose(1, 2))
        if i + 1 < len(chain.layers):
            features_BQF = act(features_BQF)
    assert features_BQF is not None
    return features_BQF
