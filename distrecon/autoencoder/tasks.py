"""The three tasks on one trained autoencoder: predict, reconstruct, generate.

Test images and test models only judge; whatever is chosen is chosen on validation images and validation models.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder import gradients
from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.generate import generate
from distrecon.autoencoder.latent_map import latent_map
from distrecon.autoencoder.model import Autoencoder, decode_latents, encode_models, encoded
from distrecon.autoencoder.predict import predict
from distrecon.autoencoder.probes import Probes
from distrecon.autoencoder.reconstruct import compare
from distrecon.errors import UserError
from distrecon.images import ImageSet, LabelledImages
from distrecon.nets import Architecture, inputs_for
from distrecon.zoos.models import Models

GRADIENT_MODELS, GRADIENT_QUERIES = 32, 64

Show = Callable[[str, int, int], None]  # called when a stage begins, with its name, how many are done, of how many


@dataclass(frozen=True)
class TaskResults:
    """Metrics `<task>/<name>`, arrays for figures by the same names, the generated models [M, P], the probes."""

    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]
    generated_theta_BP: Tensor
    probes: Probes


def _gradients(
    arch: Architecture, theta_BP: Tensor, theta_hat_BP: Tensor, images: ImageSet
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The gradient analysis at the reconstructions: cosines, and per layer [L] how the two gradients are spread."""
    inputs = inputs_for(arch, images.train.images[:GRADIENT_QUERIES]).to(theta_BP.device)
    found = gradients.analyse(arch, theta_BP, theta_hat_BP, inputs)
    shares = {
        "gradients/structural_share": found.structural_norm_LB / found.structural_norm_LB.norm(dim=0),
        "gradients/behavioral_share": found.behavioral_norm_LB / found.behavioral_norm_LB.norm(dim=0),
        "gradients/structural_cosine": found.structural_cosine_LB,
        "gradients/predicted_cosine": found.cosine_LB,
    }
    return (
        {"gradients/predicted_cosine": float(found.cosine_B.mean())},
        {name: values.mean(1).numpy() for name, values in shares.items()},
    )


def judging(images: ImageSet, count: int) -> ImageSet:
    """The image set with at most `count` of its validation and of its test images, always the same ones."""

    def few(part: LabelledImages) -> LabelledImages:
        if len(part) <= count:
            return part
        chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
        return LabelledImages(part.images[chosen], part.labels_Q[chosen])

    return replace(images, validation=few(images.validation), test=few(images.test))


def run_tasks(
    autoencoder: Autoencoder,
    train: Models,
    validation: Models,
    test: Models,
    images: ImageSet,
    config: AutoencoderConfig | None = None,
    zoo: int = 0,
    show: Show = lambda stage, done, total: None,
) -> TaskResults:
    """All tasks of one autoencoder on one zoo; `config` (default: the autoencoder's) gives `tasks` and `seed`."""
    config = config or autoencoder.config
    images = judging(images, config.tasks.images)
    arch = autoencoder.architectures[zoo]
    for name, split in (("training", train), ("validation", validation), ("test", test)):
        if len(split) < 2:
            raise UserError(f"the tasks need at least 2 {name} models, the zoo has {len(split)}")
    stages = ["encode", "predict", "reconstruct", *(["refine"] if config.tasks.refine else []), "generate"]

    def begin(stage: str) -> None:
        show(stage, stages.index(stage), len(stages))

    autoencoder.eval()
    begin("encode")
    splits = [train, validation, test]
    latents = [encode_models(autoencoder, split, zoo) for split in splits]
    metrics: dict[str, float] = {}
    if not test.test_accuracy_B.isnan().all():  # the zoo has them
        metrics["zoo/accuracy_mean"] = float(test.test_accuracy_B.mean())
        metrics["zoo/accuracy_max"] = float(test.test_accuracy_B.max())
    arrays: dict[str, np.ndarray] = {}

    def add(found: dict[str, float], made: dict[str, np.ndarray]) -> None:
        metrics.update(found)
        arrays.update(made)

    begin("predict")
    found, made, probes = predict(autoencoder, splits, latents, zoo)
    add(found, made)
    begin("reconstruct")
    originals_BP = autoencoder.canonical(test.theta_BP, zoo)
    rebuilt_BP = decode_latents(autoencoder, latents[2], zoo)
    add(*compare(arch, originals_BP, rebuilt_BP, images.test))
    if config.tasks.remeasure and arch.has_statistics:
        few = inputs_for(arch, images.train.images[: config.tasks.remeasure])
        again_BP = arch.remeasured(rebuilt_BP, few)
        add(*compare(arch, originals_BP, again_BP, images.test, "reconstruct/remeasured"))
    add(*_gradients(arch, originals_BP[:GRADIENT_MODELS], rebuilt_BP[:GRADIENT_MODELS], images))
    if config.tasks.refine:
        begin("refine")
        refined = encode_models(autoencoder, test, zoo, config.tasks.refine, config.tasks.refiner)
        add(*compare(arch, originals_BP, decode_latents(autoencoder, refined, zoo), images.test, "reconstruct/refined"))
    begin("generate")
    found, made, theta_MP = generate(autoencoder, train, test, latents[0], images, config.tasks, config.seed, zoo)
    add(found, made)
    arrays |= latent_map(
        {
            "train": (latents[0], train.test_accuracy_B),
            "heldout": (latents[2], test.test_accuracy_B),
            "generated": (encoded(autoencoder, theta_MP, zoo), torch.from_numpy(made["generate/accuracy"])),
        }
    )
    return TaskResults(metrics, arrays, theta_MP, probes)
