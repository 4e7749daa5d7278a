"""Reconstruction of held-out models, amortised and refined, and the controls beside it."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.autoencoder.bench import RESIDUAL, Bench, Values, part
from benchmarks.harness import Row, percent, spread
from distrecon import config as configuration
from distrecon.autoencoder import Autoencoder, AutoencoderConfig, ZooSample
from distrecon.autoencoder.model import decode_latents, encode_models, statistics
from distrecon.autoencoder.reconstruct import compare
from distrecon.nets import outputs

STRUCTURAL: Values = {"model.fisher_metric": "structural"}
CHUNK = 128  # models refined at once

CASES: dict[str, tuple[Values, tuple[int, ...]]] = {
    "Fisher residual C+S+B": (RESIDUAL, (0, 10, 30)),
    "Fisher residual C+S": (RESIDUAL | {"loss.terms": "C+S"}, (0, 10)),
    "Fisher PCA, untrained": ({"model.kind": "fisher_pca"}, (0, 10, 30)),
    "PCA residual C+S+B": (RESIDUAL | STRUCTURAL, (0, 10)),
    "PCA residual C+S": (RESIDUAL | STRUCTURAL | {"loss.terms": "C+S"}, (0, 10)),
    "PCA, untrained": (STRUCTURAL | {"model.kind": "fisher_pca"}, (0, 10)),
    "transformer C+S+B": ({}, (0, 10, 30)),
    "transformer C+S": ({"loss.terms": "C+S"}, (0, 10)),
}

TABLES = {
    "behaviour (%; k: refinement steps; last column: best minus the zoo's best)": (
        percent("agreement", "agreement"),
        percent("on errors", "agreement_on_errors"),
        percent("own nearest", "own_nearest"),
        percent("best gap", "best_gap"),
    ),
    "accuracy, weights and cost": (
        percent("acc. mean", "accuracy_mean"),
        spread("acc. corr", "accuracy_correlation", 1, 3),
        spread("aligned L2", "weight_l2_aligned"),
        spread("ms/model", "ms_per_model", 1, 1),
        spread("train s", "training_seconds", 1, 0),
    ),
}


def coder(zoo: Bench, case: str, seed: int) -> list[Row]:
    """A row for each number of refinement steps."""
    values, steps = CASES[case]
    (autoencoder, seconds), rows = zoo.autoencoder(values, seed), []
    original_BP = autoencoder.canonical(zoo.test.theta_BP, 0)
    for k in steps:
        start = time.process_time()
        hat_BP = decode_latents(autoencoder, encode_models(autoencoder, zoo.test, refine=k, refiner="adam"))
        rows.append(compared(zoo, original_BP, hat_BP, case, k, start) | {"training_seconds": seconds})
    return rows


def compared(zoo: Bench, original_BP: Tensor, hat_BP: Tensor, name: str, steps: int, start: float) -> Row:
    milliseconds = 1000 * (time.process_time() - start) / len(hat_BP)
    metrics, _ = compare(zoo.arch, original_BP, hat_BP, zoo.images.test)
    row = {key.removeprefix("reconstruct/"): value for key, value in metrics.items()}
    best = float(zoo.test.test_accuracy_B.max())
    told = {"ms_per_model": milliseconds, "best_gap": row["accuracy_max"] - best, "zoo_accuracy_max": best}
    return {"case": f"{name}, k={steps}"} | told | row


# -- controls: the same steps without a learned space ------------------------------------------------------------------

RATES = (0.035, 0.07, 0.14, 0.28)  # each control has the best of these for validation models
TRIED = 100  # validation models


def linear(zoo: Bench, basis_PZ: Tensor, center_P: Tensor) -> Autoencoder:
    """An autoencoder whose latents are coordinates in an orthonormal basis of the standardised weights."""
    config = configuration.replace(AutoencoderConfig(), {"model.kind": "fisher_pca", "data.align": False})
    plain = replace(config, model=replace(config.model, kind="transformer"))
    fitted = statistics(plain, ZooSample(zoo.arch, zoo.train.theta_BP, zoo.images))
    fitted |= {
        "center_P": center_P,
        "index0_NE": torch.arange(zoo.arch.num_parameters)[None],
        "encode0_KE": basis_PZ.T.contiguous(),
        "decode0_EK": basis_PZ,
        "scale_Z": torch.ones(basis_PZ.shape[1]),
        "factor0_EE": torch.eye(zoo.arch.num_parameters),
    }
    return Autoencoder(config, [zoo.arch], [fitted])


def all_weights(zoo: Bench) -> Autoencoder:
    """The latents are the standardised weights themselves."""
    count = zoo.arch.num_parameters
    return linear(zoo, torch.eye(count), torch.zeros(count))


def random_subspace(zoo: Bench, case: str, seed: int) -> list[Row]:
    """Of the latent's size."""
    arch = zoo.arch
    latents = AutoencoderConfig().model.latent * arch.num_tokens
    draw = torch.Generator().manual_seed(seed)
    basis_PZ = torch.linalg.qr(torch.randn(arch.num_parameters, latents, generator=draw))[0]
    center_P = all_weights(zoo).standardise(zoo.train.theta_BP, 0).mean(0)
    autoencoder = linear(zoo, basis_PZ, center_P)
    start = {id(models): autoencoder.encode(models) for models in (zoo.validation.theta_BP, zoo.test.theta_BP)}
    return [_control(zoo, autoencoder, start, case, k) for k in (0, 10, 30)]


def scratch(zoo: Bench, case: str, seed: int) -> list[Row]:
    """Students that start from a random initialisation."""
    plain, start = all_weights(zoo), {}
    for i, models in enumerate((zoo.validation.theta_BP, zoo.test.theta_BP)):
        start[id(models)] = plain.standardise(zoo.fresh(len(models), 10_000 * (1 + i + 2 * seed)), 0)
    return [_control(zoo, plain, start, case, k) for k in (10, 30, 100)]


def _control(zoo: Bench, autoencoder: Autoencoder, start: dict[int, Tensor], name: str, k: int) -> Row:
    """After k steps at the learning rate that serves validation models best."""

    def rebuilt(theta_BP: Tensor, rate: float, count: int | None = None) -> Tensor:
        queries, parts = autoencoder.fitted(0, "queries"), []
        z = start[id(theta_BP)][:count]
        for z_part, theta_part in zip(z.split(CHUNK), theta_BP[:count].split(CHUNK), strict=True):
            targets_BQC = outputs(zoo.arch, theta_part, queries).softmax(2)
            parts.append(autoencoder.refine(z_part, targets_BQC, k, 0, "adam", learning_rate=rate))
        return decode_latents(autoencoder, torch.cat(parts))

    def agreement(rate: float) -> float:
        few_BP = zoo.validation.theta_BP[:TRIED]
        found, _ = compare(zoo.arch, few_BP, rebuilt(zoo.validation.theta_BP, rate, TRIED), zoo.images.validation)
        return found["reconstruct/agreement"]

    rate = max(RATES, key=agreement) if k else RATES[0]
    began = time.process_time()
    hat_BP = rebuilt(zoo.test.theta_BP, rate)
    return compared(zoo, zoo.test.theta_BP, hat_BP, name, k, began) | {"learning_rate": rate}


PARTS = {
    "reconstruction": part(dict.fromkeys(CASES, coder), TABLES),
    "controls": part({"random subspace": random_subspace, "student from scratch": scratch}, TABLES),
}
