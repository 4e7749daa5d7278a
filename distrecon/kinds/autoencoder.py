"""Autoencoder trials: a weight autoencoder is trained on zoos by Ray Train and scored on the three tasks.

`run` and what it needs of the cluster, the metrics, the report's figures, and loading what a trial left.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distrecon.autoencoder.model import Autoencoder
from distrecon.autoencoder.predict import PROPERTIES, predicted
from distrecon.autoencoder.probes import JSON as PROBES
from distrecon.autoencoder.probes import Probes, load_probes
from distrecon.autoencoder.store import load_autoencoder as load_folder
from distrecon.cluster.scoring import score_autoencoder
from distrecon.cluster.training import AutoencoderRun, train_autoencoder
from distrecon.errors import UserError, reading
from distrecon.nets import Architecture, ModuleArchitecture, outputs
from distrecon.record.folder import RunFolder
from distrecon.record.journal import SweepRecord
from distrecon.record.kind import Arrays, Drawing, Kind, Metric, Needs, Served, Trial, percent, two_digits
from distrecon.report import place, spaces, tables
from distrecon.zoos.storage import inside

DRIVER_CPUS = 0.01  # what a trial's own process takes; Ray Train reserves its workers' CPUs and GPUs itself
MLFLOW_RUN = "runs:/"


def run(config: AutoencoderRun, trial: Trial) -> Mapping[str, Any]:
    """Trains one autoencoder, whose own reports become the trial's, and scores it on the first zoo."""
    zoos = [trial.zoos[name] for name in config.zoo]
    train_autoencoder(config, zoos, trial.storage, trial.name, in_trial=True)
    return {"epoch": config.epochs} | score_autoencoder(config, zoos[0], f"{trial.storage}/{trial.name}")


def needs(config: AutoencoderRun) -> Needs:
    """All data-parallel workers, or as few as an elastic training goes on with."""
    resources = config.resources
    workers = max(1, resources.num_workers)
    least = resources.min_workers or workers
    each = {"CPU": resources.cpus_per_worker, **({"GPU": resources.gpus_per_worker} if resources.use_gpu else {})}
    whole = {name: workers * amount for name, amount in each.items()}
    return Needs({"CPU": DRIVER_CPUS}, whole, {name: least * amount for name, amount in each.items()})


# -- what a trial left ------------------------------------------------------------------------------------------------


def load_autoencoder(path: str | Path) -> Autoencoder:
    """An autoencoder, on the CPU: of a run folder (the best trial's), of a folder that `save_autoencoder` wrote, or of
    an MLflow run, `runs:/RUN_ID` (a sweep's run gives its best trial's; the store is MLFLOW_TRACKING_URI, or mlflow.db
    here). Raises UserError when there is none."""
    return load_folder(autoencoder_folder(path))


def autoencoder_folder(path: str | Path) -> Path:
    """Where the autoencoder of a run lies: the folder itself, or the best trial's of its first autoencoder sweep; of an
    MLflow run a copy of it.

    Raises UserError when there is none.
    """
    if str(path).startswith(MLFLOW_RUN):
        from distrecon.record.tracking import model_folder

        return model_folder(str(path).removeprefix(MLFLOW_RUN))
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run of distrecon.train or distrecon.tune")
    folder = RunFolder(path)
    for home in (path, folder.models):
        if (home / "autoencoder.json").exists():
            return home
    with reading(folder.summary):
        sweeps = [s for s in folder.read_summary().get("sweeps", ()) if s["kind"] == KIND.name and s["best"]]
        for sweep in sweeps:
            if not inside(trial := f"{sweep['name']}/{sweep['best']}"):
                raise ValueError(f"{trial!r} leads out of the run")
            best = folder.models / trial
            if (best / "autoencoder.json").exists():  # a run of distrecon.generate leaves models only
                return best
    raise UserError(f"{path}: this run trained no autoencoder; name a run of distrecon.train or distrecon.tune")


def zoo_folder(path: str) -> str:
    """The folder of the zoo that a run's autoencoder was trained on; UserError when it has to be named."""
    folder = RunFolder(Path(path))
    if path.startswith(MLFLOW_RUN) or not folder.summary.exists():
        raise UserError(f"the zoo of {path} is not known from it: name one with --zoo")
    with reading(folder.summary):
        zoos = folder.read_summary()["zoos"]
        if len(zoos) != 1:
            raise UserError(f"{path} was trained on {len(zoos)} zoos: name one with --zoo")
        return str(next(iter(zoos.values()))["path"])


def serve(folder: Path) -> Served | None:
    """The autoencoder of a trial's files, or the networks that `distrecon.generate` made."""
    if (folder / "autoencoder.json").exists():
        probes = load_probes(folder) if (folder / PROBES).exists() else None
        return _serve_autoencoder(load_folder(folder), probes)
    networks = sorted(folder.glob("[0-9]*.safetensors"))
    return _serve_networks(networks) if networks else None


