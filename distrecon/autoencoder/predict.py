"""Prediction task: a model's test accuracy, generalisation gap and epoch from its embedding, by a ridge probe.

The probe is fitted on training and validation models. Its regularisation and its features are chosen by leaving out
one of these models at a time; R2 is reported on test models. Features are simple statistics of the weights
(Unterthiner et al., 2020), which alone are the baseline, and beside them latents and statistics of the weights that
these decode to. Each kind of features counts as much as another, however many numbers it has: a few thousand latents
would drown a hundred statistics otherwise.

Of a coder that has learned from the training models, only validation models show what its latents are worth, so they
alone choose the features then.

Legend: B models, N models that the probe is fitted on, F features, K directions, Y properties, R regularisations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder.model import Autoencoder, decode_latents, pooled
from distrecon.errors import UserError
from distrecon.nets import Architecture
from distrecon.zoos.models import Models

PROPERTIES = {
    "test_accuracy": "test_accuracy_B",
    "generalization_gap": "generalization_gap_B",
    "epoch": "epoch_B",
}
ALPHAS = 10.0 ** np.arange(-7, 1)  # times the number of models, with features of unit length
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def weight_statistics(arch: Architecture, theta_BP: Tensor) -> Tensor:
    """[B, tensors * 9]: mean, deviation and quantiles of each layer's weights, of its biases, and so on."""
    quantiles = torch.tensor(QUANTILES, dtype=theta_BP.dtype)
    parts = []
    for values in arch.table.tensors(theta_BP):
        flat = values.flatten(1)
        spread = torch.stack([flat.mean(1), flat.std(1, correction=0)], dim=1)
        parts.append(torch.cat([spread, torch.quantile(flat, quantiles, dim=1).T], dim=1))
    return torch.cat(parts, dim=1)


def r2(predicted_B: np.ndarray, actual_B: np.ndarray) -> float:
    """1 - squared error / variance; NaN-free only where the property varies, which the caller checks."""
    return 1.0 - float(((predicted_B - actual_B) ** 2).sum() / ((actual_B - actual_B.mean()) ** 2).sum())


def balanced(kinds: Sequence[np.ndarray], fitted_on: int) -> np.ndarray:
    """Features [B, F] of several kinds, centred and scaled on the first models, each kind of the same
    mean square length, 1 together."""
    parts = []
    for features_BF in kinds:
        mean_F, std_F = features_BF[:fitted_on].mean(0), features_BF[:fitted_on].std(0)
        keep = std_F > 1e-8 * max(1e-12, float(std_F.max()))
        if keep.any():
            parts.append((features_BF[:, keep] - mean_F[keep]) / (std_F[keep] * np.sqrt(keep.sum())))
    return np.concatenate(parts, axis=1) / np.sqrt(len(parts)) if parts else np.zeros((len(kinds[0]), 1))


class Ridge:
    """Ridge probes of several properties on one set of features: one decomposition serves all of them.

    `features_BF` of the models that they are fitted on, centred, then of those to predict.
    """

    def __init__(self, features_BF: np.ndarray, fitted_on: int) -> None:
        known_NF = features_BF[:fitted_on]
        if known_NF.shape[1] < fitted_on:
            variance_K, basis_FK = np.linalg.eigh(known_NF.T @ known_NF)
        else:  # models may be fewer than features
            variance_K, basis_NK = np.linalg.eigh(known_NF @ known_NF.T)
            basis_FK = known_NF.T @ basis_NK
        kept = variance_K > 1e-12 * max(1e-12, float(variance_K.max()))
        basis_FK = basis_FK[:, kept] / np.linalg.norm(basis_FK[:, kept], axis=0)
        self.variance_K, self.count = variance_K[kept], fitted_on
        coordinates_BK = features_BF @ basis_FK
        self.left_NK, self.others_BK = coordinates_BK[:fitted_on] / self.variance_K**0.5, coordinates_BK[fitted_on:]

    def predictions(self, values_NY: np.ndarray, alpha: float) -> np.ndarray:
        """[B, Y] of the models to predict."""
        mean_Y = values_NY.mean(0)
        weight_KY = self.left_NK.T @ (values_NY - mean_Y)
        shrunk_K = self.variance_K**0.5 / (self.variance_K + alpha * self.count)
        return self.others_BK @ (shrunk_K[:, None] * weight_KY) + mean_Y

    def left_out(self, values_NY: np.ndarray, groups: Sequence[np.ndarray], alpha: float) -> np.ndarray:
        """Errors [N, Y] of each group of rows by the probe that was fitted without it.

        With H the matrix of the probe's predictions of what it was fitted on, they are (I - H_gg)^-1 of its errors.
        """
        shrink_K = self.variance_K / (self.variance_K + alpha * self.count)
        centred_NY = values_NY - values_NY.mean(0)
        error_NY = centred_NY - self.left_NK @ (shrink_K[:, None] * (self.left_NK.T @ centred_NY))
        found_NY = np.empty_like(error_NY)
        for rows in groups:
            own = (self.left_NK[rows] * shrink_K) @ self.left_NK[rows].T + 1 / self.count
            found_NY[rows] = np.linalg.solve(np.eye(len(rows)) - own, error_NY[rows])
        return found_NY


