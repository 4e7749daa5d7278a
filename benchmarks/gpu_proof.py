"""What the first GPU proves, part by part, with torch alone: no Ray, no MLflow, nothing to install but distrecon.

Each part is written to its own JSON file as soon as it is done, and is not done again; parts come in order of worth,
and none begins when the minutes are over. `page` makes one page of what there is.

Legend: B models, P parameters, Q pictures.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import clock, machine, matmul_flops, turns
from benchmarks.networks import flops
from benchmarks.steps import paper_step, published_step, random_images, stepper, training_of
from benchmarks.zoos import random_models
from distrecon import config as configuration
from distrecon.autoencoder import PAPER, AutoencoderConfig, Batch, Training, ZooSample
from distrecon.autoencoder.tasks import run_tasks
from distrecon.images import ImageSet, load
from distrecon.nets import Architecture, architecture, evaluate, fit, initialise, inputs_for
from distrecon.zoos.models import Models

Result = dict[str, Any]
PRECISIONS = ("float32", "tf32", "bf16")
TERMS = ("C+S+B", "C+S", "C+B")  # the paper's table
TABLE = {
    "reconstruct/agreement": "agreement",
    "reconstruct/accuracy_mean": "accuracy of reconstructions",
    "generate/accuracy_mean": "accuracy of new models",
    "generate/accuracy_max": "the best",
    "predict/test_accuracy_r2": "R2 of test accuracy",
}


@dataclass
class Setting:
    """Where and how large; `until` is when no part may begin any more."""

    device: torch.device
    out: Path
    quick: bool
    images: tuple[str, Path | None]
    until: float

    @property
    def synchronous(self) -> Callable[[], float]:
        return clock(self.device)

    def share(self, part: float) -> float:
        """When a part should end that takes this share of what is left."""
        now = time.monotonic()
        return now + part * max(0.0, self.until - now)


# -- correctness ------------------------------------------------------------------------------------------------------


def small(precision: str, **values: object) -> AutoencoderConfig:
    """The paper's kind of training in a small size."""
    size = {"model.width": 64, "model.layers": 2, "data.query_pool": 128, "data.queries": 64, "optim.lr": 1e-3}
    return configuration.replace(AutoencoderConfig(), PAPER | size | {"optim.precision": precision, **values})


def _sample(setting: Setting, models: int) -> ZooSample:
    arch = architecture("cnn_small" if setting.quick else "cnn3")
    images = random_images(arch) if arch.input_shape[0] == 3 else load("digits")
    return ZooSample(arch, random_models(arch, models), images)


def _batch(sample: ZooSample, number: int) -> Batch:
    models = len(sample.sample_BP)
    return Batch(0, number, 0, torch.arange(models), sample.sample_BP, models, 0)


