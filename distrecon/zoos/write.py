"""`write_zoo`: a zoo from your own weights, in one call; `seal_zoo`: seals for one that has none.

Legend: S states, P parameters.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distrecon.errors import UserError, nearest, reading
from distrecon.images import ImageSet, load
from distrecon.nets import Architecture, inputs_for
from distrecon.zoos import datasets, row_groups, seals
from distrecon.zoos import format as zoo_format
from distrecon.zoos.sources import impossible
from distrecon.zoos.storage import Store, store
from distrecon.zoos.writer import Writer, writing
from distrecon.zoos.zoo import Zoo, open_zoo

PROPERTIES = ("epoch", *zoo_format.METRICS, "config")
PART_BYTES = 256 * 2**20  # of weights in one file
KIND = "written"  # of the zoo's origin


def write_zoo(
    path: str | os.PathLike[str],
    arch: Architecture,
    theta_SP: Tensor | np.ndarray,
    *,
    model_id: Sequence[str],
    split: Sequence[str],
    images: str | ImageSet | None = None,
    images_directory: str | None = None,
    store_images: bool | None = None,
    name: str | None = None,
    filesystem: Any = None,
    **properties: Sequence[Any],
) -> Zoo:
    """Writes weights theta[S, P] with their models' ids and splits ("train", "val", "test") as a new zoo, and opens it.

    Each state has one entry in `model_id`, in `split` and in each property: `epoch` (whole numbers; 0 where it is left
    out), `train_accuracy`, `test_accuracy` (shares), `generalization_gap` (their difference where it is left out),
    `train_loss`, `config` (hyper-parameters, mappings or JSON); None where a value is not known. A model's states are
    stored side by side. `images` is the set that the models were trained on: its name, with `images_directory` where
    its files lie, or the set itself, which is then stored in the zoo; `store_images` stores named ones or does not
    (default: if they lie in a directory and are at most 256 Mi pixels). `name` is the folder's where it is left out.

    Everything is checked before anything is written, and `zoo.json` is written last: a call that dies leaves no zoo,
    and can be repeated. Raises UserError that names the model or the property for weights of another size or that are
    not finite, a model in two splits or with an epoch twice, a length that differs, a value that cannot be, an unknown
    split or property, and where there is a zoo already.
    """
    where = store(path, filesystem)
    theta_SP = torch.as_tensor(theta_SP).detach().cpu().float()
    arch.check(theta_SP)
    if not len(theta_SP):
        raise UserError("a zoo needs at least one state")
    for key in properties:
        if key not in PROPERTIES:
            raise UserError(f"unknown property {key!r}{nearest(key, PROPERTIES)}")
    for key, values in {"model_id": model_id, "split": split, **properties}.items():
        if len(values) != len(theta_SP):
            raise UserError(f"{key} has {len(values)} entries, the weights have {len(theta_SP)} states")
    if wrong := [i for i in model_id if not isinstance(i, str) or not i]:
        raise UserError(f"model_id must be text, not {wrong[0]!r}")
    table = zoo_format.states_table(
        arch,
        model_id=list(model_id),
        epoch=_epochs(model_id, properties.get("epoch")),
        split=list(split),
        theta_SP=theta_SP,
        metrics=_metrics(model_id, properties),
        config=[_config(i, c) for i, c in zip(model_id, properties.get("config", [None] * len(model_id)), strict=True)],
    )
    image_set = load(images, images_directory) if isinstance(images, str) else images
    if image_set is not None:
        inputs_for(arch, image_set.test.images, f"images of {image_set.name}")
    with writing(where) as writer:
        _begin(where, writer)
        if isinstance(images, ImageSet):
            entry = datasets.write_images(where, images)
        else:
            entry = datasets.entry(where, image_set, images_directory, store_images)
        zoo_format.commit(
            where,
            name=name or where.root.rpartition("/")[2],
            arch=arch,
            image_set=entry,
            parts=_write_parts(where, _by_model(table), arch.num_parameters),
            origin={"kind": KIND},
            files=seals.seals_of(where, datasets.files_of(entry)),
            writer=writer,
        )
        where.delete_folder("unfinished")
    return open_zoo(where)


def seal_zoo(path: str | os.PathLike[str] | Store, filesystem: Any = None) -> int:
    """Seals those files of a zoo that are not, as of one made by an earlier version; how many.

    It takes them, and `zoo.json` where that was edited, to be as they should be: look with `zoo check` before. Raises
    UserError where a file differs from the seal that it has, or another process writes the zoo.
    """
    where = path if isinstance(path, Store) else store(path, filesystem)
    zoo_format.read_manifest(where, edited=True)  # refuses what is no zoo before anything is made
    with writing(where) as writer:
        content = zoo_format.read_manifest(where, edited=True)
        sealed, images = content["files"], content["image_set"]
        if wrong := list(seals.problems(where, sealed)):
            raise UserError(f"{where}: {wrong[0][1]}; zoo check lists all that is wrong")
        files = [*(part.file for part in zoo_format.parts_of(content)), *where.names("history")]
        files += datasets.files_of(images)
        missing = [file for file in dict.fromkeys(files) if file not in sealed]
        if gone := [file for file in missing if not where.exists(file)]:
            raise UserError(f"{where}: {gone[0]} is missing; the zoo lists it")
        content["files"] = {**sealed, **seals.seals_of(where, missing)}
        new = {file: row_groups.footer_seal(where, file) for file in missing if file.startswith("states/")}
        footers = {file: footer for file, footer in content["footers"].items() if file not in new}
        content["footers"] = footers | {file: footer for file, footer in new.items() if footer is not None}
        writer.commit(zoo_format.manifest(content))
    return len(missing)


def _begin(where: Store, writer: Writer) -> None:
    """Refuses a folder with a zoo in it; clears what a call that died has left."""
    if where.exists(zoo_format.MANIFEST):
        raise UserError(f"{where} holds a zoo already: choose another folder, or delete it")
    if where.exists(zoo_format.UNFINISHED):
        with reading(f"{where.path(zoo_format.UNFINISHED)} (delete its folder to begin anew)"):
            begun = json.loads(where.read(zoo_format.UNFINISHED))["origin"].get("kind")
        if begun != KIND:
            raise UserError(f"{where} holds an unfinished zoo: finish it, choose another folder, or delete it")
        for folder in ("states", datasets.FOLDER):
            if where.exists(folder):
                where.delete_folder(folder)
    writer.begin({"first_unit": 0, "origin": {"kind": KIND}})


def _epochs(model_id: Sequence[str], epochs: Sequence[Any] | None) -> list[int]:
    found = []
    for i, epoch in zip(model_id, epochs if epochs is not None else [0] * len(model_id), strict=True):
        if isinstance(epoch, bool | str) or epoch is None or not 0 <= epoch < 2**31 or epoch != int(epoch):
            raise UserError(f"model {i!r}: epoch must be a whole number from 0, not {epoch!r}")
        found.append(int(epoch))
    return found


def _metrics(model_id: Sequence[str], properties: Mapping[str, Sequence[Any]]) -> dict[str, list[float | None]]:
    """Each metric of the format as plain numbers, None where unknown; UserError for what cannot be."""
    metrics: dict[str, list[float | None]] = {}
    for metric in zoo_format.METRICS:
        metrics[metric] = []
        for i, value in zip(model_id, properties.get(metric, [None] * len(model_id)), strict=True):
            try:
                number = None if value is None else float(value)
            except (TypeError, ValueError):
                raise UserError(f"model {i!r}: {metric} must be a number or None, not {value!r}") from None
            if (reason := impossible(metric, number)) is not None:
                raise UserError(f"model {i!r}: {reason}")
            metrics[metric].append(number)
    if "generalization_gap" not in properties:
        pairs = zip(metrics["train_accuracy"], metrics["test_accuracy"], strict=True)
        metrics["generalization_gap"] = [None if a is None or b is None else a - b for a, b in pairs]
    return metrics


def _config(model_id: str, config: Any) -> str:
    """Hyper-parameters as JSON."""
    try:
        return json.dumps(json.loads(config) if isinstance(config, str) else dict(config or {}))
    except (TypeError, ValueError):
        raise UserError(f"model {model_id!r}: config must be a mapping or JSON, not {config!r}") from None


def _by_model(table: pa.Table) -> pa.Table:
    """The rows with each model's states side by side, in the order in which the models first appear."""
    first: dict[str, int] = {}
    place_S = np.array([first.setdefault(name, len(first)) for name in table["model_id"].to_pylist()])
    return table if (np.diff(place_S) >= 0).all() else table.take(np.argsort(place_S, kind="stable"))


def _write_parts(where: Store, table: pa.Table, num_parameters: int) -> list[zoo_format.Part]:
    """The rows as files of about `PART_BYTES`, each model in one."""
    size = max(1, PART_BYTES // (4 * num_parameters))
    names = table["model_id"].to_pylist()
    starts = [0]
    for row in range(1, len(names)):
        if row - starts[-1] >= size and names[row] != names[row - 1]:
            starts.append(row)
    return [
        zoo_format.write_part(where, zoo_format.part_name(number), table.slice(start, end - start))
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(names)], strict=True))
    ]
