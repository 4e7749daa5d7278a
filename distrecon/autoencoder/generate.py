"""Generation task: sample latents of good models, decode, and judge accuracy, diversity and novelty beside baselines.

Good models are training models, one state each, with the best accuracy on validation images. Samples may be filtered on
validation images and refined or fine-tuned on training images; test images only judge. The baselines of Zeng et al.
(arXiv 2506.07998) stand beside every table: weight noise on a good model, scaled to the same validation accuracy, and
the average of two aligned good models. `baseline_heldout` are good models that the autoencoder never saw.

Legend: A training states, B models, M generated, N good, P parameters, Q images, C classes.
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder import novelty
from distrecon.autoencoder.config import TasksConfig
from distrecon.autoencoder.model import Autoencoder, check_finite
from distrecon.autoencoder.samplers import Known, sample
from distrecon.errors import UserError
from distrecon.images import ImageSet
from distrecon.nets import Architecture, align, evaluate, fit, inputs_for, outputs
from distrecon.zoos.models import Models

NOISE_SCALES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # in deviations of a layer's weights
SEARCH_MODELS, SEARCH_IMAGES = 16, 500  # by which a noise scale is chosen
FINETUNE_LR = 1e-3


def best_states(models: Models, accuracy_B: Tensor) -> Tensor:
    """Position of the best state of each model, best model first."""
    first: dict[str, int] = {}
    for i in accuracy_B.argsort(descending=True, stable=True).tolist():
        first.setdefault(models.model_id[i], i)
    return torch.tensor([*first.values()])


def top(best_N: Tensor, share: float) -> Tensor:
    """The first `share` of them, at least 3."""
    return best_N[: max(3, round(share * len(best_N)))]


@dataclass(frozen=True)
class Sources:
    """Training states and their latents, judged on validation images: what new models are made from."""

    theta_AP: Tensor
    z: Tensor
    accuracy_A: Tensor
    test_accuracy_A: Tensor  # on test images, as the zoo has it: told, never chosen by
    best_N: Tensor  # the best state of each model, best model first
    good_N: Tensor  # the first of these

    @staticmethod
    def make(arch: Architecture, train: Models, z: Tensor, images: ImageSet, share: float) -> "Sources":
        """`share` of the models are good."""
        if len(set(train.model_id)) < 3:
            raise UserError("generation needs at least 3 training models")
        validation = images.validation
        accuracy_A = evaluate(arch, train.theta_BP, validation.images, validation.labels_Q).accuracy_B
        best_N = best_states(train, accuracy_A)
        return Sources(train.theta_BP, z, accuracy_A, train.test_accuracy_B, best_N, top(best_N, share))

    @property
    def good_NP(self) -> Tensor:
        return self.theta_AP[self.good_N]


@dataclass(frozen=True)
class Judge:
    """What generated models are compared with, made once: aligned training models, their errors, held-out models."""

    arch: Architecture
    images: ImageSet
    config: TasksConfig
    reference_P: Tensor
    train_NP: Tensor  # aligned to the reference
    train_accuracy_N: Tensor  # on test images, as the zoo has it
    train_wrong_NQ: Tensor  # of the best state of each training model
    heldout_BP: Tensor
    heldout_distance: float

    @staticmethod
    def make(arch: Architecture, sources: Sources, test: Models, images: ImageSet, config: TasksConfig) -> "Judge":
        if not len(test):
            raise UserError("generation needs a test model")
        validation = images.validation
        accuracy_B = evaluate(arch, test.theta_BP, validation.images, validation.labels_Q).accuracy_B
        good = top(best_states(test, accuracy_B), config.good)[: config.samples]
        heldout_BP, reference_P = test.theta_BP[good], sources.theta_AP[0]
        train_NP = align(arch, sources.theta_AP, reference_P)
        distance_B, _ = novelty.nearest_aligned(arch, heldout_BP, train_NP, reference_P, config.candidates)
        best = evaluate(arch, sources.theta_AP[sources.best_N], images.test.images, images.test.labels_Q)
        wrong_NQ = best.predictions_BQ != images.test.labels_Q
        return Judge(
            arch,
            images,
            config,
            reference_P,
            train_NP,
            sources.test_accuracy_A,
            wrong_NQ,
            heldout_BP,
            float(distance_B.mean().clamp_min(1e-12)),
        )

    def __call__(self, theta_MP: Tensor) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics of generated models, without prefix, and as arrays their accuracies [M] and `relatives` [2, M].

        A model's relative is the nearest training model: its distance, 1 where a held-out good model's relative is on
        average, and its accuracy.
        """
        check_finite(theta_MP, "generate")
        arch, config = self.arch, self.config
        judged = evaluate(arch, theta_MP, self.images.test.images, self.images.test.labels_Q)
        distance_M, relative_M = novelty.nearest_aligned(
            arch, theta_MP, self.train_NP, self.reference_P, config.candidates
        )
        wrong_MQ = judged.predictions_BQ != self.images.test.labels_Q
        metrics = {
            "accuracy_mean": float(judged.accuracy_B.mean()),
            "accuracy_max": float(judged.accuracy_B.max()),
            "accuracy_p10": float(torch.quantile(judged.accuracy_B, 0.1)),
            "diversity_l2": float(novelty.aligned_pairwise(arch, theta_MP[: config.pairs]).mean()),
            "diversity_agreement": novelty.mean_pairwise_agreement(judged.predictions_BQ, arch.num_outputs),
            "novelty": float(distance_M.mean()) / self.heldout_distance,
            "novelty_iou": float(novelty.error_overlap(wrong_MQ, self.train_wrong_NQ).mean()),
        }
        relatives_2M = torch.stack([distance_M / self.heldout_distance, self.train_accuracy_N[relative_M]])
        return metrics, {"accuracy": judged.accuracy_B.numpy(), "relatives": relatives_2M.float().numpy()}


