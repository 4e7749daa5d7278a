"""Prediction task: a model's test accuracy, generalisation gap and epoch from its embedding, by a ridge probe.

The embedding is simple statistics of the weights (Unterthiner et al., 2020), which alone are the baseline, and where
they help, latents beside them. The probe is fitted on training models; its regularisation, its latents and what of the
property is linear in them (`probes.LINKS`) are those with the smallest squared errors on models that it was not fitted
on: training models left out, one after the other with all of its states, and validation models. R2 is reported on test
models.

Latents are many, the best of several is tried, and an autoencoder may know its training models by heart. So a weight of
a latent is penalised ten times as much as that of a statistic, and latents are taken only if they make these errors
smaller than the statistics alone by more than three standard errors, and those of validation models, which no
autoencoder was trained on, not larger by more than one. What was fitted is kept (`probes.py`) and predicts other
models' properties.

Legend: B states of models, M models, G states of one model, F features, K directions, P parameters.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
LATENTS_PENALTY = 10.0  # of a latent's weight, over that of a statistic's
BETTER, WORSE = 3.0, 1.0  # standard errors of the difference
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


def rows_of_models(model_id: Sequence[str]) -> list[np.ndarray]:
    """The rows [M, G] of each model's states, an array for each number of states that models have."""
    _, model_B, states_M = np.unique(np.asarray(model_id), return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(model_B, kind="stable"), np.cumsum(states_M)[:-1])
    return [np.stack([own_G for own_G in rows if len(own_G) == states]) for states in np.unique(states_M)]


@dataclass(frozen=True)
class Fitted:
    """A probe, and the squared errors of models that it was not fitted on."""

    probe: Probe
    left_out_B: np.ndarray  # training models, each by the probe of the others
    validation_B: np.ndarray

    @property
    def error(self) -> float:
        return float(self.left_out_B.sum() + self.validation_B.sum())


class Ridge:
    """Ridge probes of several properties on one set of features: one decomposition serves all of them.

    `train_id` names each training state's model; standardisation is that of all training states. The first `latents`
    features are latents.
    """

    def __init__(
        self, train_BF: np.ndarray, validation_BF: np.ndarray, train_id: Sequence[str], latents: int = 0
    ) -> None:
        mean_F, std_F = train_BF.mean(0), train_BF.std(0)
        self.keep_F = std_F > 1e-8 * max(1e-12, float(std_F.max()))
        self.mean_F, self.scale_F = mean_F, np.where(self.keep_F, std_F, 1.0)
        self.scale_F[:latents] *= np.sqrt(LATENTS_PENALTY)
        train, validation = (((f - mean_F) / self.scale_F)[:, self.keep_F] for f in (train_BF, validation_BF))
        # models may be fewer than features
        self.left_BK, self.singular_K, self.basis_KF = np.linalg.svd(train, full_matrices=False)
        self.validation_BK = validation @ self.basis_KF.T
        several = len(set(train_id)) > 1  # the states of an only model are left out one by one
        self.rows = rows_of_models(train_id) if several else [np.arange(len(train_BF))[:, None]]
        self.unseen = [[self._unseen(rows_MG, alpha) for rows_MG in self.rows] for alpha in ALPHAS]

    def _unseen(self, rows_MG: np.ndarray, alpha: float) -> np.ndarray:
        """(I - H_GG)^-1 [M, G, G], which makes of a model's residuals those of the probe fitted without it; H is the
        matrix that makes predictions of the values fitted on."""
        own_MGK = self.left_BK[rows_MG]
        hat_MGG = (own_MGK * (self.singular_K**2 / (self.singular_K**2 + alpha))) @ own_MGK.transpose(0, 2, 1)
        return np.linalg.inv(np.eye(rows_MG.shape[1]) - hat_MGG - 1 / len(self.left_BK))

    def best(self, train_B: np.ndarray, validation_B: np.ndarray, link: str = "identity") -> Fitted:
        """The probe with the smallest error over ALPHAS."""
        forward, back = LINKS[link].forward, LINKS[link].back
        linear_B = forward(train_B)
        mean = float(linear_B.mean())
        correlation_K = self.singular_K * (self.left_BK.T @ (linear_B - mean))
        fitted = []
        for alpha, unseen in zip(ALPHAS, self.unseen, strict=True):
            weight_K = correlation_K / (self.singular_K**2 + alpha)
            residual_B = linear_B - mean - self.left_BK @ (self.singular_K * weight_K)
            for rows_MG, unseen_MGG in zip(self.rows, unseen, strict=True):
                residual_B[rows_MG] = (unseen_MGG @ residual_B[rows_MG][..., None])[..., 0]
            weight_F = np.zeros_like(self.mean_F)
            weight_F[self.keep_F] = weight_K @ self.basis_KF
            left_out_B = (back(linear_B - residual_B) - train_B) ** 2
            errors_B = (back(self.validation_BK @ weight_K + mean) - validation_B) ** 2
            fitted.append(Fitted(Probe(self.mean_F, self.scale_F, weight_F, mean, link), left_out_B, errors_B))
        return min(fitted, key=lambda found: found.error)


