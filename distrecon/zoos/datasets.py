"""Images in a zoo's own folder, so that the zoo can be copied: an image set given with the weights, the files that it
was trained on, or a published zoo's `dataset.pt`.

`dataset.pt` is read where it holds tensors or torch's own TensorDataset; anything else (datasets of other classes) is
refused.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from distrecon.errors import UserError, reading, said
from distrecon.images import ImageSet, LabelledImages
from distrecon.images import load as load_images
from distrecon.zoos import format as zoo_format
from distrecon.zoos import seals
from distrecon.zoos.checkpoints import load
from distrecon.zoos.storage import Store

FILE = "dataset.pt"
FOLDER = "images"
VALUES = "values"  # of a file's pixels, in its metadata
ROWS = 1000  # images that are coded at once
KEPT_PIXELS = 256 * 2**20  # images of more are left where they lie; all of CIFAR-10 are 176 * 2**20
PARTS = {  # names in arrays' files -> names in published files
    "train": ("train", "trainset", "train_set"),
    "validation": ("validation", "val", "valset", "val_set"),
    "test": ("test", "testset", "test_set"),
}
IMAGES, LABELS = ("images", "data", "x", "inputs"), ("labels", "targets", "y")


def copy_images(source: Store, where: Store) -> dict[str, Any]:
    """Writes the tensors of `dataset.pt` as an image set into the zoo's folder `images`; its entry in `zoo.json`.

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
    with tempfile.TemporaryDirectory() as folder:  # the reader of arrays makes an image set of them
        for part, (images, labels_Q) in parts.items():
            np.save(f"{folder}/{part}_images.npy", images.numpy())
            np.save(f"{folder}/{part}_labels.npy", labels_Q.numpy())
        return write_images(where, load_images("arrays", folder))


# -- images inside a zoo ----------------------------------------------------------------------------------------------


def entry(
    where: Store, images: ImageSet | None, directory: str | None, keep: bool | None, limit: int | None = None
) -> dict[str, Any]:
    """What `zoo.json` says of a new zoo's images, which are put into the zoo with `keep`.

    None: if they lie in a directory, without which the zoo could not be used elsewhere, and are not very many. `limit`
    is the number of training images that were kept of the set, where they are not all of them.
    """
    if images is None or not (keep if keep is not None else directory is not None and _pixels(images) <= KEPT_PIXELS):
        found = zoo_format.image_entry(images, os.path.abspath(directory) if directory is not None else None)
    else:
        found = write_images(where, images)
    return found if limit is None else {**found, "limit": limit}


def _pixels(images: ImageSet) -> int:
    return sum(getattr(images, part).images.numel() for part in PARTS)


def write_images(where: Store, images: ImageSet) -> dict[str, Any]:
    """Writes an image set into the zoo's folder `images`, one Parquet file a part; its entry in `zoo.json`."""
    contents = {f"{part}.parquet": _to_parquet(getattr(images, part)) for part in PARTS}
    sealed = {name: seals.seal(content) for name, content in contents.items()}
    folder = FOLDER
    if where.exists(zoo_format.MANIFEST) and any(seals.problem(where, f"{FOLDER}/{n}", s) for n, s in sealed.items()):
        # what a finished zoo has is never written over: until the next commit it is its own
        folder = f"{FOLDER}-{hashlib.sha256(''.join(sealed.values()).encode()).hexdigest()[:8]}"
    for name, content in contents.items():
        where.write(f"{folder}/{name}", content)
    return {**zoo_format.image_entry(images), "stored": folder}


def files_of(entry: Mapping[str, Any]) -> list[str]:
    """The files of the zoo that hold its images, by its entry."""
    return [f"{entry['stored']}/{part}.parquet" for part in PARTS] if "stored" in entry else []


def read_images(where: Store, entry: Mapping[str, Any], sealed: Mapping[str, str]) -> ImageSet:
    """The image set that `write_images` wrote, bit for bit; UserError names a file that is missing or damaged."""
    files = files_of(entry)
    with seals.Comparison(where, sealed, files) as comparison:
        parts = {part: _from_parquet(where, file) for part, file in zip(PARTS, files, strict=True)}
        for file in files:
            comparison.demand(file)
    return ImageSet(entry["name"], **parts, classes=tuple(entry["classes"]), preprocessing=entry["preprocessing"])


def _to_parquet(part: LabelledImages) -> pa.Buffer:
    """Columns image [C, H, W] and label. Pixels of at most 256 different values, as all that were bytes, are one byte
    each, which counts in the file's list `values`."""
    pixels, values = part.images.detach().cpu().contiguous().numpy(), _values(part.images)
    if values is not None:
        codes = [np.searchsorted(values, chunk).astype(np.uint8) for chunk in np.array_split(pixels, _chunks(pixels))]
        pixels = np.concatenate(codes)
    table = pa.table(
        {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels), "label": part.labels_Q.cpu().numpy()}
    )
    if values is not None:
        table = table.replace_schema_metadata({VALUES: json.dumps(values.tolist())})
    sink = pa.BufferOutputStream()
    split = {"image.list.element": "BYTE_STREAM_SPLIT"}  # Parquet widens bytes to four, of which three are nothing
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, column_encoding=split, row_group_size=ROWS)
    return sink.getvalue()


def _from_parquet(where: Store, file: str) -> LabelledImages:
    try:
        with where.open(file) as source:
            table = pq.read_table(source).combine_chunks()
    except FileNotFoundError:
        raise UserError(f"{where.path(file)} is missing; the zoo says that its images lie there") from None
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{where.path(file)} is damaged: {said(error)}") from None
    with reading(where.path(file)):
        return _labelled(table)


def _labelled(table: pa.Table) -> LabelledImages:
    pixels = np.concatenate([chunk.to_numpy_ndarray() for chunk in table["image"].chunks])
    if (listed := (table.schema.metadata or {}).get(VALUES.encode())) is not None:
        values, codes = np.array(json.loads(listed), np.float32), pixels
        pixels = np.empty(codes.shape, np.float32)
        for chunk, of in zip(*(np.array_split(array, _chunks(codes)) for array in (pixels, codes)), strict=True):
            chunk[...] = values[of]
    return LabelledImages(torch.from_numpy(np.array(pixels)), torch.from_numpy(table["label"].to_numpy().copy()))


def _values(images: Tensor) -> np.ndarray | None:
    """The different values of the pixels, rising, if there are at most 256."""
    found = np.empty(0, np.float32)
    for chunk in images.split(ROWS):
        found = np.union1d(found, chunk.detach().cpu().numpy())
        if len(found) > 256:
            return None
    return found


def _chunks(pixels: np.ndarray) -> int:
    return max(1, len(pixels) // ROWS)


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