def _serve_autoencoder(autoencoder: Autoencoder, probes: Probes | None) -> Served:
    """Weights [B, P] to latents [B, Z] (`task` encode), back (decode), or to their reconstructions (reconstruct).

    Or to what the probes say of them (predict): [B, 3], test accuracy, generalisation gap and epoch, NaN where the zoo
    it was scored on has no such probe.
    """

    @torch.no_grad()
    def call(array: np.ndarray, task: str = "reconstruct", zoo: int = 0) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        shape = autoencoder.latent_shape(zoo)
        if task == "encode":
            return autoencoder.encode(rows, zoo).flatten(1).numpy()
        if task == "decode":
            return autoencoder.decode(rows.view(len(rows), *shape), zoo).numpy()
        if task == "reconstruct":
            return autoencoder.decode(autoencoder.encode(rows, zoo), zoo).numpy()
        if task == "predict":
            if probes is None or probes.zoo != zoo:
                raise UserError(f"there are no probes of zoo {zoo}: the autoencoder was not scored on it")
            found = predicted(autoencoder, probes, rows)
            return np.stack([found.get(name, np.full(len(rows), np.nan)) for name in PROPERTIES], axis=1)
        raise UserError(f"task is encode, decode, reconstruct or predict, not {task!r}")

    example = autoencoder.fitted(0, "reference_P")[None].float().numpy()
    return Served(autoencoder, call, example, {"task": "reconstruct", "zoo": 0})


def _serve_networks(files: Sequence[Path]) -> Served | None:
    """Inputs [Q, ...] to the outputs [Q, O] of one of the networks, `number` in the order of the files.

    None for a torch module's state dicts: what runs them is the user's code, which no file brings along.
    """
    with safe_open(files[0], "pt") as first:
        arch = Architecture.from_dict(json.loads(first.metadata()["description"]))
    if isinstance(arch, ModuleArchitecture):
        return None
    theta_BP = torch.stack([arch.flatten(load_file(file)) for file in files])

    @torch.no_grad()
    def call(array: np.ndarray, number: int = 0) -> np.ndarray:
        inputs = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        return outputs(arch, theta_BP[number : number + 1], inputs)[0].numpy()

    return Served(theta_BP, call, np.zeros((1, *arch.input_shape), dtype=np.float32), {"number": 0})


# -- figures ----------------------------------------------------------------------------------------------------------

LOSSES = ("loss/contrastive", "loss/structural", "loss/behavioral")
NOVELTY = {  # prefix of the metrics -> name; the sampler's own points are named by their trial
    "generate/": None,
    "generate/baseline_heldout/": "held-out good models",
    "generate/baseline_noise/": "noise on a model",
    "generate/baseline_average/": "average of two",
}


