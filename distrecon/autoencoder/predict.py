"""Prediction task: a model's test accuracy, generalisation gap and epoch from its embedding, by a ridge probe.

The probe is fitted on training models; its regularisation and its features are chosen on validation models; R2 is
reported on test models. Features are latents, and latents beside simple statistics of the weights (Unterthiner et al.,
2020), which alone are the baseline.

Legend: B models, F features, P parameters.
"""

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
ALPHAS = 10.0 ** np.arange(-2, 6)
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


class Ridge:
    """Ridge probes of several properties on one set of features: one decomposition serves all of them."""

    def __init__(self, train_BF: np.ndarray, validation_BF: np.ndarray, test_BF: np.ndarray) -> None:
        mean_F, std_F = train_BF.mean(0), train_BF.std(0)
        keep = std_F > 1e-8 * max(1e-12, float(std_F.max()))
        parts = [(f[:, keep] - mean_F[keep]) / std_F[keep] for f in (train_BF, validation_BF, test_BF)]
        _, singular_K, basis_KF = np.linalg.svd(parts[0], full_matrices=False)  # models may be fewer than features
        self.variance_K = singular_K**2
        self.train, self.validation, self.test = (part @ basis_KF.T for part in parts)

    def best(self, train_B: np.ndarray, validation_B: np.ndarray) -> tuple[float, np.ndarray]:
        """Best validation R2 over ALPHAS, and that probe's predictions for the test models."""
        correlation_K = self.train.T @ (train_B - train_B.mean())
        probes = [correlation_K / (self.variance_K + alpha) for alpha in ALPHAS]
        scored = [r2(self.validation @ probe + train_B.mean(), validation_B) for probe in probes]
        best = int(np.argmax(scored))
        return scored[best], self.test @ probes[best] + train_B.mean()


def _probe(
    candidates: dict[str, list[np.ndarray]], splits: list[Models], prefix: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """R2 on the test models for each property that varies in every split, by the features best on validation models."""
    metrics, arrays = {}, {}
    probes = {key: Ridge(*features) for key, features in candidates.items()}
    for name, attribute in PROPERTIES.items():
        values = [getattr(split, attribute).double().numpy() for split in splits]
        if any(not np.isfinite(v).all() for v in values):
            raise UserError(f"predict: {name} of a model is not finite")
        if any(v.std() < 1e-12 for v in values):
            continue  # nothing to explain: a zoo with one epoch, say
        scored = [probe.best(values[0], values[1]) for probe in probes.values()]
        predicted_B = max(scored, key=lambda pair: pair[0])[1]
        metrics[f"{prefix}/{name}_r2"] = r2(predicted_B, values[2])
        arrays[f"{prefix}/{name}"] = np.stack([values[2], predicted_B])
    return metrics, arrays


def predict(
    autoencoder: Autoencoder, splits: list[Models], latents: list[Tensor], zoo: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """`predict/<property>_r2` with its baseline, and per property the actual and predicted values [2, B].

    `splits` and `latents` are those of training, validation and test models. The features tried are the latents pooled
    by layer, whole, and the statistics of the weights that they decode to; each alone and beside the statistics of the
    weights themselves, and these alone.
    """
    arch = autoencoder.architectures[zoo]
    statistics = [weight_statistics(arch, m.theta_BP).double().numpy() for m in splits]
    latent = {
        "pooled": [pooled(z, arch).double().numpy() for z in latents],
        "whole": [z.flatten(1).double().numpy() for z in latents],
        "decoded": [weight_statistics(arch, decode_latents(autoencoder, z, zoo)).double().numpy() for z in latents],
    }
    beside = {
        f"{name}+statistics": [np.concatenate(pair, axis=1) for pair in zip(parts, statistics, strict=True)]
        for name, parts in latent.items()
    }
    baseline, _ = _probe({"statistics": statistics}, splits, "predict/baseline_statistics")
    metrics, arrays = _probe({**latent, **beside, "statistics": statistics}, splits, "predict")
    return metrics | baseline, arrays