def generate_models(
    autoencoder: Autoencoder,
    sources: Sources,
    images: ImageSet,
    config: TasksConfig,
    sampler: str,
    seed: int = 0,
    zoo: int = 0,
) -> tuple[Tensor, float]:
    """`config.samples` new models [M, P], and the milliseconds that each took."""
    arch = autoencoder.architectures[zoo]
    start = perf_counter()
    scale = autoencoder.coder.behavioral_scale(zoo).detach().to(sources.z)
    queries = autoencoder.fitted(zoo, "queries")  # where the autoencoder lies

    def shape(noise_MF: Tensor) -> Tensor:
        return autoencoder.coder.flat_noise(noise_MF.to(queries.device), zoo).detach().to(noise_MF)

    known = Known(sources.z * scale, sources.accuracy_A, sources.good_N)
    good, count = known.z[sources.good_N], config.samples * config.select
    drawn = (sample(sampler, good, count, config.bandwidth, seed, shape, known) / scale).to(queries)
    if config.generate_refine:
        targets_BQC = teacher_targets(autoencoder, sources.good_NP, len(drawn), config.teachers, seed, zoo)
        drawn = autoencoder.refine(drawn, targets_BQC, config.generate_refine, zoo, config.refiner, seed)
    with torch.no_grad():
        theta_MP = autoencoder.decode(drawn, zoo=zoo).float().cpu()
    if config.select > 1:
        accuracy_M = evaluate(arch, theta_MP, images.validation.images, images.validation.labels_Q).accuracy_B
        theta_MP = theta_MP[accuracy_M.argsort(descending=True, stable=True)[: config.samples]]
    theta_MP = finetuned(arch, theta_MP, images, config.finetune_epochs, seed)
    return theta_MP, 1000 * (perf_counter() - start) / len(theta_MP)


def teacher_targets(
    autoencoder: Autoencoder, good_NP: Tensor, count: int, teachers: int, seed: int, zoo: int
) -> Tensor:
    """Averaged probabilities [count, Q, C] of `teachers` good models drawn anew for each generated one."""
    arch, queries = autoencoder.architectures[zoo], autoencoder.fitted(zoo, "queries")
    probabilities_NQC = outputs(arch, good_NP.to(queries), queries).softmax(2)
    draw = torch.Generator().manual_seed(seed + 1)
    size = min(teachers, len(good_NP))
    chosen = [torch.randperm(len(good_NP), generator=draw)[:size] for _ in range(count)]
    return torch.stack([probabilities_NQC[c].mean(0) for c in chosen])


def finetuned(arch: Architecture, theta_MP: Tensor, images: ImageSet, epochs: int, seed: int) -> Tensor:
    """All models after `epochs` epochs of Adam on the training images, batched."""
    if not epochs:
        return theta_MP
    inputs = inputs_for(arch, images.train.images)
    lr_M = torch.full((len(theta_MP),), FINETUNE_LR)
    labels_Q = images.train.labels_Q.to(inputs.device)
    for epoch in fit(arch, theta_MP.to(inputs.device), inputs, labels_Q, epochs=epochs, lr_B=lr_M, seed=seed):
        last = epoch
    return last.theta_BP.to(theta_MP.device, copy=True)


