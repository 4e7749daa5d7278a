"""Tables of the autoencoder on a zoo: python benchmarks/autoencoder_tables.py PART --zoo ZOO [--seeds N] [--out FILE].

Parts: `reconstruction` (kinds of coder, amortised and refined), `controls` (the same refinement in a random subspace
and from scratch), `losses` (the table of "Structure Is Not Enough" for five combinations), `generation` (accuracy
against novelty by compute budget, with baselines), `gradients` (predicted against autograd gradients). Nothing is
chosen on test models or test images. One thread, no Ray.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon import config as configuration
from distrecon.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Batch,
    Training,
    ZooSample,
    generate,
    gradients,
    run_tasks,
)
from distrecon.autoencoder.model import decode_latents, encode_models, statistics
from distrecon.autoencoder.reconstruct import compare
from distrecon.autoencoder.refine import refine, refine_to_originals
from distrecon.nets import initialise
from distrecon.zoos import open_zoo

Row = dict[str, Any]


class Zoo:
    """The three splits and images of a zoo folder."""

    def __init__(self, path: str) -> None:
        zoo = open_zoo(path)
        self.name, self.arch, self.images = zoo.name, zoo.architecture, zoo.images()
        self.train, self.validation, self.test = (zoo.models(split) for split in ("train", "val", "test"))


def train(zoo: Zoo, values: Mapping[str, Any], seed: int = 0) -> tuple[Autoencoder, float]:
    """One training in this process; the autoencoder and its CPU seconds."""
    config = configuration.replace(AutoencoderConfig(), {**values, "seed": seed})
    size, count = config.optim.batch_size, len(zoo.train)
    steps = count // size
    start = time.process_time()
    sample = ZooSample(zoo.arch, zoo.train.theta_BP, zoo.images)
    training = Training(config, [sample], steps * config.optim.epochs)
    trained = config.model.kind != "fisher_pca"
    for epoch in range(config.optim.epochs if trained else 0):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for step, rows in enumerate(order[: steps * size].split(size)):
            training.step(Batch(epoch, step, 0, zoo.train.row_B[rows], zoo.train.theta_BP[rows], size, 0))
    return training.autoencoder.eval(), time.process_time() - start


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


def reconstruction(zoo: Zoo, seeds: int) -> list[Row]:
    """Coders amortised and refined, one seed after the other."""
    residual = {"model.kind": "fisher_residual", "loss.beta": 0.1, "optim.epochs": 4}
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "residual on Fisher, C+S+B": (residual, seeds),
        "Fisher PCA, untrained": ({"model.kind": "fisher_pca"}, 1),
        "transformer, C+S+B": ({}, seeds),
        "transformer, C+S": ({"loss.terms": "C+S"}, seeds),
        "residual on Fisher, C+S": (residual | {"loss.terms": "C+S"}, seeds),
        "Fisher PCA by layer, untrained": ({"model.kind": "fisher_pca", "model.fisher_blocks": "layer"}, 1),
    }
    rows: list[Row] = []
    for seed in range(seeds):
        for name, (values, repeats) in cases.items():
            if seed >= repeats:
                continue
            autoencoder, seconds = train(zoo, values, seed)
            original_BP = autoencoder.canonical(zoo.test.theta_BP, 0)
            for k in (0, 10) if seed or values.get("loss.terms") == "C+S" else (0, 10, 30):
                start = time.process_time()
                hat_BP = decode_latents(autoencoder, encode_models(autoencoder, zoo.test, refine=k))
                row = _compared(zoo, original_BP, hat_BP, name, k, start)
                rows.append(row | {"seed": seed, "training_seconds": seconds})
                _print(rows[-1])
    return rows


def controls(zoo: Zoo, seeds: int) -> list[Row]:
    """The same steps in a random subspace of the latent's size, and on all weights from a random initialisation."""
    arch, theta_BP, rows = zoo.arch, zoo.test.theta_BP, []
    latents = AutoencoderConfig().model.latent * arch.num_tokens
    draw = torch.Generator().manual_seed(0)
    basis_PZ = torch.linalg.qr(torch.randn(arch.num_parameters, latents, generator=draw))[0]
    plain = linear(zoo, torch.eye(arch.num_parameters), torch.zeros(arch.num_parameters))
    center_P = plain.standardise(zoo.train.theta_BP, 0).mean(0)
    scale = _scale(zoo)
    count = len(theta_BP)
    fresh_seeds = range(10_000, 10_000 + count)
    fresh_BP = plain.standardise(initialise(arch, ["kaiming_uniform"] * count, fresh_seeds, [scale] * count), 0)
    cases: dict[str, tuple[Autoencoder, Callable[[Autoencoder], Tensor], tuple[int, ...]]] = {
        "random subspace": (linear(zoo, basis_PZ, center_P), lambda a: a.encode(theta_BP), (0, 10, 30)),
        "student from scratch": (plain, lambda a: fresh_BP, (10, 30, 50, 100)),
    }
    for name, (autoencoder, first, steps) in cases.items():
        for k in steps:
            start = time.process_time()
            z = refine_to_originals(autoencoder, first(autoencoder), theta_BP, k, 0)
            rows.append(_compared(zoo, theta_BP, decode_latents(autoencoder, z), name, k, start))
            _print(rows[-1])
    return rows


