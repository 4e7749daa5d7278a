"""Gradient analysis: what the behavioural loss asks of the weights, to first order in the reconstruction error.

The poster of "Structure Is Not Enough" (arXiv 2503.17138), with delta_j = theta_hat_j - theta_j:

    dL_S/dw = 1/k sum_j delta_j^T d theta_hat_j/dw
    dL_B/dw ~ 1/k sum_j delta_j^T F_j d theta_hat_j/dw,   F_j = 1/n sum_i J_theta_j(x_i)^T J_theta_hat_j(x_i),

for the losses of `losses.py` with g the identity. The approximation is
f_theta_hat - f_theta ~ J_theta delta; it is exact as delta goes to 0, and for a network linear in its weights.
Gradients here are with respect to theta_hat_j and without the common 1/k; d theta_hat_j/dw only transports them.

Legend: B models, P parameters, Q queries, C classes, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.autoencoder.losses import behavioral
from distrecon.nets import Architecture


def predicted_gradient(arch: Architecture, theta_BP: Tensor, theta_hat_BP: Tensor, inputs: Tensor) -> Tensor:
    """delta_j^T F_j [B, P], by one product with J_theta and one with J_theta_hat's transpose, F_j never formed."""
    delta_BP = theta_hat_BP - theta_BP
    change_BQC = torch.func.jvp(lambda t: arch.forward(t, inputs), (theta_BP,), (delta_BP,))[1]
    theta_hat_BP = theta_hat_BP.detach().requires_grad_(True)
    logits_BQC = arch.forward(theta_hat_BP, inputs)
    (gradient_BP,) = torch.autograd.grad(logits_BQC, theta_hat_BP, change_BQC / len(inputs))
    return gradient_BP


def behavioral_gradient(arch: Architecture, theta_BP: Tensor, theta_hat_BP: Tensor, inputs: Tensor) -> Tensor:
    """Autograd's gradient of k L_B with respect to theta_hat, [B, P]."""
    theta_hat_BP = theta_hat_BP.detach().requires_grad_(True)
    with torch.no_grad():
        targets_BQC = arch.forward(theta_BP, inputs)
    loss = behavioral("mse_logits", arch.forward(theta_hat_BP, inputs), targets_BQC).sum()
    return torch.autograd.grad(loss, theta_hat_BP)[0]


@dataclass(frozen=True)
class GradientAnalysis:
    """Per model [B] or per layer and model [L, B]; cosines between gradients with respect to theta_hat."""

    cosine_B: Tensor  # of the predicted with autograd's behavioural gradient
    cosine_LB: Tensor  # the same within each layer
    structural_cosine_LB: Tensor  # of the structural (delta) with the behavioural gradient
    structural_norm_LB: Tensor
    behavioral_norm_LB: Tensor


def analyse(arch: Architecture, theta_BP: Tensor, theta_hat_BP: Tensor, inputs: Tensor) -> GradientAnalysis:
    """Predicted, autograd and structural gradients of reconstructions theta_hat of models theta, compared."""
    predicted_BP = predicted_gradient(arch, theta_BP, theta_hat_BP, inputs)
    exact_BP = behavioral_gradient(arch, theta_BP, theta_hat_BP, inputs)
    delta_BP = theta_hat_BP - theta_BP
    layer_P = arch.layer_of_parameter_P.to(theta_BP.device)
    masks = [layer_P == i for i in range(len(arch.layer_names))]
    return GradientAnalysis(
        F.cosine_similarity(predicted_BP, exact_BP, dim=1),
        torch.stack([F.cosine_similarity(predicted_BP[:, m], exact_BP[:, m], dim=1) for m in masks]),
        torch.stack([F.cosine_similarity(delta_BP[:, m], exact_BP[:, m], dim=1) for m in masks]),
        torch.stack([delta_BP[:, m].norm(dim=1) for m in masks]),
        torch.stack([exact_BP[:, m].norm(dim=1) for m in masks]),
    )


def cosine_curve(
    arch: Architecture, theta_BP: Tensor, theta_hat_BP: Tensor, inputs: Tensor, scales: Sequence[float]
) -> Tensor:
    """Mean cosine of predicted and autograd gradients [len(scales)] by the scale of delta; 1 is the reconstruction."""
    delta_BP = theta_hat_BP - theta_BP
    return torch.stack([analyse(arch, theta_BP, theta_BP + s * delta_BP, inputs).cosine_B.mean() for s in scales])
