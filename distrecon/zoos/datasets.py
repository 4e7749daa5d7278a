"""Images stored in a zoo's own folder: a published zoo's `dataset.pt`, or an image set given with the weights.

`dataset.pt` is read where it holds tensors or torch's own TensorDataset; anything else (datasets of other classes) is
refused.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from distrecon.errors import UserError
from distrecon.images import ImageSet
from distrecon.zoos.checkpoints import load
from distrecon.zoos.storage import Store

FILE = "dataset.pt"
FOLDER = "images"
PARTS = {  # names in arrays' files -> names in published files
    "train": ("train", "trainset", "train_set"),
    "validation": ("validation", "val", "valset", "val_set"),
    "test": ("test", "testset", "test_set"),
}
IMAGES, LABELS = ("images", "data", "x", "inputs"), ("labels", "targets", "y")


def copy_images(source: Store, where: Store) -> dict[str, Any]:
    """Writes the tensors of `dataset.pt` as an array image set into the zoo's folder `images`; its entry in `zoo.json`.

    Raises UserError for a file that is damaged, holds more than tensors, or has no training and test images.
    """
    with torch.serialization.safe_globals([TensorDataset]):  # a list of tensors; building one runs nothing else
        content = load(source.read(FILE), FILE)
    parts = {}
    if isinstance(content, Mapping):
        for part, names in PARTS.items():
            pair = next((_pair(content[name]) for name in names if name in content), None)
            if pair is not None:
                parts[part] = pair
    if not {"train", "test"} <= parts.keys():
        raise UserError(f"{FILE}: no training and test images as plain tensors in it")
    classes = [str(i) for i in range(int(parts["train"][1].max()) + 1)]
    return _write(where, parts, "as in dataset.pt", classes)


def write_images(where: Store, images: ImageSet) -> dict[str, Any]:
    """Writes an image set into the zoo's folder `images`; its entry in `zoo.json`."""
    parts = {part: (getattr(images, part).images, getattr(images, part).labels_Q) for part in PARTS}
    return _write(where, parts, images.preprocessing, images.classes)


def _write(
    where: Store, parts: Mapping[str, tuple[Tensor, Tensor]], preprocessing: str, classes: Sequence[str]
) -> dict[str, Any]:
    for part, (images, labels_Q) in parts.items():
        for name, tensor in (("images", images), ("labels", labels_Q)):
            buffer = io.BytesIO()
            np.save(buffer, tensor.numpy())
            where.write(f"{FOLDER}/{part}_{name}.npy", buffer.getvalue())
    return {"name": "arrays", "directory": FOLDER, "preprocessing": preprocessing, "classes": list(classes)}


def _pair(value: Any) -> tuple[Tensor, Tensor] | None:
    """Images [Q, ...] and labels [Q] in a mapping or a pair, if they are there."""
    if isinstance(value, TensorDataset):
        value = value.tensors
    if isinstance(value, Mapping):
        images = next((value[name] for name in IMAGES if name in value), None)
        labels = next((value[name] for name in LABELS if name in value), None)
    elif isinstance(value, list | tuple) and len(value) == 2:
        images, labels = value
    else:
        return None
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor) or len(images) != len(labels):
        return None
    return images, labels
