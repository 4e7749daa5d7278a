"""Reconstruction task: how held-out models behave after a pass through the autoencoder.

Legend: B models, P parameters, Q test images, C classes.
"""

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder.novelty import agreement_matrix
from distrecon.images import LabelledImages
from distrecon.nets import Architecture, align, evaluate, outputs

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
    original = evaluate(arch, original_BP, images, labels_Q)
    rebuilt = evaluate(arch, reconstructed_BP, images, labels_Q)
    same_BQ = original.predictions_BQ == rebuilt.predictions_BQ
    wrong_BQ = original.predictions_BQ != labels_Q
    errs_B = wrong_BQ.any(1)
    on_errors_B = (same_BQ & wrong_BQ).sum(1)[errs_B] / wrong_BQ.sum(1)[errs_B]
    matrix_BB = agreement_matrix(rebuilt.predictions_BQ, original.predictions_BQ, arch.num_outputs)
    own_B = matrix_BB.diagonal() >= matrix_BB.amax(1) - 1e-6
    few = slice(0, ALIGNED)
    matched = [
        align(arch, hat_P[None], theta_P)[0]
        for theta_P, hat_P in zip(original_BP[few], reconstructed_BP[few], strict=True)
    ]
    metrics = {
        "accuracy_mean": float(rebuilt.accuracy_B.mean()),
        "accuracy_max": float(rebuilt.accuracy_B.max()),
        "agreement": float(same_BQ.float().mean()),
        "agreement_on_errors": float(on_errors_B.mean()) if errs_B.any() else 1.0,
        "accuracy_correlation": _correlation(original.accuracy_B, rebuilt.accuracy_B),
        "own_nearest": float(own_B.float().mean()),
        "weight_l2": float((reconstructed_BP - original_BP).norm(dim=1).mean()),
        "weight_l2_aligned": float((torch.stack(matched) - original_BP[few]).norm(dim=1).mean()),
        "output_mse": _output_error(arch, original_BP, reconstructed_BP, images),
    }
    arrays = {
        "accuracy": np.stack([original.accuracy_B.numpy(), rebuilt.accuracy_B.numpy()]),
        "agreement_matrix": matrix_BB[:MATRIX, :MATRIX].numpy(),
    }
    return {f"{prefix}/{k}": v for k, v in metrics.items()}, {f"{prefix}/{k}": v for k, v in arrays.items()}


def _correlation(a_B: Tensor, b_B: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    if len(a_B) < 2 or a_B.std() < 1e-9 or b_B.std() < 1e-9:
        return 0.0
    return float(torch.corrcoef(torch.stack([a_B, b_B]))[0, 1])


def _output_error(arch: Architecture, a_BP: Tensor, b_BP: Tensor, images: Tensor, chunk: int = 64) -> float:
    squares = [
        (outputs(arch, a, images) - outputs(arch, b, images)).double().square().mean((1, 2))
        for a, b in zip(a_BP.split(chunk), b_BP.split(chunk), strict=True)
    ]
    return float(torch.cat(squares).mean())