# -- baselines ---------------------------------------------------------------------------------------------------------


def noisy(arch: Architecture, good_NP: Tensor, std_P: Tensor, scale: float, count: int, seed: int) -> Tensor:
    """Good models drawn at random plus normal noise of `scale` deviations of each layer's weights: [count, P].

    Of variances, the logarithms get the noise.
    """
    draw = torch.Generator().manual_seed(seed)
    pick_M = torch.randint(len(good_NP), (count,), generator=draw)
    step_MP = scale * std_P * torch.randn(count, good_NP.shape[1], generator=draw)
    return arch.from_logarithms(arch.to_logarithms(good_NP[pick_M]) + step_MP)


def averaged(arch: Architecture, good_NP: Tensor, count: int, seed: int, share: float = 0.5) -> Tensor:
    """Averages of two different good models each, the second aligned to the first: [count, P]."""
    draw = torch.Generator().manual_seed(seed)
    first_M = torch.randint(len(good_NP), (count,), generator=draw)
    second_M = (first_M + torch.randint(1, len(good_NP), (count,), generator=draw)) % len(good_NP)
    pairs = zip(good_NP[first_M], good_NP[second_M], strict=True)
    return torch.stack([torch.lerp(a_P, align(arch, b_P[None], a_P)[0], share) for a_P, b_P in pairs])


def matched_noise(
    arch: Architecture, good_NP: Tensor, std_P: Tensor, wanted_MP: Tensor, images: ImageSet, seed: int
) -> float:
    """The noise scale whose mean accuracy is nearest to that of the wanted models, by few models and validation images.

    Accuracy falls with the scale, so bisection finds the two scales between which it passes the one wanted.
    """
    found: dict[int, float] = {}

    def accuracy(theta_MP: Tensor) -> float:
        few = images.validation.images[:SEARCH_IMAGES], images.validation.labels_Q[:SEARCH_IMAGES]
        return float(evaluate(arch, theta_MP, *few).accuracy_B.mean())

    wanted = accuracy(wanted_MP)

    def excess(i: int) -> float:
        if i not in found:
            noisy_MP = noisy(arch, good_NP, std_P, NOISE_SCALES[i], min(len(wanted_MP), SEARCH_MODELS), seed)
            found[i] = accuracy(noisy_MP) - wanted
        return found[i]

    low, high = 0, len(NOISE_SCALES) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return NOISE_SCALES[min((low, high), key=lambda i: abs(excess(i)))]


def generate(
    autoencoder: Autoencoder,
    train: Models,
    test: Models,
    z: Tensor,
    images: ImageSet,
    config: TasksConfig,
    seed: int = 0,
    zoo: int = 0,
) -> tuple[dict[str, float], dict[str, np.ndarray], Tensor]:
    """`generate/...` of the first sampler and the baselines, `generate/<sampler>/...` of the others; models [M, P]."""
    arch = autoencoder.architectures[zoo]
    sources = Sources.make(arch, train, z, images, config.good)
    judge, good_NP = Judge.make(arch, sources, test, images, config), sources.good_NP
    metrics: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}

    def report(prefix: str, theta_MP: Tensor) -> None:
        found, made = judge(theta_MP)
        metrics.update({f"{prefix}/{key}": value for key, value in found.items()})
        arrays.update({f"{prefix}/{key}": values for key, values in made.items()})

    headline: Tensor | None = None
    for i, sampler in enumerate(config.samplers):
        prefix = f"generate/{sampler}" if i else "generate"
        theta_MP, milliseconds = generate_models(autoencoder, sources, images, config, sampler, seed, zoo)
        report(prefix, theta_MP)
        metrics[f"{prefix}/ms_per_model"] = milliseconds
        headline = theta_MP if headline is None else headline
    assert headline is not None
    if config.remeasure and arch.has_statistics:
        few = inputs_for(arch, images.train.images[: config.remeasure])
        report("generate/remeasured", arch.remeasured(headline, few))
    std_P = autoencoder.fitted(zoo, "std_P").float().cpu()
    scale = matched_noise(arch, good_NP, std_P, headline, images, seed)
    metrics["generate/baseline_noise/scale"] = scale
    report("generate/baseline_noise", noisy(arch, good_NP, std_P, scale, config.samples, seed))
    report("generate/baseline_average", averaged(arch, good_NP, config.samples, seed))
    if len(judge.heldout_BP) > 1:
        report("generate/baseline_heldout", judge.heldout_BP)
    return metrics, arrays, headline
