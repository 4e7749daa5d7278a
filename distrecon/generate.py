"""python -m distrecon.generate: new models from a trained autoencoder, each as a state dict, with their accuracies."""

import argparse
import dataclasses
import json
import sys
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from distrecon import console, recording
from distrecon.autoencoder.config import TasksConfig
from distrecon.autoencoder.generate import Sources, generate_models
from distrecon.autoencoder.model import Autoencoder
from distrecon.autoencoder.samplers import SAMPLERS
from distrecon.autoencoder.scoring import zoo_index
from distrecon.autoencoder.tasks import encode_models
from distrecon.config import flatten
from distrecon.errors import UserError
from distrecon.kinds.autoencoder import KIND, load_autoencoder, zoo_folder
from distrecon.nets import Architecture, evaluate
from distrecon.record.artifacts import ARRAYS
from distrecon.record.folder import RunFolder, check_absent
from distrecon.zoos import Zoo, open_zoo

EXAMPLES = """examples:
  python -m distrecon.generate --autoencoder runs/20260101-120000-train --count 100
  python -m distrecon.generate --autoencoder runs/20260101-120000-train --count 20 --sampler gaussian --refine 10
"""


def parser() -> console.Parser:
    parser = console.Parser(
        prog="distrecon.generate",
        description="Sample new models. Writes models/<number>.safetensors, which plain torch loads, and summary.json.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--autoencoder", required=True, metavar="RUN", help="a run folder, or an autoencoder's own")
    parser.add_argument("--zoo", help="zoo whose good training models are sampled around (default: the run's)")
    parser.add_argument("--images", metavar="DIR", help="where the zoo's images lie, if not in the zoo")
    parser.add_argument("--count", type=int, default=10, help="models to make (default: 10)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the one the autoencoder was configured with")
    parser.add_argument(
        "--bandwidth", type=float, help="width of the sampler's kernel; larger is more novel, less accurate"
    )
    parser.add_argument("--refine", type=int, help="steps on each latent towards good models' averaged outputs")
    console.module_option(parser)
    console.common_options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    check_absent(args.out)
    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    autoencoder = load_autoencoder(args.autoencoder)
    zoo = open_zoo(args.zoo or zoo_folder(args.autoencoder), images=args.images, module=args.module)
    index, arch = zoo_index(autoencoder, zoo), zoo.architecture
    changes = {"samples": max(2, args.count), "bandwidth": args.bandwidth, "generate_refine": args.refine}
    tasks = dataclasses.replace(autoencoder.config.tasks, **{k: v for k, v in changes.items() if v is not None})
    seed = args.seed if args.seed is not None else autoencoder.config.seed
    sampler = args.sampler or tasks.samplers[0]
    request = {"autoencoder": str(args.autoencoder), "zoo": str(zoo.store), "sampler": sampler, "seed": seed}

    def work(folder: RunFolder) -> recording.Result:
        theta_MP, accuracy_M, milliseconds = generate(autoencoder, zoo, index, tasks, sampler, seed, args.count)
        models = _write(folder, arch, theta_MP, accuracy_M)
        metrics = {
            "generate/accuracy_mean": float(accuracy_M.mean()),
            "generate/accuracy_max": float(accuracy_M.max()),
            "generate/ms_per_model": milliseconds,
        }
        return recording.Result(
            metrics, {**request, "architecture": arch.to_dict(), "metrics": metrics, "models": models}
        )

    outcome = recording.record(
        RunFolder.create(args.out, "generate", request),
        "generate",
        KIND,
        "generate/accuracy_mean",
        "max",
        {"sampler": sampler, "count": args.count},
        recording.Provenance(seed, args.smoke, request, {str(zoo.store): zoo}),
        work,
        settings={**request, **{f"tasks.{key}": value for key, value in flatten(tasks).items()}},
    )
    metrics = outcome.sweeps[0].trials[recording.TRIAL].metrics
    mean, best = metrics["generate/accuracy_mean"], metrics["generate/accuracy_max"]
    text = (
        f"{args.count} models of {arch.name}: test accuracy {mean:.3f} mean, {best:.3f} best; "
        f"{metrics['generate/ms_per_model']:.2f} ms each\n\nmodels   {console.short(outcome.folder.models)}"
    )
    return recording.answer(outcome, args, "generate", text)


def generate(
    autoencoder: Autoencoder, zoo: Zoo, index: int, tasks: TasksConfig, sampler: str, seed: int, count: int
) -> tuple[Tensor, Tensor, float]:
    """New models theta[M, P] around the zoo's good training models, their test accuracies [M], milliseconds a model."""
    progress, images = console.Progress("generate"), zoo.images()
    progress.show(f"choosing the best of {zoo.name}'s training models")
    train = zoo.models("train")
    sources = Sources.make(zoo.architecture, train, encode_models(autoencoder, train, index), images, tasks.good)
    progress.show(f"{count} models around {len(sources.good_N)} good ones")
    theta_MP, milliseconds = generate_models(autoencoder, sources, images, tasks, sampler, seed, index)
    theta_MP = theta_MP[:count]
    accuracy_M = evaluate(zoo.architecture, theta_MP, images.test.images, images.test.labels_Q).accuracy_B
    progress.done(f"{len(theta_MP)} models")
    return theta_MP, accuracy_M, milliseconds


def _write(folder: RunFolder, arch: Architecture, theta_MP: Tensor, accuracy_M: Tensor) -> list[dict[str, Any]]:
    """Writes the models, and their accuracies for the figure; returns each one's file and accuracy."""
    models = []
    for number, (theta_P, accuracy) in enumerate(zip(theta_MP, accuracy_M.tolist(), strict=True)):
        file = folder.models / f"{number:05d}.safetensors"
        save_file(arch.unflatten(theta_P), file, {"architecture": arch.name, "description": json.dumps(arch.to_dict())})
        models.append({"file": f"models/{file.name}", "test_accuracy": accuracy})
    np.savez_compressed(folder.models / ARRAYS, allow_pickle=False, **{"generate/accuracy": accuracy_M.numpy()})  # type: ignore[arg-type]
    return models


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