def gains(errors_B: np.ndarray, than_B: np.ndarray, model_id: Sequence[str]) -> np.ndarray:
    """By how much each model's errors [M] are smaller than others. States of one model are no independent evidence."""
    return np.concatenate([(than_B - errors_B)[rows_MG].sum(1) for rows_MG in rows_of_models(model_id)])


def above(gain_M: np.ndarray, errors: float) -> bool:
    """Whether the mean gain is above 0 by more than so many standard errors; one model proves nothing."""
    return len(gain_M) > 1 and bool(gain_M.mean() > errors * gain_M.std(ddof=1) / np.sqrt(len(gain_M)))


def _help(latents: Fitted, alone: Fitted, splits: Sequence[Models]) -> bool:
    """Whether latents beside the statistics are clearly better than these alone."""
    left_out_M = gains(latents.left_out_B, alone.left_out_B, splits[0].model_id)
    validation_M = gains(latents.validation_B, alone.validation_B, splits[1].model_id)
    return above(np.concatenate([left_out_M, validation_M]), BETTER) and not above(-validation_M, WORSE)


def _probe(
    statistics: list[np.ndarray], latents: Mapping[str, list[np.ndarray]], splits: list[Models], prefix: str
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, PropertyProbe]]:
    """Of each property that is known and varies in every split, R2 on the test models by the statistics, or by those
    latents beside them that are best where latents help; the values, actual and predicted; and the probes."""
    metrics, arrays, chosen = {}, {}, {}
    candidates = {STATISTICS: statistics}
    for name, parts in latents.items():
        candidates[f"{name}+{STATISTICS}"] = [
            np.concatenate(pair, axis=1) for pair in zip(parts, statistics, strict=True)
        ]
    ridges = {
        name: Ridge(parts[0], parts[1], splits[0].model_id, latents=parts[0].shape[1] - statistics[0].shape[1])
        for name, parts in candidates.items()
    }
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
        fitted = {
            key: min((ridge.best(values[0], values[1], link) for link in links), key=lambda found: found.error)
            for key, ridge in ridges.items()
        }
        best = min(fitted, key=lambda key: fitted[key].error)
        if not _help(fitted[best], fitted[STATISTICS], splits):
            best = STATISTICS
        probe = fitted[best].probe
        predicted_B = probe(candidates[best][2])
        metrics[f"{prefix}/{name}_r2"] = r2(predicted_B, values[2])
        arrays[f"{prefix}/{name}"] = np.stack([values[2], predicted_B])
        error = float(np.sqrt(np.mean((predicted_B - values[2]) ** 2)))
        chosen[name] = PropertyProbe(probe, best, metrics[f"{prefix}/{name}_r2"], error)
    return metrics, arrays, chosen


# -- features ----------------------------------------------------------------------------------------------------------

LATENT = ("pooled", "whole", "decoded")
STATISTICS = "statistics"


def features(
    names: Iterable[str], autoencoder: Autoencoder, theta_BP: Tensor, z: Tensor, zoo: int = 0
) -> dict[str, np.ndarray]:
    """Features [B, F] of models with their latents, by name, one of LATENT, `statistics`, or several joined by +.

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

    `splits` and `latents` are those of training, validation and test models.
    """
    made = [
        features((*LATENT, STATISTICS), autoencoder, models.theta_BP, z, zoo)
        for models, z in zip(splits, latents, strict=True)
    ]
    statistics = [part[STATISTICS] for part in made]
    beside = {name: [part[name] for part in made] for name in LATENT}
    baseline, _, _ = _probe(statistics, {}, splits, "predict/baseline_statistics")
    metrics, arrays, chosen = _probe(statistics, beside, splits, "predict")
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
