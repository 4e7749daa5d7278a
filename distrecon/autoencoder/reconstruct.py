"""Reconstruction task: how held-out models behave after a pass through the autoencoder.

Legend: B models, P parameters, Q test images, C classes.
"""

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder.novelty import agreement_matrix
from distrecon.images import LabelledImages
from distrecon.nets import Architecture, align, outputs

ALIGNED = 64  # reconstructions that are matched to their originals for the aligned distance
MATRIX = 40  # models in the similarity matrix of the report


def compare(
    arch: Architecture, original_BP: Tensor, reconstructed_BP: Tensor, test: LabelledImages, prefix: str = "reconstruct"
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics `<prefix>/...` of reconstructions against their originals on test images, and arrays for figures.

    - agreement: share of the images on which both predict the same class, mean over models; agreement_on_errors the
      same over the images that the original gets wrong (models without errors left out);
    - accuracy_correlation: Pearson's, over models, of reconstructed with original accuracy;
    - own_nearest: share of reconstructions with which no other original agrees more than their own;
    - weight_l2 as they stand, weight_l2_aligned after matching units (the first 64 models);
    - output_mse: mean squared difference of logits.
    """
    images, labels_Q = test.images, test.labels_Q
    logits_BQC, rebuilt_BQC = outputs(arch, original_BP, images), outputs(arch, reconstructed_BP, images)
    original_BQ, rebuilt_BQ = logits_BQC.argmax(2), rebuilt_BQC.argmax(2)
    accuracy_B, rebuilt_B = ((p == labels_Q).float().mean(1) for p in (original_BQ, rebuilt_BQ))
    error_B = (rebuilt_BQC - logits_BQC).double().square().mean((1, 2))
    same_BQ, wrong_BQ = original_BQ == rebuilt_BQ, original_BQ != labels_Q
    errs_B = wrong_BQ.any(1)
    on_errors_B = (same_BQ & wrong_BQ).sum(1)[errs_B] / wrong_BQ.sum(1)[errs_B]
    matrix_BB = agreement_matrix(rebuilt_BQ, original_BQ, arch.num_outputs)
    own_B = matrix_BB.diagonal() >= matrix_BB.amax(1) - 1e-6
    few = slice(0, ALIGNED)
    matched = [
        align(arch, hat_P[None], theta_P)[0]
        for theta_P, hat_P in zip(original_BP[few], reconstructed_BP[few], strict=True)
    ]
    metrics = {
        "accuracy_mean": float(rebuilt_B.mean()),
        "accuracy_max": float(rebuilt_B.max()),
        "agreement": float(same_BQ.float().mean()),
        "agreement_on_errors": float(on_errors_B.mean()) if errs_B.any() else 1.0,
        "accuracy_correlation": _correlation(accuracy_B, rebuilt_B),
        "own_nearest": float(own_B.float().mean()),
        "weight_l2": float((reconstructed_BP - original_BP).norm(dim=1).mean()),
        "weight_l2_aligned": float((torch.stack(matched) - original_BP[few]).norm(dim=1).mean()),
        "output_mse": float(error_B.mean()),
    }
    arrays = {
        "accuracy": np.stack([accuracy_B.numpy(), rebuilt_B.numpy()]),
        "agreement_matrix": matrix_BB[:MATRIX, :MATRIX].numpy(),
    }
    return {f"{prefix}/{k}": v for k, v in metrics.items()}, {f"{prefix}/{k}": v for k, v in arrays.items()}


def _correlation(a_B: Tensor, b_B: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(a_B) < 2 or a_B.std() < 1e-9 or b_B.std() < 1e-9:
        return 0.0
    return float(torch.corrcoef(torch.stack([a_B, b_B]))[0, 1])
