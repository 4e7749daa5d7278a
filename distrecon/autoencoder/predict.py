"""Prediction task: a model's test accuracy, generalisation gap and epoch from its embedding, by a ridge probe.

The probe is fitted on training models; its regularisation, its features and what of the property is linear in them
(`probes.LINKS`) are chosen on validation models; R2 is reported on test models. Features are latents, and latents
beside simple statistics of the weights (Unterthiner et al., 2020), which alone are the baseline. What was fitted is
kept (`probes.py`) and predicts other models' properties.

Legend: B models, F features, P parameters.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder.model import CHUNK, Autoencoder, decode_latents, pooled
from distrecon.autoencoder.probes import LINKS, Probe, Probes, PropertyProbe
from distrecon.errors import UserError
from distrecon.nets import Architecture
from distrecon.zoos.models import Models

PROPERTIES = {
    "test_accuracy": "test_accuracy_B",
    "generalization_gap": "generalization_gap_B",
    "epoch": "epoch_B",
}
SHARES = ("test_accuracy",)  # properties between 0 and 1
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

    def __init__(self, train_BF: np.ndarray, validation_BF: np.ndarray) -> None:
        mean_F, std_F = train_BF.mean(0), train_BF.std(0)
        self.keep_F = std_F > 1e-8 * max(1e-12, float(std_F.max()))
        self.mean_F, self.scale_F = mean_F, np.where(self.keep_F, std_F, 1.0)
        parts = [((f - mean_F) / self.scale_F)[:, self.keep_F] for f in (train_BF, validation_BF)]
        _, singular_K, self.basis_KF = np.linalg.svd(parts[0], full_matrices=False)  # models may be fewer than features
        self.variance_K = singular_K**2
        self.train, self.validation = (part @ self.basis_KF.T for part in parts)

    def best(self, train_B: np.ndarray, validation_B: np.ndarray, link: str = "identity") -> tuple[float, Probe]:
        """Best validation R2 over ALPHAS, and that probe."""
        forward, back = LINKS[link].forward, LINKS[link].back
        linear_B = forward(train_B)
        mean = float(linear_B.mean())
        correlation_K = self.train.T @ (linear_B - mean)
        weights = [correlation_K / (self.variance_K + alpha) for alpha in ALPHAS]
        scored = [r2(back(self.validation @ weight_K + mean), validation_B) for weight_K in weights]
        best = int(np.argmax(scored))
        weight_F = np.zeros_like(self.mean_F)
        weight_F[self.keep_F] = weights[best] @ self.basis_KF
        return scored[best], Probe(self.mean_F, self.scale_F, weight_F, mean, link)


def _probe(
    candidates: dict[str, list[np.ndarray]], splits: list[Models], prefix: str
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, PropertyProbe]]:
    """R2 on the test models for each property that is known and varies in every split, by the features and the link
    that are best on validation models; the values, actual and predicted; and the probes."""
    metrics, arrays, chosen = {}, {}, {}
    ridges = {key: Ridge(*parts[:2]) for key, parts in candidates.items()}
    for name, attribute in PROPERTIES.items():
        values = [getattr(split, attribute).double().numpy() for split in splits]
        known = np.isfinite(np.concatenate(values))
        if not known.any():
            continue  # the zoo does not have it
        if not known.all():
            raise UserError(
                f"predict: the zoo has {name} of some models only, or one that is not finite: "
                "all of them must have it, or none"
            )
        if any(v.std() < 1e-12 for v in values):
            continue  # nothing to explain: a zoo with one epoch, say
        links = LINKS if name in SHARES else ("identity",)
        scored = {
            (key, link): ridge.best(values[0], values[1], link) for key, ridge in ridges.items() for link in links
        }
        best, link = max(scored, key=lambda key: scored[key][0])
        probe = scored[best, link][1]
        predicted_B = probe(candidates[best][2])
        metrics[f"{prefix}/{name}_r2"] = r2(predicted_B, values[2])
        arrays[f"{prefix}/{name}"] = np.stack([values[2], predicted_B])
        error = float(np.sqrt(np.mean((predicted_B - values[2]) ** 2)))
        chosen[name] = PropertyProbe(probe, best, metrics[f"{prefix}/{name}_r2"], error)
    return metrics, arrays, chosen


# -- features ----------------------------------------------------------------------------------------------------------

LATENT = ("pooled", "whole", "decoded")
STATISTICS = "statistics"
FEATURES = (*LATENT, *(f"{name}+{STATISTICS}" for name in LATENT), STATISTICS)


def features(
    names: Iterable[str], autoencoder: Autoencoder, theta_BP: Tensor, z: Tensor, zoo: int = 0
) -> dict[str, np.ndarray]:
    """Features [B, F] of models with their latents, by name, one of FEATURES or several joined by +.

    The latents pooled by layer, whole, and the statistics of the weights that they decode to; the statistics of the
    weights themselves. Each is computed once.
    """
    arch = autoencoder.architectures[zoo]
    make: dict[str, Callable[[], Tensor]] = {
        "pooled": lambda: pooled(z, arch),
        "whole": lambda: z.flatten(1),
        "decoded": lambda: weight_statistics(arch, decode_latents(autoencoder, z, zoo)),
        STATISTICS: lambda: weight_statistics(arch, _invariant(autoencoder, theta_BP, zoo)),
    }
    names = [*names]
    needed = dict.fromkeys(part for name in names for part in name.split("+"))
    made = {part: make[part]().double().numpy() for part in needed}
    return {name: np.concatenate([made[part] for part in name.split("+")], axis=1) for name in names}


def _invariant(autoencoder: Autoencoder, theta_BP: Tensor, zoo: int) -> Tensor:
    """Weights whose statistics are the function's: their order changes none, their signs and scales would."""
    return theta_BP if autoencoder.config.data.symmetries == "order" else autoencoder.canonical(theta_BP, zoo)


# -- the task ----------------------------------------------------------------------------------------------------------


def predict(
    autoencoder: Autoencoder, splits: list[Models], latents: list[Tensor], zoo: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray], Probes]:
    """`predict/<property>_r2` with its baseline, per property the actual and predicted values [2, B], and the probes.

    `splits` and `latents` are those of training, validation and test models. The features tried are FEATURES: those of
    latents, each alone and beside the statistics of the weights, and these alone.
    """
    parts = zip(splits, latents, strict=True)
    made = [features(FEATURES, autoencoder, models.theta_BP, z, zoo) for models, z in parts]
    candidates = {name: [part[name] for part in made] for name in FEATURES}
    baseline, _, _ = _probe({STATISTICS: candidates[STATISTICS]}, splits, "predict/baseline_statistics")
    metrics, arrays, chosen = _probe(candidates, splits, "predict")
    return metrics | baseline, arrays, Probes(zoo, chosen)


def predicted(
    autoencoder: Autoencoder, probes: Probes, theta_BP: Tensor, z: Tensor | None = None
) -> dict[str, np.ndarray]:
    """Each property that there is a probe for, predicted for models theta[B, P]: [B] in float64.

    `z` are their latents, where they are known already.
    """
    if z is None:
        with torch.no_grad():
            z = torch.cat([autoencoder.encode(chunk, zoo=probes.zoo).cpu() for chunk in theta_BP.split(CHUNK)])
    made = features({p.features for p in probes.of.values()}, autoencoder, theta_BP, z, probes.zoo)
    return {name: p.probe(made[p.features]) for name, p in probes.of.items()}
