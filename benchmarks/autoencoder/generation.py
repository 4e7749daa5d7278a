"""Accuracy of new models against their novelty, by compute budget, with the baselines that a user could run instead.

Every budget is a sweep over how far models are taken from the training models (a sampler's bandwidth, a noise scale, a
share of the average, steps of distillation), so that methods can be compared at equal novelty.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from benchmarks.autoencoder.bench import RESIDUAL, Bench, Column, Row, Tables, Values, Zoo, percent
from benchmarks.autoencoder.reconstruction import all_weights
from distrecon import figures
from distrecon.autoencoder import Autoencoder, generate
from distrecon.autoencoder.config import TasksConfig
from distrecon.autoencoder.model import decode_latents, encode_models
from distrecon.autoencoder.refine import refine

CODER: Values = RESIDUAL | {"optim.epochs": 2}
TEACHERS = 10
SCRATCH = "scratch, 10 to 100 steps"
SCRATCH_RATES = (0.07, 0.14, 0.28)  # of distillation from scratch; the figure has the second

TABLES: Tables = {
    "accuracy (%) and novelty (1: as far from the training models as held-out ones)": (
        percent("accuracy_mean", "mean"),
        percent("accuracy_max", "best"),
        Column("novelty", "novelty"),
        percent("diversity_agreement", "agree"),
        Column("ms_per_model", "ms", 1, 1),
    ),
    "diversity and likeness": (
        percent("accuracy_p10", "10th pct"),
        Column("diversity_l2", "pair L2", 1, 1),
        Column("novelty_iou", "error IoU", 1, 3),
    ),
}

Made = tuple[Tensor, float]  # models [M, P] and the CPU milliseconds that each took


def run(bench: Bench) -> None:
    """All budgets with every seed, and a figure."""
    for seed in range(bench.seeds):
        bench.cell("generation", seed, lambda s=seed: _seed(bench, s))  # type: ignore[misc]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in bench.rows:
        if row["seed"] == 0 and row["method"]:
            curves.setdefault(row["method"], []).append((row["novelty"], row["accuracy_mean"]))
    figures.save_png(figures.accuracy_novelty(curves), Path(bench.folder) / "generation.png")


def _seed(bench: Bench, seed: int) -> list[Row]:
    zoo, (autoencoder, _) = bench.zoo, bench.autoencoder(CODER, seed)
    tasks = autoencoder.config.tasks
    best_N = generate.best_states(zoo.arch, zoo.train, zoo.images)
    good_N = generate.top(best_N, tasks.good)
    good_NP, z_NZ = zoo.train.theta_BP[good_N], encode_models(autoencoder, zoo.train)[good_N]
    judge = generate.Judge.make(zoo.arch, zoo.train, best_N, zoo.test, zoo.images, tasks)
    rows: list[Row] = []

    def report(method: str, name: str, make: Callable[[], Tensor]) -> None:
        start = time.process_time()
        theta_MP = make()
        milliseconds = 1000 * (time.process_time() - start) / len(theta_MP)
        rows.append({"case": name, "method": method, "ms_per_model": milliseconds} | judge(theta_MP)[0])

    for method, name, settings, sampler in _samplers(tasks):
        report(method, name, lambda t=settings, s=sampler: _drawn(autoencoder, good_NP, z_NZ, zoo, t, s, seed))  # type: ignore[misc]
    std_P, count = autoencoder.fitted(0, "std_P"), tasks.samples
    for scale in (0.1, 0.2, 0.3, 0.4, 0.5):
        name = f"weight noise {scale:g}"
        report("weight noise", name, lambda s=scale: generate.noisy(good_NP, std_P, s, count, seed))  # type: ignore[misc]
    for share in (0.1, 0.25, 0.5):
        name = f"average of two, share {share:g}"
        report("average of two", name, lambda s=share: generate.averaged(zoo.arch, good_NP, count, seed, s))  # type: ignore[misc]
    for steps in (10, 30, 60, 100):
        for rate in SCRATCH_RATES:
            name = f"scratch, {steps} steps, rate {rate:g}"
            report(
                SCRATCH if rate == SCRATCH_RATES[1] else "", name, _distilled(zoo, good_NP, steps, rate, count, seed)
            )
    report("", "held-out good models", lambda: judge.heldout_BP)
    return rows


def _samplers(tasks: TasksConfig) -> list[tuple[str, str, TasksConfig, str]]:
    """(curve of the figure or none, name, settings, sampler)."""
    cases = []

    def add(budget: str, sampler: str, bandwidths: tuple[float, ...], **settings: int) -> None:
        note = "".join(f", {name} {value}" for name, value in settings.items())
        for bandwidth in bandwidths:
            keys = {"bandwidth": bandwidth, "teachers": TEACHERS, **settings}
            keys["generate_refine"] = keys.pop("refine", 0)
            cases.append((budget, f"{sampler} {bandwidth:g}{note}", replace(tasks, **keys), sampler))  # type: ignore[arg-type]

    add("zero-shot", "flat_kde", (0.1, 0.15, 0.2, 0.25, 0.3))
    add("", "isotropic_kde", (0.1, 0.2, 0.3, 0.4))
    add("", "joint_kde", (0.1, 0.3, 0.5))
    add("", "flat_kde", (0.2, 0.3), select=4)
    for steps in (10, 30, 60):
        add(f"{steps} steps", "flat_kde", (0.2, 0.3, 0.4), refine=steps)
    add("", "isotropic_kde", (0.4,), refine=10)
    for sampler in ("gaussian", "interpolation", "dimension_kde"):
        add("", sampler, (1.0,))
    return cases


def _drawn(
    autoencoder: Autoencoder, good_NP: Tensor, z_NZ: Tensor, zoo: Zoo, settings: TasksConfig, sampler: str, seed: int
) -> Tensor:
    return generate.generate_models(autoencoder, good_NP, z_NZ, zoo.images, settings, sampler, seed)[0]


def _distilled(zoo: Zoo, good_NP: Tensor, steps: int, rate: float, count: int, seed: int) -> Callable[[], Tensor]:
    """Randomly initialised models after Adam steps on all weights towards ten good models' averaged outputs."""
    plain = all_weights(zoo)
    first = plain.standardise(zoo.fresh(count, 1_000_000 + 1000 * seed), 0)

    def make() -> Tensor:
        targets_MQC = generate.teacher_targets(plain, good_NP, count, TEACHERS, seed, 0)
        return decode_latents(plain, refine(plain, first, targets_MQC, steps, 0, seed, rate))

    return make