def _first_step(config: AutoencoderConfig, sample: ZooSample, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """The losses of the first step and its gradient, in float64 on the CPU."""
    training = Training(replace(config, optim=replace(config.optim, clip=0.0)), [sample], 10, device)
    losses = training.step(_batch(sample, 0))
    if training.flat:
        gradient = training.flat.vector.grad
        assert gradient is not None
        return losses, gradient.double().cpu()
    return losses, torch.cat([_gradient(p).flatten().double() for p in training.autoencoder.parameters()]).cpu()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def losses_and_gradients(setting: Setting) -> Result:
    """Of one step, against float64 on the CPU: relative errors of each loss and of the whole gradient."""
    sample, cpu = _sample(setting, 8), torch.device("cpu")
    expected, exact = _first_step(small("float64"), sample, cpu)
    rows = []
    for precision in PRECISIONS:
        found, gradient = _first_step(small(precision), sample, setting.device)
        errors = {name: abs(found[name] / value - 1) for name, value in expected.items()}
        rows.append({"precision": precision, **errors, "gradient": float((gradient - exact).norm() / exact.norm())})
    return {"rows": rows}


def one_training(setting: Setting) -> Result:
    """The same small training on the device and in float64 on the CPU: losses at its end."""
    sample, steps = _sample(setting, 16), 10 if setting.quick else 60
    rows = []
    for precision, device in (("float64", torch.device("cpu")), *((p, setting.device) for p in PRECISIONS)):
        training = Training(small(precision), [sample], steps, device)
        history = [losses for _, losses in training.steps(_batch(sample, number) for number in range(steps))]
        rows.append({"precision": precision, **history[-1]})
    return {"steps": steps, "rows": rows}


# -- speed ------------------------------------------------------------------------------------------------------------


def step_times(setting: Setting) -> Result:
    """A step at the paper's size: seconds, peak memory, share of the rate of a large product in the same type."""
    models = 4 if setting.quick else 64
    arch, rows = architecture("cnn3"), []
    for precision in PRECISIONS:
        step = _step(setting, models, precision)
        step()
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median(turns({"": step}, 2 if setting.quick else 10, setting.synchronous)[""])
        row = {"precision": precision, "seconds": seconds}
        if setting.device.type == "cuda":
            peak = matmul_flops(setting.device, torch.bfloat16 if precision == "bf16" else torch.float32)
            # originals forward, reconstructions forward and backward
            row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
            row |= {"networks_share_of_peak": 4 / 3 * flops(arch, models, 256) / seconds / peak}
        rows.append(row)
    return {"models": models, "rows": rows}


def _step(setting: Setting, models: int, precision: str, compiled: bool = False) -> Callable[[], object]:
    if setting.quick:  # the paper's would take a CPU minutes
        return stepper(training_of(False, models, setting.device, precision=precision))
    return paper_step(models, precision, setting.device, compiled)


def published(setting: Setting) -> Result:
    """A step in the published way, models as checkpoints, with the same autoencoder."""
    models = 4 if setting.quick else 64
    training = training_of(not setting.quick, models, setting.device)
    zoo = training.zoos[0]
    step = published_step(
        training.config, zoo.architecture, training.autoencoder, training.pools[0], zoo.sample_BP.to(setting.device)
    )
    seconds = turns({"": step}, 1 if setting.quick else 3, setting.synchronous)[""]
    return {"models": models, "rows": [{"precision": "float32", "seconds": median(seconds)}]}


def compiled(setting: Setting) -> Result:
    """The paper's step with the transformer by torch.compile."""
    if setting.quick:
        return {"rows": []}
    rows = []
    for precision in ("tf32", "bf16"):
        began = time.monotonic()
        step = _step(setting, 64, precision, compiled=True)
        step()
        first = time.monotonic() - began
        seconds = median(turns({"": step}, 10, setting.synchronous)[""])
        rows.append({"precision": precision, "seconds": seconds, "first_step_seconds": first})
    return {"models": 64, "rows": rows}


# -- a zoo, and autoencoders on it ------------------------------------------------------------------------------------


def _pictures(setting: Setting) -> tuple[Architecture, ImageSet]:
    images = load(*setting.images)
    channels, size, _ = images.train.images.shape[1:]
    if setting.quick:
        return architecture("cnn_small"), images
    return architecture("cnn3", in_channels=channels, image_size=size, num_classes=len(images.classes)), images


def zoo(setting: Setting) -> Result:
    """Hundreds of networks on the pictures given, trained at once, with a state after each epoch; kept in a file."""
    arch, images = _pictures(setting)
    models, epochs = (12, 2) if setting.quick else (256, 25)
    train, test = ((inputs_for(arch, p.images).to(setting.device), p.labels_Q) for p in (images.train, images.test))
    theta_BP = initialise(arch, ["kaiming_uniform"] * models, range(models)).to(setting.device)
    lr_B = 10 ** torch.linspace(-3.7, -2.7, models)[torch.randperm(models, generator=torch.Generator().manual_seed(0))]
    states: list[Result] = []
    began, until = setting.synchronous(), setting.share(0.4)
    passes = fit(arch, theta_BP, train[0], train[1].to(setting.device), epochs=epochs, lr_B=lr_B, batch_size=128)
    for epoch in passes:
        seconds = setting.synchronous() - began
        on_train, on_test = (
            evaluate(arch, epoch.theta_BP, *part) for part in ((train[0][:5000], train[1][:5000]), test)
        )
        states.append(
            {
                "theta_BP": epoch.theta_BP.cpu().clone(),
                "train_accuracy_B": on_train.accuracy_B.cpu(),
                "test_accuracy_B": on_test.accuracy_B.cpu(),
                "train_loss_B": epoch.loss_B.cpu(),
            }
        )
        if time.monotonic() > until:
            break
    torch.save(states, setting.out / "zoo.pt")
    last = states[-1]["test_accuracy_B"]
    rate = models * len(states) * len(train[0]) / seconds
    return {
        "rows": [
            {
                "images": setting.images[0],
                "models": models,
                "epochs": len(states),
                "seconds": seconds,
                "pictures_per_second": rate,
                "models_per_second": models / seconds,
                "accuracy_mean": float(last.mean()),
                "accuracy_max": float(last.max()),
            }
        ]
    }


def _splits(setting: Setting) -> Iterator[Models]:
    """Training, validation and test models, 70, 15 and 15 of a hundred, each with the states of the last epochs."""
    states = torch.load(setting.out / "zoo.pt", weights_only=True)
    count = len(states[0]["theta_BP"])
    epochs = [*enumerate(states, 1)][-(2 if setting.quick else 5) :]
    borders = [0, round(0.7 * count), round(0.85 * count), count]
    for a, b in pairwise(borders):
        columns = {name: torch.cat([state[name][a:b] for _, state in epochs]) for name in states[0]}
        yield Models(
            columns["theta_BP"],
            [f"m{i}" for _ in epochs for i in range(a, b)],
            torch.cat([e * count + torch.arange(a, b) for e, _ in epochs]),
            torch.cat([torch.full((b - a,), e) for e, _ in epochs]),
            columns["train_accuracy_B"],
            columns["test_accuracy_B"],
            columns["train_accuracy_B"] - columns["test_accuracy_B"],
            columns["train_loss_B"],
        )


def table(setting: Setting, terms: str, left: int) -> Result:
    """One line of the paper's table: an autoencoder with these losses on the zoo, scored on its test models."""
    arch, images = _pictures(setting)
    train, validation, test = _splits(setting)
    size = {"model.width": 16, "model.layers": 1, "model.heads": 2, "data.query_pool": 64, "data.queries": 16}
    values = (PAPER | size if setting.quick else PAPER) | {
        "loss.terms": terms,
        "optim.precision": "bf16",
        "optim.lr": 1e-4,  # few epochs: the paper's 1e-5 is for a hundred
        "optim.batch_size": 8 if setting.quick else 64,
        "tasks.samples": 4 if setting.quick else 100,
        "tasks.pairs": 3,
    }
    config = configuration.replace(AutoencoderConfig(), values)
    batch_size = config.optim.batch_size
    per_epoch = -(-len(train) // batch_size)
    epochs = 1 if setting.quick else 100
    began, until = time.monotonic(), setting.share(0.8 / left)
    training = Training(config, [ZooSample(arch, train.theta_BP, images)], epochs * per_epoch, setting.device)
    for epoch in range(epochs):
        for _, losses in training.steps(_epoch(train, batch_size, epoch)):
            last = losses
        if time.monotonic() > until:
            break
    trained = time.monotonic() - began
    began = time.monotonic()
    on_device = images.on(setting.device)
    metrics = run_tasks(training.autoencoder, train, validation, test, on_device, config).metrics
    times = {"training_seconds": trained, "scoring_seconds": time.monotonic() - began}
    return {"rows": [{"losses": terms, "epochs": epoch + 1, **times, **last, **{k: metrics[k] for k in TABLE}}]}


def _epoch(models: Models, size: int, epoch: int) -> Iterator[Batch]:
    order = torch.randperm(len(models), generator=torch.Generator().manual_seed(epoch))
    parts = order.split(size)
    for step, rows in enumerate(parts):
        yield Batch(
            epoch, step, 0, models.row_B[rows], models.theta_BP[rows], len(rows), 0, last=step + 1 == len(parts)
        )


# -- all parts ---------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[str, Callable[[Setting], Result]]] = {
    "correctness": ("Losses and gradient of a step, relative errors against float64 on the CPU", losses_and_gradients),
    "step": ("A step at the paper's size", step_times),
    "published": ("The same step in the published way", published),
    "training": ("A small training, its losses at the end", one_training),
    "zoo": ("A zoo", zoo),
    **{
        f"table-{terms}": (f"The paper's table, {terms}", partial(table, terms=terms, left=len(TERMS) - i))
        for i, terms in enumerate(TERMS)
    },
    "compiled": ("The step by torch.compile", compiled),
}


def measure(setting: Setting) -> list[str]:
    """Does what is not there yet while there is time; returns the names of what is still missing."""
    setting.out.mkdir(parents=True, exist_ok=True)
    missing = []
    for name, (title, work) in PARTS.items():
        file = setting.out / f"{name}.json"
        if file.exists():
            continue
        if time.monotonic() > setting.until:
            missing.append(name)
            continue
        print(f"{title} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        found = work(setting) | {"title": title, "quick": setting.quick, "machine": machine(setting.device)}
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(found | {"seconds": time.monotonic() - began}, indent=1))
        unfinished.replace(file)
        (setting.out / "page.md").write_text(page(setting.out))
    return missing


def page(out: Path) -> str:
    """Everything that was measured, a table a part."""
    texts = []
    for name in PARTS:
        if (file := out / f"{name}.json").exists():
            found = json.loads(file.read_text())
            on = ", ".join(str(value) for value in found["machine"].values())
            sizes = "small sizes; " if found["quick"] else ""
            texts.append(f"## {found['title']}\n\n{_table(found['rows'])}\n\n({sizes}{on}; {found['seconds']:.0f} s)\n")
    return "# Measured on this device\n\n" + "\n".join(texts)


def _table(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return "Not measured."
    head = list(rows[0])
    lines = [[TABLE.get(name, name.replace("_", " ")) for name in head], ["---"] * len(head)]
    lines += [[f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in head] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