def _scale(zoo: Zoo) -> float:
    """Initialisation scale whose weights have the deviation of the zoo's (small initialisations, or the paper's)."""
    first = initialise(zoo.arch, ["kaiming_uniform"] * 8, range(8))
    return min(1.0, float(zoo.train.theta_BP.std() / first.std()))


def _compared(zoo: Zoo, original_BP: Tensor, hat_BP: Tensor, name: str, steps: int, start: float) -> Row:
    milliseconds = 1000 * (time.process_time() - start) / len(hat_BP)
    metrics, _ = compare(zoo.arch, original_BP, hat_BP, zoo.images.test)
    return {"case": name, "refine": steps, "ms_per_model": milliseconds} | {
        key.removeprefix("reconstruct/"): value for key, value in metrics.items()
    }


def losses(zoo: Zoo, seeds: int) -> list[Row]:
    """Five combinations of losses, the plain transformer, equal epochs: the columns of the paper's two tables."""
    rows = []
    best = float(zoo.test.test_accuracy_B.max())
    for terms in ("C+S", "B", "C+B", "S+B", "C+S+B"):
        for seed in range(seeds):
            autoencoder, seconds = train(zoo, {"loss.terms": terms}, seed)
            found = run_tasks(autoencoder, zoo.train, zoo.validation, zoo.test, zoo.images).metrics
            tuned = generate.finetuned(zoo.arch, _samples(autoencoder, zoo), zoo.images, 5, seed)
            accuracy_M = generate.scores(zoo.arch, tuned, zoo.images.test).accuracy_B
            row = {"case": terms, "seed": seed, "training_seconds": seconds}
            for key in ("predict/test_accuracy_r2", "predict/generalization_gap_r2", "predict/epoch_r2"):
                row[key] = found[key]
            for key in ("agreement", "agreement_on_errors", "own_nearest", "accuracy_mean", "weight_l2"):
                row[f"reconstruct/{key}"] = found[f"reconstruct/{key}"]
            row["reconstructed best - zoo best"] = found["reconstruct/accuracy_max"] - best
            row["generated best - zoo best"] = found["generate/accuracy_max"] - best
            row["fine-tuned best - zoo best"] = float(accuracy_M.max()) - best
            row["generate/accuracy_mean"] = found["generate/accuracy_mean"]
            row["generate/novelty"] = found["generate/novelty"]
            row["baseline_statistics/test_accuracy_r2"] = found["predict/baseline_statistics/test_accuracy_r2"]
            rows.append(row)
            _print(row)
    return rows


