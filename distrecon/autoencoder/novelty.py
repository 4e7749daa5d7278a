"""How new generated models are: aligned distance to the nearest training model, overlap of errors, diversity.

Zeng et al. ("Generative Modeling of Weights: Generalization or Memorization?", CVPR 2026, arXiv 2506.07998) judge
novelty by the nearest training model in weights, and by the intersection over union of the sets of images that two
models get wrong. A distance in weights means nothing before the order of hidden units is matched.

Legend: B models, M generated, N training models, K candidates, P parameters, Q images.
"""

import torch
from torch import Tensor

from distrecon.nets import Architecture, align


def neighbours(
    arch: Architecture,
    theta_MP: Tensor,
    train_NP: Tensor,
    reference_P: Tensor,
    candidates: int = 8,
    symmetries: str = "order",
) -> tuple[Tensor, Tensor]:
    """Aligned L2 distances [M, K] of each model from the K training models nearest to it, in order, and their rows.

    Matching every pair would cost M * N assignments; the `candidates` training models that are nearest after aligning
    all models to one reference are matched to the model itself. `train_NP` must be aligned to `reference_P` already.
    `symmetries` are those of `align`.
    """
    aligned_MP = align(arch, theta_MP, reference_P, symmetries)
    near_MK = torch.cdist(aligned_MP, train_NP).topk(min(candidates, len(train_NP)), largest=False).indices
    distances, rows = [], []
    for model_P, near_K in zip(aligned_MP, near_MK, strict=True):
        matched_KP = align(arch, train_NP[near_K], model_P, symmetries)
        distance_K, order_K = (matched_KP - model_P).norm(dim=1).sort()
        distances.append(distance_K)
        rows.append(near_K[order_K])
    return torch.stack(distances), torch.stack(rows)


def nearest_aligned(
    arch: Architecture,
    theta_MP: Tensor,
    train_NP: Tensor,
    reference_P: Tensor,
    candidates: int = 8,
    symmetries: str = "order",
) -> Tensor:
    """Aligned L2 distance [M] from each model to the nearest training model (see `neighbours`)."""
    return neighbours(arch, theta_MP, train_NP, reference_P, candidates, symmetries)[0][:, 0]


def aligned_pairwise(arch: Architecture, theta_MP: Tensor) -> Tensor:
    """Aligned L2 distance of every pair of models [M (M - 1) / 2]."""
    distances = []
    for i in range(1, len(theta_MP)):
        matched = align(arch, theta_MP[:i], theta_MP[i])
        distances.append((matched - theta_MP[i]).norm(dim=1))
    return torch.cat(distances)


def error_overlap(wrong_MQ: Tensor, train_wrong_NQ: Tensor) -> Tensor:
    """Largest intersection over union [M] of a model's wrong images with those of any training model.

    Two models without any error overlap fully (1).
    """
    a, b = wrong_MQ.float(), train_wrong_NQ.float()
    both_MN = a @ b.T
    either_MN = a.sum(1)[:, None] + b.sum(1)[None] - both_MN
    return torch.where(either_MN > 0, both_MN / either_MN.clamp_min(1), torch.ones_like(both_MN)).amax(1)


def agreement_matrix(predictions_BQ: Tensor, others_NQ: Tensor, classes: int) -> Tensor:
    """Share of images [B, N] on which two models predict the same class."""
    one_hot = [torch.nn.functional.one_hot(p, classes).flatten(1).float() for p in (predictions_BQ, others_NQ)]
    return one_hot[0] @ one_hot[1].T / predictions_BQ.shape[1]


def mean_pairwise_agreement(predictions_MQ: Tensor, classes: int) -> float:
    """Agreement averaged over the pairs of different models; 1 when all predict the same."""
    matrix_MM = agreement_matrix(predictions_MQ, predictions_MQ, classes)
    count = len(matrix_MM)
    return float((matrix_MM.sum() - matrix_MM.diagonal().sum()) / (count * (count - 1)))
