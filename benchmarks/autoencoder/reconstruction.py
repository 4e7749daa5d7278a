"""Reconstruction of held-out models, amortised and refined, and the controls beside it."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.autoencoder.bench import RESIDUAL, Bench, Column, Row, Tables, Values, Zoo, percent
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

TABLES: Tables = {
    "behaviour (%; k: refinement steps; last column: best minus the zoo's best)": (
        percent("agreement", "agreement"),
        percent("agreement_on_errors", "on errors"),
        percent("own_nearest", "own nearest"),
        percent("best_gap", "best gap"),
    ),
    "accuracy, weights and cost": (
        percent("accuracy_mean", "acc. mean"),
        Column("accuracy_correlation", "acc. corr", 1, 3),
        Column("weight_l2_aligned", "aligned L2"),
        Column("ms_per_model", "ms/model", 1, 1),
        Column("training_seconds", "train s", 1, 0),
    ),
}


def run(bench: Bench) -> None:
    """Every coder with every seed."""
    zoo = bench.zoo
    for seed in range(bench.seeds):
        for case, (values, steps) in CASES.items():
            bench.cell(case, seed, lambda v=values, k=steps, s=seed, c=case: _coder(bench, c, v, k, s))  # type: ignore[misc]
    print(f"zoo: best of the held-out models {float(zoo.test.test_accuracy_B.max()):.3f}")


def _coder(bench: Bench, case: str, values: Values, steps: tuple[int, ...], seed: int) -> list[Row]:
    autoencoder, seconds = bench.autoencoder(values, seed)
    zoo, rows = bench.zoo, []
    original_BP = autoencoder.canonical(zoo.test.theta_BP, 0)
    for k in steps:
        start = time.process_time()
        hat_BP = decode_latents(autoencoder, encode_models(autoencoder, zoo.test, refine=k))
        rows.append(compared(zoo, original_BP, hat_BP, case, k, start) | {"training_seconds": seconds})
    return rows


def compared(zoo: Zoo, original_BP: Tensor, hat_BP: Tensor, name: str, steps: int, start: float) -> Row:
    milliseconds = 1000 * (time.process_time() - start) / len(hat_BP)
    metrics, _ = compare(zoo.arch, original_BP, hat_BP, zoo.images.test)
    row = {key.removeprefix("reconstruct/"): value for key, value in metrics.items()}
    gap = row["accuracy_max"] - float(zoo.test.test_accuracy_B.max())
    return {"case": f"{name}, k={steps}", "ms_per_model": milliseconds, "best_gap": gap} | row


# -- controls: the same steps without a learned space ------------------------------------------------------------------

RATES = (0.035, 0.07, 0.14, 0.28)  # each control has the best of these for validation models
TRIED = 100  # validation models


def linear(zoo: Zoo, basis_PZ: Tensor, center_P: Tensor) -> Autoencoder:
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


def all_weights(zoo: Zoo) -> Autoencoder:
    """The latents are the standardised weights themselves."""
    count = zoo.arch.num_parameters
    return linear(zoo, torch.eye(count), torch.zeros(count))


def controls(bench: Bench) -> None:
    """A random subspace of the latent's size, and students that start from a random initialisation."""
    for seed in range(bench.seeds):
        bench.cell("random subspace", seed, lambda s=seed: _random_subspace(bench.zoo, s))  # type: ignore[misc]
        bench.cell("student from scratch", seed, lambda s=seed: _scratch(bench.zoo, s))  # type: ignore[misc]


def _random_subspace(zoo: Zoo, seed: int) -> list[Row]:
    arch = zoo.arch
    latents = AutoencoderConfig().model.latent * arch.num_tokens
    draw = torch.Generator().manual_seed(seed)
    basis_PZ = torch.linalg.qr(torch.randn(arch.num_parameters, latents, generator=draw))[0]
    center_P = all_weights(zoo).standardise(zoo.train.theta_BP, 0).mean(0)
    autoencoder = linear(zoo, basis_PZ, center_P)
    start = {id(models): autoencoder.encode(models) for models in (zoo.validation.theta_BP, zoo.test.theta_BP)}
    return [_control(zoo, autoencoder, start, "random subspace", k) for k in (0, 10, 30)]


def _scratch(zoo: Zoo, seed: int) -> list[Row]:
    plain, start = all_weights(zoo), {}
    for i, models in enumerate((zoo.validation.theta_BP, zoo.test.theta_BP)):
        start[id(models)] = plain.standardise(zoo.fresh(len(models), 10_000 * (1 + i + 2 * seed)), 0)
    return [_control(zoo, plain, start, "student from scratch", k) for k in (10, 30, 100)]


def _control(zoo: Zoo, autoencoder: Autoencoder, start: dict[int, Tensor], name: str, k: int) -> Row:
    """After k steps at the learning rate that serves validation models best."""

    def rebuilt(theta_BP: Tensor, rate: float, count: int | None = None) -> Tensor:
        queries, parts = autoencoder.fitted(0, "queries"), []
        z = start[id(theta_BP)][:count]
        for z_part, theta_part in zip(z.split(CHUNK), theta_BP[:count].split(CHUNK), strict=True):
            targets_BQC = outputs(zoo.arch, theta_part, queries).softmax(2)
            parts.append(autoencoder.refine(z_part, targets_BQC, k, 0, learning_rate=rate))
        return decode_latents(autoencoder, torch.cat(parts))

    def agreement(rate: float) -> float:
        few_BP = zoo.validation.theta_BP[:TRIED]
        found, _ = compare(zoo.arch, few_BP, rebuilt(zoo.validation.theta_BP, rate, TRIED), zoo.images.validation)
        return found["reconstruct/agreement"]

    rate = max(RATES, key=agreement) if k else RATES[0]
    began = time.process_time()
    hat_BP = rebuilt(zoo.test.theta_BP, rate)
    return compared(zoo, zoo.test.theta_BP, hat_BP, name, k, began) | {"learning_rate": rate}
