"""The losses, each a pure function that returns one value per model, so that the caller may average over any batch.

An autoencoder encodes theta to z and decodes z to theta_hat. "Structure Is Not Enough" (arXiv 2503.17138), for k models
and n queries x_i, with the cycle loss added:

    L   = gamma L_C + (1 - gamma) (beta L_S + (1 - beta) L_B) + lam L_cycle
    L_C = - log( exp(cos(p, p') / t) / sum over all other views q of exp(cos(p, q) / t) )
    L_S = 1/k sum_j ||theta_hat_j - theta_j||^2 / P
    L_B = 1/(2kn) sum_j sum_i ||g(f_theta_hat_j(x_i)) - g(f_theta_j(x_i))||^2
    L_cycle = 1/k sum_j ||z_j - z(theta_hat_j)||^2 / (numbers of z)

- L_C is NT-Xent (Chen et al. 2020): p, p' are projections of a model's two views, q those of the global batch.
- L_S takes weights standardised per layer, or scaled otherwise (`loss.structural`).
- L_B takes g from softmax, identity, centring, or compares outputs otherwise (`BEHAVIORAL`).
- The factors are the settings `loss.*`. A term that `loss.terms` does not name has no weight: gamma is 0 without C,
  beta is 0 without S and 1 without B. Each loss is divided by its value at its first step on a zoo, which is a later
  one for L_B where `loss.behavioral_from` says so.

Legend: B models (of this worker), G models of the global batch, P parameters, T tokens, D token size, Q queries,
C classes, J projection size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets import Architecture


def contrastive(local_2BJ: Tensor, global_2GJ: Tensor, offset: int, temperature: float) -> Tensor:
    """NT-Xent per model [B]: each view must find its model's other view among all views of the global batch.

    `local_2BJ` holds the two views of the models [offset, offset + B) of the global batch. The loss of a model is the
    mean of its two views' losses.
    """
    size, count = global_2GJ.shape[1], local_2BJ.shape[1]
    keys_KJ = F.normalize(global_2GJ, dim=2).flatten(0, 1)  # first all first views, then all second views
    anchors_2BJ = F.normalize(local_2BJ, dim=2)
    similarity_2BK = anchors_2BJ @ keys_KJ.T / temperature
    # row `offset + b` of the first views and of the second
    itself_2B = torch.arange(offset, offset + size + count, device=local_2BJ.device).unfold(0, count, size)
    other_2B = itself_2B.flip(0)
    similarity_2BK = similarity_2BK.scatter(2, itself_2B[:, :, None], float("-inf"))
    return -F.log_softmax(similarity_2BK, dim=2).gather(2, other_2B[:, :, None])[:, :, 0].mean(0)


# -- structural: how far the reconstructed weights are from the original's ---------------------------------------------


def structural(difference_BP: Tensor) -> Tensor:
    """Mean squared difference of the weights of each model [B]; padding does not exist in theta."""
    return difference_BP.square().mean(1)


def structural_per_token(arch: Architecture, difference_BP: Tensor, original_BP: Tensor) -> Tensor:
    """Mean over tokens of their squared error over the variance of the original token (MultiZoo-SANE, 2025), [B].

    Tokens of any length and scale then count the same, so that zoos of different architectures mix. The variance of a
    token is bounded below by a thousandth of the model's mean token variance.
    """
    mask_TD = arch.token_mask_TD.to(original_BP.device)
    count_T = mask_TD.sum(1)
    tokens_BTD = arch.tokenize(original_BP)
    mean_BT = tokens_BTD.sum(2) / count_T
    variance_BT = ((tokens_BTD - mean_BT[:, :, None]) * mask_TD).square().sum(2) / count_T
    variance_BT = torch.maximum(variance_BT, 1e-3 * variance_BT.mean(1, keepdim=True)).clamp_min(1e-12)
    return (arch.tokenize(difference_BP).square().sum(2) / count_T / variance_BT).mean(1)


# -- behavioural: how far the reconstruction's outputs are from the original's -----------------------------------------


def _half_squared(difference_BQC: Tensor) -> Tensor:
    """The paper's L_B of each model: its mean over queries."""
    return 0.5 * difference_BQC.square().sum(2).mean(1)


def _centred(logits_BQC: Tensor) -> Tensor:
    """Logits up to the constant that softmax ignores."""
    return logits_BQC - logits_BQC.mean(2, keepdim=True)


def _mse_logits(outputs_BQC: Tensor, targets_BQC: Tensor, temperature: float) -> Tensor:
    return _half_squared(outputs_BQC - targets_BQC)


def _mse_centred(outputs_BQC: Tensor, targets_BQC: Tensor, temperature: float) -> Tensor:
    return _half_squared(_centred(outputs_BQC) - _centred(targets_BQC))


def _mse_softmax(outputs_BQC: Tensor, targets_BQC: Tensor, temperature: float) -> Tensor:
    return _half_squared(outputs_BQC.softmax(2) - targets_BQC.softmax(2))


def _cross_entropy(outputs_BQC: Tensor, targets_BQC: Tensor, temperature: float) -> Tensor:
    """Against the original's probabilities."""
    return -(targets_BQC.softmax(2) * F.log_softmax(outputs_BQC, dim=2)).sum(2).mean(1)


def _distillation(outputs_BQC: Tensor, targets_BQC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(original || reconstruction) at temperature T (Hinton et al. 2015)."""
    log_target_BQC = F.log_softmax(targets_BQC / temperature, dim=2)
    log_output_BQC = F.log_softmax(outputs_BQC / temperature, dim=2)
    return temperature**2 * (log_target_BQC.exp() * (log_target_BQC - log_output_BQC)).sum(2).mean(1)


BEHAVIORAL: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "mse_logits": _mse_logits,
    "mse_centred": _mse_centred,
    "mse_softmax": _mse_softmax,
    "cross_entropy": _cross_entropy,
    "distillation": _distillation,
}


def behavioral(kind: str, outputs_BQC: Tensor, targets_BQC: Tensor, temperature: float = 2.0) -> Tensor:
    """The behavioural loss `kind` of `BEHAVIORAL` of each model [B], from logits of both."""
    return BEHAVIORAL[kind](outputs_BQC, targets_BQC, temperature)


def cycle(z: Tensor, z_again: Tensor) -> Tensor:
    """Mean squared difference per model [B] between a latent and the latent of its reconstruction."""
    return (z - z_again).flatten(1).square().mean(1)
