"""Trains zoos: groups of models, each group vectorised in one program, groups spread over Ray as tasks.

Each task writes its own Parquet part into the zoo's folder and returns a few numbers, so the folder must be reachable
from every node (a shared disk or an object store, as Ray Train's storage path must be); nothing big passes the driver.
A later call trains only the groups that are missing (see `build.py`).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.images import ImageSet, load
from distrecon.nets import Architecture, evaluate, fit, initialise, inputs_for
from distrecon.zoos import build, datasets, tasks
from distrecon.zoos import format as zoo_format
from distrecon.zoos.seals import seals_of
from distrecon.zoos.settings import ModelPlan, ZooConfig, described, groups
from distrecon.zoos.storage import Store, store
from distrecon.zoos.writer import Writer, writing
from distrecon.zoos.zoo import Zoo, open_zoo


def ensure(
    config: ZooConfig,
    folder: str | os.PathLike[str] | Store,
    progress: build.Progress | None = None,
    resources: dict[str, Any] | None = None,
    store_images: bool | None = None,
) -> Zoo:
    """The zoo of this configuration at `folder`: opened if it is there, continued if it was begun, else trained.

    `resources` are Ray's for one task, e.g. `{"num_gpus": 0.5}`; one CPU by default. `store_images`: see `write_zoo`.
    Raises UserError when the folder holds a zoo of another configuration (naming the first key that differs).
    """
    where = folder if isinstance(folder, Store) else store(folder)
    if where.exists(zoo_format.MANIFEST):
        zoo = open_zoo(where, module=config.architecture.module)
        _check_same(where, zoo.info["origin"], config)
        return zoo
    images = load(config.images.name, config.images.directory, config.images.limit)
    arch = config.architecture.build(images)
    with writing(where) as writer:
        if writer.found is None:  # or another one has just finished it
            if (interrupted := build.begun(where)) is not None:
                _check_same(where, interrupted[1], config)
                build.go_on(writer, *interrupted)
            else:
                build.begin(writer, _origin(config))
            _train(config, arch, images, writer, progress, resources or {"num_cpus": 1}, store_images)
    zoo = open_zoo(where, module=config.architecture.module)
    _check_same(where, zoo.info["origin"], config)
    return zoo


def _origin(config: ZooConfig) -> dict[str, Any]:
    return {"kind": "trained", "config": described(config)}


def _check_same(where: Store, origin: dict[str, Any], config: ZooConfig) -> None:
    """Another place of the same images is no difference."""
    wanted = described(config)
    there = origin.get("config")
    if origin.get("kind") != "trained" or there is None:
        raise UserError(f"{where} holds a zoo that was not trained by distrecon: choose another folder")
    for key in [*wanted, *there]:
        if key != "images.directory" and wanted.get(key) != there.get(key):
            raise UserError(
                f"{where} holds a zoo with another configuration ({key} is {there.get(key)!r} there, "
                f"{wanted.get(key)!r} wanted): choose another folder, or delete it"
            )


@dataclass(frozen=True)
class Group:
    """The models of one task."""

    number: int
    models: tuple[ModelPlan, ...]


def _train(
    config: ZooConfig,
    arch: Architecture,
    images: ImageSet,
    writer: Writer,
    progress: build.Progress | None,
    resources: dict[str, Any],
    store_images: bool | None,
) -> None:
    where = writer.store
    every = [Group(number, tuple(models)) for number, models in enumerate(groups(config))]
    reports = build.run(every, train_group, writer, config, arch, images, progress=progress, resources=resources)
    parts = [zoo_format.Part(**report["part"]) for report in reports if report["part"]]
    unsealed = [part.file for part in parts if part.seal is None]  # written by an earlier version
    if not parts:
        raise UserError(f"every model of {config.name!r} diverged: lower grid.lr or grid.scale")
    entry = datasets.entry(where, images, config.images.directory, store_images, config.images.limit)
    zoo_format.commit(
        where,
        name=config.name,
        arch=arch,
        image_set=entry,
        parts=parts,
        origin=_origin(config),
        excluded=[excluded for report in reports for excluded in report["excluded"]],
        files=seals_of(where, [*unsealed, *where.names("history"), *datasets.files_of(entry)]),
        writer=writer,
    )
    build.finish(where)


def train_group(group: Group, where: Store, config: ZooConfig, arch: Architecture, images: ImageSet) -> dict[str, Any]:
    """Trains one group, writes its part and its history; the body of a Ray task."""
    torch.set_num_threads(1)
    states, history = _fit_group(group, config, arch, images)
    table, excluded = _keep_finite(group, config, arch, states)
    file = zoo_format.part_name(group.number)
    part = asdict(zoo_format.write_part(where, file, table)) if table.num_rows else None
    where.write(f"history/part-{group.number:05d}.parquet", zoo_format.to_parquet(history))
    return {"part": part, "excluded": excluded}


@dataclass(frozen=True)
class _Checkpoint:
    epoch: int
    theta_BP: Tensor
    train_accuracy_B: Tensor
    train_loss_B: Tensor
    test_accuracy_B: Tensor


def _fit_group(
    group: Group, config: ZooConfig, arch: Architecture, images: ImageSet
) -> tuple[list[_Checkpoint], pa.Table]:
    """The states at the checkpoint epochs, and every epoch's metrics."""
    device = tasks.assigned_device()
    parts = (images.train, images.validation, images.test)
    train, validation, test = ((inputs_for(arch, p.images).to(device), p.labels_Q.to(device)) for p in parts)
    models = group.models
    theta_BP = initialise(arch, [m.initialisation for m in models], [m.seed for m in models], [m.scale for m in models])
    checkpoints, history = [], []
    for epoch in fit(
        arch,
        theta_BP.to(device),
        *train,
        epochs=config.training.epochs,
        lr_B=torch.tensor([m.lr for m in models]),
        weight_decay_B=torch.tensor([m.weight_decay for m in models]),
        batch_size=config.training.batch_size,
        optimizer=config.training.optimizer,
        seed=_order_seed(config.seed, group.number),
    ):
        history.append(_history(models, epoch.epoch, epoch.loss_B, evaluate(arch, epoch.theta_BP, *validation)))
        if epoch.epoch in config.training.checkpoints:
            on_train, on_test = evaluate(arch, epoch.theta_BP, *train), evaluate(arch, epoch.theta_BP, *test)
            checkpoints.append(
                _Checkpoint(
                    epoch.epoch,
                    epoch.theta_BP.cpu().clone(),
                    on_train.accuracy_B.cpu(),
                    on_train.loss_B.cpu(),
                    on_test.accuracy_B.cpu(),
                )
            )
    return checkpoints, pa.concat_tables(history)


