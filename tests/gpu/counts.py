"""What a GPU would be asked for, as JSON: `python -m tests.gpu.counts [NAME ...]`, in a process of its own."""

# ruff: noqa: I001, what makes torch believe in a GPU comes before torch
from tests.gpu.fake_cuda import Recorder, recording

import json
import sys
from collections.abc import Callable

import torch

from distrecon.autoencoder import PAPER, AutoencoderConfig, Batch, Training, ZooSample
from distrecon.autoencoder.tasks import run_tasks
from distrecon.config import replace
from distrecon.images import ImageSet, LabelledImages
from distrecon.nets import Architecture, architecture, evaluate, fit, initialise
from distrecon.zoos.models import Models

MODELS = 64


def random_images(arch: Architecture, count: int) -> ImageSet:
    part = LabelledImages(torch.randn(count, *arch.input_shape), torch.zeros(count, dtype=torch.long))
    return ImageSet("random", part, part, part, tuple("0123456789"), "none")


def step(gpu: Recorder, precision: str, **values: object) -> dict[str, dict[str, float]]:
    """The first and the third step at the paper's size: 64 CNN3 models x 256 of 4,096 queries, 8 + 8 layers."""
    arch = architecture("cnn3")
    theta_BP = initialise(arch, ["kaiming_normal"] * MODELS, range(MODELS))
    config = replace(AutoencoderConfig(), PAPER | {"optim.precision": precision} | values)
    training = Training(config, [ZooSample(arch, theta_BP, random_images(arch, 4096))], 1000, "cuda")
    found = {}
    batches = (Batch(0, number, 0, torch.arange(MODELS), theta_BP, MODELS, 0) for number in range(3))
    for number, batch in enumerate(batches):
        gpu.reset()
        training.step(batch)
        found[number] = gpu.counts()
    return {"first": found[0], "later": found[2]}


def zoo_training(gpu: Recorder) -> dict[str, dict[str, float]]:
    """One pass of 32 CNN3 models over 512 pictures, 16 batches of 32; counted in all."""
    arch = architecture("cnn3")
    theta_BP = initialise(arch, ["kaiming_normal"] * 32, range(32)).cuda()
    part = random_images(arch, 512).train
    images, labels_Q = part.images.cuda(), part.labels_Q.cuda()
    gpu.reset()
    for _ in fit(arch, theta_BP, images, labels_Q, epochs=1, lr_B=torch.full((32,), 1e-3), batch_size=32):
        pass
    return {"one pass, 16 batches": gpu.counts()}


def evaluation(gpu: Recorder) -> dict[str, dict[str, float]]:
    """Accuracy and loss of 64 CNN3 models on 45,000 pictures."""
    arch = architecture("cnn3")
    theta_BP = initialise(arch, ["kaiming_normal"] * MODELS, range(MODELS)).cuda()
    images = torch.empty(45_000, *arch.input_shape, device="cuda")
    labels_Q = torch.zeros(45_000, dtype=torch.long, device="cuda")
    gpu.reset()
    evaluate(arch, theta_BP, images, labels_Q)
    return {"64 models on 45,000 pictures": gpu.counts()}


def scoring(gpu: Recorder) -> dict[str, dict[str, float]]:
    """All tasks on 48 CNN3 models, which lie on the CPU and are aligned there, and 4,096 pictures."""
    arch = architecture("cnn3")
    theta_BP = initialise(arch, ["kaiming_normal"] * 48, range(48))
    images = random_images(arch, 4096)
    config = replace(AutoencoderConfig(), PAPER | {"model.layers": 2, "tasks.refine": 2, "tasks.samples": 8})
    autoencoder = Training(config, [ZooSample(arch, theta_BP, images)], 1, "cuda").autoencoder
    splits = [Models(theta_BP[i::3], [f"m{n}" for n in range(16)], *[torch.arange(16.0)] * 6) for i in range(3)]
    gpu.reset()
    run_tasks(autoencoder, *splits, images.on("cuda"))
    return {"48 models on 4,096 pictures": gpu.counts()}


CASES: dict[str, Callable[[Recorder], dict[str, dict[str, float]]]] = {
    "step float32": lambda gpu: step(gpu, "float32"),
    "step tf32": lambda gpu: step(gpu, "tf32"),
    "step bf16": lambda gpu: step(gpu, "bf16"),
    "step mixed": lambda gpu: step(gpu, "float32", **{"data.align": True, "data.mix": 0.5, "data.query_pool": 256}),
    "zoo training": zoo_training,
    "evaluation": evaluation,
    "scoring": scoring,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with recording() as gpu:
        found = {name: CASES[name](gpu) for name in names or CASES}
        if len(names) == 1:
            for what, counter in (("kernels", gpu.kernels), ("waits", gpu.synchronisations), ("copies", gpu.copies)):
                print(what, *counter.most_common(40), sep="\n  ", file=sys.stderr)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
