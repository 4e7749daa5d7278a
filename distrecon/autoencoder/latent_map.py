"""A map of the latent space: where training, held-out and generated models lie on two principal components.

Legend: B models, F flattened latent.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

MODELS = 400  # of a set, at most: a picture shows no more


def latent_map(sets: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    """`map/<set>` [B, 3], each model's two coordinates and its accuracy, and `map/share` [2], the components' shares.

    `sets` are latents [B, ...] with accuracies [B]. The components are those of the first set, whose mean is the
    origin, and a share is of that set's variance; the others are only projected. Sets with more than MODELS models are
    thinned evenly.
    """
    few = {name: (_thinned(z).flatten(1).float(), _thinned(accuracy_B)) for name, (z, accuracy_B) in sets.items()}
    basis_BF = next(iter(few.values()))[0]
    mean_F = basis_BF.mean(0)
    _, singular_K, axes_KF = torch.linalg.svd(basis_BF - mean_F, full_matrices=False)
    axes_2F = pad(axes_KF[:2], (0, 0, 0, max(0, 2 - len(axes_KF))))  # a latent of one number is a line
    share_K = singular_K.square() / singular_K.square().sum().clamp_min(torch.finfo().tiny)
    arrays = {"map/share": pad(share_K[:2], (0, max(0, 2 - len(share_K)))).numpy()}
    for name, (z_BF, accuracy_B) in few.items():
        points_B2 = (z_BF - mean_F) @ axes_2F.T
        arrays[f"map/{name}"] = torch.cat([points_B2, accuracy_B[:, None].float()], 1).numpy()
    return arrays


def _thinned(rows: Tensor) -> Tensor:
    if len(rows) <= MODELS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, MODELS).round().long()]