def losses(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    curves = {loss.split("/")[1]: _curves(sweep, loss) for loss in LOSSES}
    curves = {loss: trials for loss, trials in curves.items() if trials}
    if not curves:
        return None
    ends = "; ".join(
        f"{loss}: "
        + ", ".join(f"{trial} {points[0][1]:.2g} to {points[-1][1]:.2g}" for trial, points in trials.items())
        for loss, trials in curves.items()
    )
    return Drawing(
        "losses",
        "Losses by epoch",
        "Each loss over the training models, before scaling; a trial appears where it trains that loss. "
        f"From the first to the last epoch: {ends}.",
        figures.losses_by_epoch(curves),
    )


def _curves(sweep: SweepRecord, metric: str) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for trial in sweep.trials.values():
        points = [(e, m[metric]) for e, m in sorted(trial.epochs.items()) if isinstance(m.get(metric), int | float)]
        if points:
            curves[tables.label(trial.config)] = points
    return curves


def accuracies(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    groups: dict[str, dict[str, np.ndarray]] = {}
    for trial, values in arrays.items():
        if "generate/accuracy" not in values:
            continue
        sets = groups[tables.label(sweep.trials[trial].config)] = {}
        if "reconstruct/accuracy" in values:
            sets["original"], sets["reconstructed"] = values["reconstruct/accuracy"]
        sets["generated"] = values["generate/accuracy"]
    if not groups:
        return None
    means = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {np.mean(v):.2f}" for kind, v in sets.items()) for name, sets in groups.items()
    )
    return Drawing(
        "accuracies",
        "Accuracy of original, reconstructed and generated models",
        f"One point a model, a line at each mean. Means: {means}.",
        figures.accuracy_distributions(groups),
    )


def novelty(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    points: dict[str, list[tuple[float, float]]] = {}
    for prefix, name in NOVELTY.items():
        for trial in sweep.trials.values():
            at, accuracy = (trial.metrics.get(f"{prefix}{m}") for m in ("novelty", "accuracy_mean"))
            if isinstance(at, float) and isinstance(accuracy, float):
                points.setdefault(name or tables.label(trial.config), []).append((at, accuracy))
    if not points:
        return None
    points = {name: list(dict.fromkeys(values)) for name, values in points.items()}
    numbers = "; ".join(f"{name}: {values[0][1]:.2f} at {values[0][0]:.2f}" for name, values in points.items())
    return Drawing(
        "novelty",
        "Accuracy against novelty of generated models",
        "Novelty is the aligned distance to the nearest training model, 1 where a held-out good model lies. "
        "Noise on a training model and averages of two are the baselines that a generator has to beat. "
        f"Mean accuracy at novelty: {numbers}.",
        figures.accuracy_novelty(points),
    )


def gradients(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    best = sweep.best()
    found = arrays.get(best.trial, {}) if best else {}
    if best is None or "gradients/structural_share" not in found:
        return None
    shares = {kind: found[f"gradients/{kind}_share"] for kind in ("structural", "behavioral")}
    cosines = {
        "predicted with behavioral": found["gradients/predicted_cosine"],
        "structural with behavioral": found["gradients/structural_cosine"],
    }
    layers = [str(name) for name in found["layers"]]
    numbers = "; ".join(
        f"{name}: " + ", ".join(f"{layer} {v:.2f}" for layer, v in zip(layers, values, strict=True))
        for name, values in {**shares, **cosines}.items()
    )
    return Drawing(
        "gradients",
        f"What the losses ask of each layer ({tables.heading(sweep)} {tables.label(best.config)})",
        "Left, each layer's part of the norm of the structural and of the behavioural gradient, both with respect to "
        "the reconstructed weights, mean over held-out models. Right, the cosine of the behavioural gradient with its "
        f"first-order prediction and with the structural one. {numbers}.",
        figures.gradients(layers, shares, cosines),
    )


def agreement(sweep: SweepRecord, arrays: Arrays) -> Drawing | None:
    from distrecon.report import figures

    best = sweep.best()
    matrix = arrays.get(best.trial, {}).get("reconstruct/agreement_matrix") if best else None
    if best is None or matrix is None:
        return None
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    return Drawing(
        "agreement",
        f"Agreement of reconstructions with originals ({tables.heading(sweep)} {tables.label(best.config)})",
        "Share of test images on which two models predict the same class; a bright diagonal means that reconstructions "
        f"behave like their own originals. Mean {matrix.diagonal().mean():.2f} with the own original, "
        f"{others.mean():.2f} with the others.",
        figures.agreement(matrix),
    )


# -- the kind ---------------------------------------------------------------------------------------------------------

METRICS = (
    Metric("predict/test_accuracy_r2", "R2 acc", two_digits, "test accuracy predicted from the embedding (R2)"),
    Metric("predict/generalization_gap_r2", "R2 gap", two_digits, "generalisation gap predicted likewise (R2)"),
    Metric(
        "reconstruct/agreement",
        "agree",
        percent,
        "% of test images on which a reconstruction predicts as its original",
    ),
    Metric("reconstruct/agreement_on_errors", "err", percent, "the same where the original is wrong"),
    Metric(
        "reconstruct/own_nearest",
        "own",
        percent,
        "% of reconstructions that agree best with their own original; low means that many models became one",
    ),
    Metric("reconstruct/weight_l2", "L2", two_digits, "distance of a reconstruction's weights to its original's"),
    Metric("reconstruct/accuracy_mean", "rec", percent, "reconstructions' accuracy, mean, %"),
    Metric("reconstruct/accuracy_max", "max", percent, "the best one's"),
    Metric("generate/accuracy_mean", "gen", percent, "generated models' accuracy, mean, %"),
    Metric("generate/accuracy_max", "max", percent, "the best one's"),
    Metric(
        "reconstruct/output_mse", "", two_digits, "mean squared difference of reconstructions' and originals' outputs"
    ),
    Metric("loss/total", "", two_digits, "the training loss, mean of an epoch", every_epoch=True),
    *place.METRICS,
)

KIND = Kind(
    name="autoencoder",
    config_type=AutoencoderRun,
    run=run,
    metrics=METRICS,
    objective="reconstruct/agreement_on_errors",
    mode="max",
    smoke={
        "zoo": ["smoke"],
        "model.width": 16,
        "model.layers": 1,
        "model.heads": 2,
        "model.latent": 4,
        "model.fisher_models": 8,
        "optim.epochs": 2,
        "data.query_pool": 64,
        "data.queries": 32,
        "tasks.samples": 4,
    },
    figures=(
        losses,
        accuracies,
        spaces.reconstructions,
        spaces.agreement_by_code,
        spaces.latent_map,
        spaces.relatives,
        novelty,
        gradients,
        agreement,
        place.in_the_zoo,
    ),
    needs=needs,
    epochs=lambda config: config.epochs,
    reports_itself=True,
    serve=serve,
    offer=("The best autoencoder in Python", 'distrecon.load_autoencoder("{run}")'),
)
