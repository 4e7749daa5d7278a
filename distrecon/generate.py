"""python -m distrecon.generate: new models from a trained autoencoder, each as a state dict, with their accuracies."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distrecon import console, runs
from distrecon.autoencoder.generate import best_states, generate_models, top
from distrecon.autoencoder.samplers import SAMPLERS
from distrecon.autoencoder.scoring import zoo_index
from distrecon.autoencoder.tasks import encode_models
from distrecon.errors import UserError
from distrecon.nets import evaluate
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
    parser.add_argument("--count", type=int, default=10, help="models to make (default: 10)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the one the autoencoder was configured with")
    parser.add_argument(
        "--bandwidth", type=float, help="width of the sampler's kernel; larger is more novel, less accurate"
    )
    parser.add_argument("--refine", type=int, help="steps on each latent towards good models' averaged outputs")
    console.common_options(parser)
    return parser


def run(args: argparse.Namespace) -> console.Answer:
    runs.check_absent(args.out)
    if args.count < 1:
        raise UserError(f"--count must be at least 1, not {args.count}")
    autoencoder = runs.load_autoencoder(args.autoencoder)
    zoo = open_zoo(args.zoo or _zoo_of(args.autoencoder))
    index, arch, images = zoo_index(autoencoder, zoo), zoo.architecture, zoo.images()
    changes = {"samples": max(2, args.count), "bandwidth": args.bandwidth, "generate_refine": args.refine}
    tasks = dataclasses.replace(autoencoder.config.tasks, **{k: v for k, v in changes.items() if v is not None})
    seed = args.seed if args.seed is not None else autoencoder.config.seed
    progress = console.Progress("generate")
    progress.show(f"choosing the best of {zoo.name}'s training models")
    train = zoo.models("train")
    good_N = top(best_states(arch, train, images), tasks.good)
    z_N = encode_models(autoencoder, train, index)[good_N]
    sampler = args.sampler or tasks.samplers[0]
    progress.show(f"{args.count} models around {len(good_N)} good ones")
    theta_MP, milliseconds = generate_models(
        autoencoder, train.theta_BP[good_N], z_N, images, tasks, sampler, seed, index
    )
    theta_MP = theta_MP[: args.count]
    accuracy_M = evaluate(arch, theta_MP, images.test.images, images.test.labels_Q).accuracy_B
    progress.done(f"{len(theta_MP)} models")
    request = {"autoencoder": str(args.autoencoder), "zoo": str(zoo.store), "sampler": sampler, "seed": seed}
    folder = runs.create(args.out, "generate", request)
    summary = _write(folder, zoo, theta_MP, accuracy_M, request, milliseconds)
    accuracy = f"test accuracy {float(accuracy_M.mean()):.3f} mean, {float(accuracy_M.max()):.3f} best"
    text = (
        f"{len(theta_MP)} models of {arch.name}: {accuracy}; {milliseconds:.2f} ms each\n"
        f"models   {console.short(folder / 'models')}\nnumbers  {console.short(folder / 'summary.json')}"
    )
    return console.Answer(console.DONE, text, {"folder": str(folder), **summary})


def _zoo_of(run: str) -> str:
    """The folder of the zoo that a run's autoencoder was trained on; UserError when it has to be named."""
    if run.startswith(runs.MLFLOW_RUN) or not (Path(run) / "summary.json").exists():
        raise UserError(f"{run} does not tell its zoo: name one with --zoo")
    zoos = runs.read_summary(Path(run))["zoos"]
    if len(zoos) != 1:
        raise UserError(f"{run} was trained on {len(zoos)} zoos: name one with --zoo")
    return next(iter(zoos.values()))["path"]


def _write(
    folder: Path, zoo: Zoo, theta_MP: torch.Tensor, accuracy_M: torch.Tensor, request: dict, milliseconds: float
) -> dict[str, Any]:
    (folder / "models").mkdir()
    models = []
    for number, (theta_P, accuracy) in enumerate(zip(theta_MP, accuracy_M.tolist(), strict=True)):
        name = f"models/{number:05d}.safetensors"
        save_file(zoo.architecture.unflatten(theta_P), folder / name, {"architecture": zoo.architecture.name})
        models.append({"file": name, "test_accuracy": accuracy})
    metrics = {
        "generate/accuracy_mean": float(accuracy_M.mean()),
        "generate/accuracy_max": float(accuracy_M.max()),
        "generate/ms_per_model": milliseconds,
    }
    architecture = zoo.architecture.to_dict()
    summary = {**request, "architecture": architecture, "metrics": metrics, "models": models}
    runs.write_json(folder / "summary.json", summary)
    return summary


def main(argv: list[str] | None = None) -> int:
    return console.run_command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