@dataclass(frozen=True)
class Probed:
    """What one set of features says of each property, with the regularisation that suits it best."""

    error_NY: np.ndarray  # of models left out
    predicted_BY: np.ndarray  # of test models


def probe(features_BF: np.ndarray, values_NY: np.ndarray, model_id: Sequence[str]) -> Probed:
    """Probes fitted on the first models, whose rows with one id are left out together."""
    ridge, ids = Ridge(features_BF, len(values_NY)), np.asarray(model_id)
    order = np.argsort(ids, kind="stable")
    groups = np.split(order, np.flatnonzero(ids[order][1:] != ids[order][:-1]) + 1)
    error_RNY = np.stack([ridge.left_out(values_NY, groups, alpha) for alpha in ALPHAS])
    best_Y, columns = (error_RNY**2).sum(1).argmin(0), range(values_NY.shape[1])
    predicted = [ridge.predictions(values_NY[:, y : y + 1], ALPHAS[best_Y[y]])[:, 0] for y in columns]
    return Probed(np.stack([error_RNY[best_Y[y], :, y] for y in columns], 1), np.stack(predicted, 1))


def best_probes(
    candidates: Mapping[str, Sequence[np.ndarray]], splits: Sequence[Models], counted: slice, baseline: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """R2 on the test models for each property that varies in every split, and its actual and predicted values.

    Each candidate is a list of kinds of features, of training, validation and test models in this order. The candidate
    with the smallest errors of left-out models on the `counted` rows is taken; `baseline` names one of them.
    """
    metrics: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}
    names = [name for name, attribute in PROPERTIES.items() if _varies(name, attribute, splits)]
    if not names:  # nothing to explain
        return metrics, arrays
    columns = [np.concatenate([_property(split, PROPERTIES[name]) for split in splits]) for name in names]
    values_BY, known = np.stack(columns, 1), len(splits[0]) + len(splits[1])
    ids = [*splits[0].model_id, *splits[1].model_id]
    probed = {name: probe(balanced(kinds, known), values_BY[:known], ids) for name, kinds in candidates.items()}
    for y, name in enumerate(names):
        best = min(probed.values(), key=lambda found: float((found.error_NY[counted, y] ** 2).sum()))
        for prefix, found in (("predict", best), (f"predict/baseline_{baseline}", probed[baseline])):
            metrics[f"{prefix}/{name}_r2"] = r2(found.predicted_BY[:, y], values_BY[known:, y])
        arrays[f"predict/{name}"] = np.stack([values_BY[known:, y], best.predicted_BY[:, y]])
    return metrics, arrays


def _property(models: Models, attribute: str) -> np.ndarray:
    return getattr(models, attribute).double().numpy()


def _varies(name: str, attribute: str, splits: Sequence[Models]) -> bool:
    """False for the epoch of a zoo with one, say. Raises UserError where a value is not finite."""
    values = [_property(split, attribute) for split in splits]
    if any(not np.isfinite(v).all() for v in values):
        raise UserError(f"predict: {name} of a model is not finite")
    return all(v.std() >= 1e-12 for v in values)


def predict(
    autoencoder: Autoencoder, splits: list[Models], latents: list[Tensor], zoo: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """`predict/<property>_r2` with its baseline, and per property the actual and predicted values [2, B].

    `splits` and `latents` are those of training, validation and test models. Statistics of the weights are tried alone,
    beside latents (pooled by layer where there is one a token), beside statistics of the weights that these decode to,
    and beside both.
    """
    arch = autoencoder.architectures[zoo]
    statistics = np.concatenate([weight_statistics(arch, m.theta_BP).double().numpy() for m in splits])
    latent = np.concatenate([pooled(z, arch).double().numpy() for z in latents])
    again = [weight_statistics(arch, decode_latents(autoencoder, z, zoo)).double().numpy() for z in latents]
    decoded = np.concatenate(again)
    candidates = {
        "statistics": [statistics],
        "latents": [statistics, latent],
        "decoded": [statistics, decoded],
        "both": [statistics, latent, decoded],
    }
    counted = slice(len(splits[0]), None) if autoencoder.coder.learns else slice(None)
    return best_probes(candidates, splits, counted, "statistics")