def _order_seed(seed: int, group: int) -> int:
    return int(np.random.SeedSequence([seed, 1, group]).generate_state(1)[0])


def _history(models: Sequence[ModelPlan], epoch: int, loss_B: Tensor, validation: Any) -> pa.Table:
    return pa.table(
        {
            "model_id": [m.model_id for m in models],
            "epoch": pa.array([epoch] * len(models), pa.int32()),
            "train_loss": loss_B.cpu().float().numpy(),
            "validation_accuracy": validation.accuracy_B.cpu().float().numpy(),
            "validation_loss": validation.loss_B.cpu().float().numpy(),
        }
    )


def _keep_finite(
    group: Group, config: ZooConfig, arch: Architecture, checkpoints: Sequence[_Checkpoint]
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The states of the models that stayed finite, model by model, and why the others are left out."""
    excluded, kept = [], []
    for b, model in enumerate(group.models):
        diverged = [c.epoch for c in checkpoints if not c.theta_BP[b].isfinite().all()]
        if diverged:
            excluded.append({"model_id": model.model_id, "reason": f"non-finite weights at epoch {diverged[0]}"})
        else:
            kept.append(b)
    rows = [(b, group.models[b], checkpoint) for b in kept for checkpoint in checkpoints]
    train_accuracy = [float(c.train_accuracy_B[b]) for b, _, c in rows]
    test_accuracy = [float(c.test_accuracy_B[b]) for b, _, c in rows]
    table = zoo_format.states_table(
        arch,
        model_id=[m.model_id for _, m, _ in rows],
        epoch=[c.epoch for _, _, c in rows],
        split=[m.split for _, m, _ in rows],
        theta_SP=torch.stack([c.theta_BP[b] for b, _, c in rows]) if rows else torch.empty(0, arch.num_parameters),
        metrics={
            "train_accuracy": train_accuracy,
            "test_accuracy": test_accuracy,
            "generalization_gap": [a - b for a, b in zip(train_accuracy, test_accuracy, strict=True)],
            "train_loss": [float(c.train_loss_B[b]) for b, _, c in rows],
        },
        config=[_config_json(m, config) for _, m, _ in rows],
    )
    return table, excluded


def _config_json(model: ModelPlan, config: ZooConfig) -> str:
    """A model's hyper-parameters, as JSON."""
    chosen = {key: value for key, value in asdict(model).items() if key not in ("model_id", "split")}
    training = config.training
    shared = {"optimizer": training.optimizer, "batch_size": training.batch_size, "epochs": training.epochs}
    net = config.architecture
    what = {"activation": net.activation} if net.module is None else {"module": net.module}
    return json.dumps({**chosen, **what, **shared})