def _samples(autoencoder: Autoencoder, zoo: Zoo) -> Tensor:
    config = autoencoder.config.tasks
    best_N = generate.top(generate.best_states(zoo.arch, zoo.train, zoo.images), config.good)
    z = encode_models(autoencoder, zoo.train)[best_N]
    theta_BP = zoo.train.theta_BP[best_N]
    return generate.generate_models(autoencoder, theta_BP, z, zoo.images, config, config.samplers[0])[0]


def generation(zoo: Zoo, seeds: int) -> list[Row]:
    """Accuracy against novelty for each compute budget: samplers, refinement, noise, averages, distilled students."""
    rows: list[Row] = []
    for seed in range(seeds):
        values = {"model.kind": "fisher_residual", "loss.beta": 0.1, "optim.epochs": 2}
        autoencoder, _ = train(zoo, values, seed)
        tasks = autoencoder.config.tasks
        best_N = generate.best_states(zoo.arch, zoo.train, zoo.images)
        good_N = generate.top(best_N, tasks.good)
        good_NP, z = zoo.train.theta_BP[good_N], encode_models(autoencoder, zoo.train)[good_N]
        judge = generate.Judge.make(zoo.arch, zoo.train, best_N, zoo.test, zoo.images, tasks)

        def report(name: str, theta_MP: Tensor, milliseconds: float, judge: Any = judge, seed: int = seed) -> None:
            rows.append({"case": name, "ms_per_model": milliseconds, "seed": seed} | judge(theta_MP)[0])
            _print(rows[-1])

        for sampler, bandwidth, steps, teachers, select in _generators(seed):
            settings = replace(tasks, bandwidth=bandwidth, generate_refine=steps, teachers=teachers, select=select)
            theta_MP, milliseconds = generate.generate_models(
                autoencoder, good_NP, z, zoo.images, settings, sampler, seed
            )
            name = f"{sampler} {bandwidth:g}"
            name += f", {steps} steps, {teachers} teachers" if steps else ""
            report(name + (f", best of {select}" if select > 1 else ""), theta_MP, milliseconds)
        std_P = autoencoder.get_buffer("statistics.0.std_P")
        for scale in (0.1, 0.2, 0.3, 0.5):
            report(f"weight noise {scale:g}", generate.noisy(good_NP, std_P, scale, tasks.samples, seed), 0.0)
        for share in (0.1, 0.25, 0.5):
            theta_MP = generate.averaged(zoo.arch, good_NP, tasks.samples, seed, share)
            report(f"average of two, share {share:g}", theta_MP, 0.0)
        for steps in (10, 30, 50, 100):
            report(f"scratch, distilled {steps} steps", *distilled(zoo, good_NP, steps, tasks.samples, seed))
        report("held-out good models", judge.heldout_BP, 0.0)
    return rows


def _generators(seed: int) -> list[tuple[str, float, int, int, int]]:
    """(sampler, bandwidth, refinement steps, teachers, select); the first seed runs the long list."""
    zero_shot = [("isotropic_kde", b, 0, 1, 1) for b in (0.1, 0.2, 0.3, 0.4, 0.5)]
    refined = [("isotropic_kde", b, k, 10, 1) for k in (10, 30) for b in (0.3, 0.4, 0.5)]
    if seed:
        return zero_shot + refined
    others = [("joint_kde", b, 0, 1, 1) for b in (0.1, 0.3, 0.5, 0.7)]
    others += [(s, 1.0, 0, 1, 1) for s in ("gaussian", "interpolation", "dimension_kde")]
    selected = [("isotropic_kde", b, 0, 1, 4) for b in (0.3, 0.4)]
    return zero_shot + selected + refined + [("isotropic_kde", b, 10, 3, 1) for b in (0.4, 0.5)] + others


