"""The images that published zoos bring along: `dataset.pt`, where it holds tensors or torch's own TensorDataset.

Files that hold anything else (datasets of other classes) are refused.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from distrecon.errors import UserError
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
    for part, (images, labels) in parts.items():
        for name, tensor in (("images", images), ("labels", labels)):
            buffer = io.BytesIO()
            np.save(buffer, tensor.numpy())
            where.write(f"{FOLDER}/{part}_{name}.npy", buffer.getvalue())
    classes = [str(i) for i in range(int(parts["train"][1].max()) + 1)]
    return {"name": "arrays", "directory": FOLDER, "preprocessing": "as in dataset.pt", "classes": classes}


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
