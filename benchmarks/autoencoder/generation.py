"""Accuracy of new models against their novelty, by compute budget, with the baselines that a user could run instead.

Every budget is a sweep over how far models are taken from the training models (a sampler's bandwidth, a noise scale, a
share of the average, steps of distillation), so that methods can be compared at equal novelty.

    python -m benchmarks generation --zoo ZOO --seeds 1 --only "Kronecker map" --set model.latent=62 tasks.samples=24

judges the untrained map alone, which networks of any size have.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.autoencoder.bench import RESIDUAL, Bench, Values, part
from benchmarks.harness import Row, percent, spread
from distrecon.autoencoder import generate
from distrecon.autoencoder.config import TasksConfig
from distrecon.autoencoder.goal import Goal
from distrecon.autoencoder.model import encode_models
from distrecon.autoencoder.refine import refine
from distrecon.autoencoder.tasks import judging
from distrecon.report import figures

CODER: Values = RESIDUAL | {"optim.epochs": 2}
UNTRAINED: Values = {"model.kind": "fisher_pca"}
KRONECKER: Values = {"model.kind": "kronecker_pca"}
TEACHERS = 10
SCRATCH = "scratch, 10 to 100 steps"
SCRATCH_RATES = (0.07, 0.14, 0.28)  # of distillation from scratch; the figure has the second

TABLES = {
    "accuracy (%) and novelty (1: as far from the training models as held-out ones)": (
        percent("mean", "accuracy_mean"),
        percent("best", "accuracy_max"),
        spread("novelty", "novelty"),
        percent("agree", "diversity_agreement"),
        spread("ms", "ms_per_model", 1, 1),
    ),
    "diversity and likeness": (
        percent("10th pct", "accuracy_p10"),
        spread("pair L2", "diversity_l2", 1, 1),
        spread("error IoU", "novelty_iou", 1, 3),
    ),
}


class Maker:
    """Makes and judges models with one coder and one seed."""

    def __init__(self, zoo: Bench, values: Values, seed: int) -> None:
        self.zoo, self.seed = zoo, seed
        self.autoencoder, _ = zoo.autoencoder(values, seed)
        self.tasks = self.autoencoder.config.tasks
        z, self.images = encode_models(self.autoencoder, zoo.train), judging(zoo.images, self.tasks.images)
        self.sources = generate.Sources.make(zoo.arch, zoo.train, z, self.images, self.tasks.good)
        self.judge = generate.Judge.make(zoo.arch, self.sources, zoo.test, self.images, self.tasks)
        self.rows: list[Row] = []

    def trained_and_baselines(self) -> list[Row]:
        """A trained coder by every sampler and budget, and what one could do without it."""
        for method, name, settings, sampler in _samplers(self.tasks):
            self._drawn(method, name, settings, sampler)
        self._baselines((0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.25, 0.5), (10, 30, 60, 100))
        return self.rows

    def kronecker(self) -> list[Row]:
        """The Kronecker map by the samplers that suit it, beside the baselines."""
        for sampler, bandwidths in {
            "flat_kde": (0.02, 0.05, 0.1), "flow_matching": (0.7, 1.0), "interpolation": (0.5, 1.0), "joint_kde": (0.3,)
        }.items():  # fmt: skip
            for bandwidth in bandwidths:
                self._drawn("", f"{sampler} {bandwidth:g}", replace(self.tasks, bandwidth=bandwidth), sampler)
        self._baselines((0.3, 0.5, 0.7), (0.5,), (10,))
        return self.rows

    def _baselines(self, scales: Sequence[float], shares: Sequence[float], budgets: Sequence[int]) -> None:
        arch, good_NP, count, seed = self.zoo.arch, self.sources.good_NP, self.tasks.samples, self.seed
        std_P = self.autoencoder.fitted(0, "std_P")
        for scale in scales:
            name = f"weight noise {scale:g}"
            self._report("weight noise", name, lambda s=scale: generate.noisy(arch, good_NP, std_P, s, count, seed))  # type: ignore[misc]
        for share in shares:
            name = f"average of two, share {share:g}"
            self._report("average of two", name, lambda s=share: generate.averaged(arch, good_NP, count, seed, s))  # type: ignore[misc]
        for steps in budgets:
            for rate in SCRATCH_RATES:
                curve = SCRATCH if rate == SCRATCH_RATES[1] else ""
                self._report(curve, f"scratch, {steps} steps, rate {rate:g}", self._distilled(steps, rate))
        self._report("", "held-out good models", lambda: self.judge.heldout_BP)

    def untrained(self) -> list[Row]:
        """The Fisher PCA alone, whose refinement steps cost a third."""
        for bandwidth in (0.2, 0.3):
            self._drawn("", f"untrained {bandwidth:g}", replace(self.tasks, bandwidth=bandwidth), "flat_kde")
        for steps in (30, 60, 100):
            for bandwidth in (0.3, 0.4):
                settings = replace(self.tasks, bandwidth=bandwidth, generate_refine=steps, teachers=TEACHERS)
                self._drawn("", f"untrained {bandwidth:g}, refine {steps}", settings, "flat_kde")
        return self.rows

    def _report(self, method: str, name: str, make: Callable[[], Tensor]) -> None:
        start = time.process_time()
        theta_MP = make()
        milliseconds = 1000 * (time.process_time() - start) / len(theta_MP)
        self.rows.append({"case": name, "method": method, "ms_per_model": milliseconds} | self.judge(theta_MP)[0])

    def _drawn(self, method: str, name: str, settings: TasksConfig, sampler: str) -> None:
        def make() -> Tensor:
            source = self.autoencoder, self.sources, self.images
            return generate.generate_models(*source, settings, sampler, self.seed)[0]

        self._report(method, name, make)

    def _distilled(self, steps: int, rate: float) -> Callable[[], Tensor]:
        """Randomly initialised models after Adam steps on all weights towards ten good models' averaged outputs."""
        autoencoder, count = self.autoencoder, self.tasks.samples
        fresh_BP = self.zoo.fresh(count, 1_000_000 + 1000 * self.seed)

        def make() -> Tensor:
            targets_MQC = generate.teacher_targets(autoencoder, self.sources.good_NP, count, TEACHERS, self.seed, 0)
            decode, queries = lambda x_BP: autoencoder.unstandardise(x_BP, 0), autoencoder.fitted(0, "queries")
            goal = Goal(self.zoo.arch, decode, torch.add, torch.ones(()), queries, targets_MQC)
            return decode(refine("adam", goal, autoencoder.standardise(fresh_BP, 0), steps, self.seed, rate))

        return make


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


def pictures(rows: Sequence[Row], args: Namespace) -> None:
    """Accuracy against novelty, of the first seed's."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["seed"] == 0 and row["method"]:
            curves.setdefault(row["method"], []).append((row["novelty"], row["accuracy_mean"]))
    figures.save_png(figures.accuracy_novelty(curves), args.rows.with_suffix(".png"))


CASES = {
    "trained": lambda zoo, _, seed: Maker(zoo, CODER, seed).trained_and_baselines(),
    "untrained": lambda zoo, _, seed: Maker(zoo, UNTRAINED, seed).untrained(),
    "Kronecker map": lambda zoo, _, seed: Maker(zoo, KRONECKER, seed).kronecker(),
}
PARTS = {"generation": part(CASES, TABLES, pictures)}