def distilled(zoo: Zoo, good_NP: Tensor, steps: int, count: int, seed: int) -> tuple[Tensor, float]:
    """Randomly initialised models after `steps` Adam steps on all weights towards ten good models' averaged outputs."""
    plain = linear(zoo, torch.eye(zoo.arch.num_parameters), torch.zeros(zoo.arch.num_parameters))
    seeds = range(20_000 + 1000 * seed, 20_000 + 1000 * seed + count)
    fresh_MP = initialise(zoo.arch, ["kaiming_uniform"] * count, seeds, [_scale(zoo)] * count)
    targets_MQC = generate.teacher_targets(plain, good_NP, count, 10, seed, 0)
    start = time.perf_counter()
    z = refine(plain, plain.standardise(fresh_MP, 0), targets_MQC, steps, 0)
    return decode_latents(plain, z), 1000 * (time.perf_counter() - start) / count


def gradient_table(zoo: Zoo, seeds: int) -> list[Row]:
    """Cosine of predicted with autograd gradients as the reconstruction error is scaled; by layer at full error."""
    rows: list[Row] = []
    inputs = zoo.images.train.images[:128]
    cases: dict[str, dict[str, Any]] = {
        "residual on Fisher": {"model.kind": "fisher_residual", "optim.epochs": 2},
        "transformer": {"optim.epochs": 4},
    }
    for name, values in cases.items():
        autoencoder, _ = train(zoo, values)
        few = replace(zoo.test, theta_BP=zoo.test.theta_BP[:60])
        theta_BP = autoencoder.canonical(few.theta_BP, 0)
        hat_BP = decode_latents(autoencoder, encode_models(autoencoder, few))
        scales = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
        curve = gradients.cosine_curve(zoo.arch, theta_BP, hat_BP, inputs, scales)
        found = gradients.analyse(zoo.arch, theta_BP, hat_BP, inputs)
        rows.append({"case": name} | {f"delta x {s:g}": float(c) for s, c in zip(scales, curve, strict=True)})
        _print(rows[-1])
        for i, layer in enumerate(zoo.arch.layers):
            rows.append(
                {
                    "case": f"{name}, {layer.name}",
                    "predicted cosine": float(found.cosine_LB[i].mean()),
                    "structural cosine": float(found.structural_cosine_LB[i].mean()),
                    "structural share": float(
                        (found.structural_norm_LB[i] / found.structural_norm_LB.norm(dim=0)).mean()
                    ),
                    "behavioral share": float(
                        (found.behavioral_norm_LB[i] / found.behavioral_norm_LB.norm(dim=0)).mean()
                    ),
                }
            )
            _print(rows[-1])
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Mean and, over several seeds, deviation of each case."""
    grouped: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[(row["case"], row.get("refine"))].append(row)
    table = []
    for group in grouped.values():
        line = {key: value for key, value in group[0].items() if isinstance(value, str) or key == "refine"}
        for key in [k for k, v in group[0].items() if isinstance(v, float)]:
            line[key] = float(np.mean([row[key] for row in group]))
            if len(group) > 1:
                line[f"{key} +-"] = float(np.std([row[key] for row in group], ddof=1))
        table.append(line | {"seeds": len(group)})
    return table


def _print(row: Row) -> None:
    cells = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "case"]
    print(f"{row['case']}: " + ", ".join(cells), flush=True)


PARTS = {
    "reconstruction": reconstruction,
    "controls": controls,
    "losses": losses,
    "generation": generation,
    "gradients": gradient_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--zoo", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo(arguments.zoo)
    rows = PARTS[arguments.part](zoo, arguments.seeds)
    print(f"\n{arguments.part} on {zoo.name} ({len(zoo.test)} held-out states):")
    for row in summary(rows):
        _print(row)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"part": arguments.part, "zoo": zoo.name, "rows": rows, "summary": summary(rows)}, file, indent=1)


if __name__ == "__main__":
    main()
