"""Published image sets from their files, prepared as the published model zoos prepare them.

The splits are those of the zoos' generators (github.com/ModelZoos/ModelZooDataset): the training files are divided by
torch's `randperm` with seed 42, the test files stay as they are. Pixels become -1..1 (MNIST: its mean and deviation).
The `_28` sets are the 28x28 images of the zoos' small CNNs. EuroSAT has no official test files: a seeded fifth is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.images import files
from distrecon.images.labelled import ImageSet, LabelledImages

SPLIT_SEED = 42
DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

Pair = tuple[files.Labelled, files.Labelled]  # training and test files


def _idx_pair(directory: Path | None, what: str) -> Pair:
    def part(prefix: str) -> files.Labelled:
        paths = [
            files.find(directory, what, f"{prefix}-{kind}-idx{n}-ubyte", f"{prefix}-{kind}.idx{n}-ubyte")
            for kind, n in (("images", 3), ("labels", 1))
        ]
        pixels, labels = files.idx(paths[0], 3), files.idx(paths[1], 1)
        if len(pixels) != len(labels):
            raise UserError(f"{paths[1]}: {len(labels)} labels for {len(pixels)} images")
        return torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(labels.copy()).long()

    return part("train"), part("t10k")


def _svhn_pair(directory: Path | None, what: str) -> Pair:
    train, test = (files.mat(files.find(directory, what, f"{part}_32x32.mat")) for part in ("train", "test"))
    return train, test


def _cifar_pair(directory: Path | None, what: str) -> Pair:
    inner = directory / "cifar-10-batches-bin" if directory is not None else None
    home = inner if inner is not None and inner.is_dir() else directory

    def part(names: list[str]) -> files.Labelled:
        parts = [files.records(files.find(home, what, name), (3, 32, 32)) for name in names]
        return torch.cat([p for p, _ in parts]), torch.cat([labels for _, labels in parts])

    return part([f"data_batch_{i}.bin" for i in range(1, 6)]), part(["test_batch.bin"])


def _stl_pair(directory: Path | None, what: str) -> Pair:
    inner = directory / "stl10_binary" if directory is not None else None
    home = inner if inner is not None and inner.is_dir() else directory
    train, test = (
        files.stl10(files.find(home, what, f"{part}_X.bin"), files.find(home, what, f"{part}_y.bin"))
        for part in ("train", "test")
    )
    return train, test


# -- pixels -----------------------------------------------------------------------------------------------------------


def _same(images: Tensor) -> Tensor:
    return images


def _to_32(images: Tensor) -> Tensor:
    return files.resize(images, 32)


def _to_28(images: Tensor) -> Tensor:
    return files.resize(images, 28)


def _grey_crop_28(images: Tensor) -> Tensor:
    """Luminance as Pillow computes it, then the middle 28x28."""
    red, green, blue = images.int().unbind(1)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey.to(torch.uint8)[:, None, 2:30, 2:30]


@dataclass(frozen=True)
class Published:
    """How a set is read and prepared; `validation` images are taken from the training files."""

    read: Callable[[Path | None, str], Pair]
    validation: int
    classes: tuple[str, ...]
    pixels: Callable[[Tensor], Tensor] = _same
    mean: float = 0.5
    deviation: float = 0.5
    note: str = ""


PUBLISHED = {
    "mnist": Published(_idx_pair, 10_000, DIGITS, mean=0.1307, deviation=0.3081),
    "fashion_mnist": Published(_idx_pair, 10_000, CLOTHES),
    "svhn": Published(_svhn_pair, 13_257, DIGITS),
    "svhn_28": Published(_svhn_pair, 13_257, DIGITS, _grey_crop_28, note="grey, middle 28x28, "),
    "cifar10": Published(_cifar_pair, 8_000, CIFAR),
    "cifar10_28": Published(_cifar_pair, 8_000, CIFAR, _to_28, note="resized to 28x28, "),
    "stl10": Published(_stl_pair, 800, STL, _to_32, note="resized to 32x32, "),
    "stl10_28": Published(_stl_pair, 800, STL, _to_28, note="resized to 28x28, "),
}


def published(name: str, directory: Path | None) -> ImageSet:
    """A set of `PUBLISHED` from its files; UserError names a file that is missing, incomplete or something else."""
    spec = PUBLISHED[name]
    (pixels, labels_Q), (test_pixels, test_labels_Q) = spec.read(directory, name)
    for labels in (labels_Q, test_labels_Q):
        if not len(labels):
            raise UserError(f"{directory}: {name} needs images in its training and in its test files")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(spec.classes):
            raise UserError(f"{directory}: {name} has labels from 0 to {len(spec.classes) - 1}, found {low} to {high}")
    held_out = min(spec.validation, -(-len(pixels) // 5))  # an excerpt of the files keeps most images for training

    def prepare(images: Tensor, labels: Tensor) -> LabelledImages:
        return LabelledImages((spec.pixels(images).float() / 255 - spec.mean) / spec.deviation, labels)

    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, validation = order[: len(order) - held_out], order[len(order) - held_out :]
    return ImageSet(
        name,
        prepare(pixels[train], labels_Q[train]),
        prepare(pixels[validation], labels_Q[validation]),
        prepare(test_pixels, test_labels_Q),
        spec.classes,
        f"{spec.note}(pixel / 255 - {spec.mean}) / {spec.deviation}",
    )


# -- sets that come in one piece --------------------------------------------------------------------------------------

PARTS = ("train", "validation", "test")


def eurosat(directory: Path | None) -> ImageSet:
    """EuroSAT's RGB JPEGs, one folder a class, resized to 32x32; 70 / 10 / 20 % by seed."""
    home = _directory(directory, "eurosat")
    inner = [home / name for name in ("2750", "EuroSAT", "EuroSAT_RGB") if (home / name).is_dir()]
    return _split("eurosat", *files.class_folders(inner[0] if inner else home, 32), "resized to 32x32, ")


def folders(directory: Path | None) -> ImageSet:
    """Class folders with images of one size; inside `train`, `test`, perhaps `validation`, or split 70 / 10 / 20 %."""
    home = _directory(directory, "folders")
    if not all((home / part).is_dir() for part in ("train", "test")):
        return _split("folders", *files.class_folders(home, None))
    parts = {part: files.class_folders(home / part, None) for part in PARTS if (home / part).is_dir()}
    classes = parts["train"][2]
    for part, (_, _, found) in parts.items():
        if found != classes:
            raise UserError(f"{home / part}: its classes {list(found)} are not those of train, {list(classes)}")
    return _from_parts("folders", {part: (p, labels) for part, (p, labels, _) in parts.items()}, classes)


def arrays(directory: Path | None) -> ImageSet:
    """images.npy and labels.npy (split 70 / 10 / 20 % by seed), or train_, test_ and perhaps validation_ ones."""
    home = _directory(directory, "arrays")
    if (home / "images.npy").is_file():
        pixels, labels_Q = files.arrays(home / "images.npy", files.find(home, "arrays", "labels.npy"))
        return _split("arrays", pixels, labels_Q, _numbered(labels_Q))
    parts = {}
    for part in PARTS:
        if part != "validation" or (home / "validation_images.npy").is_file():
            pair = (files.find(home, "arrays", f"{part}_{kind}.npy") for kind in ("images", "labels"))
            parts[part] = files.arrays(*pair)
    return _from_parts("arrays", parts, _numbered(torch.cat([labels for _, labels in parts.values()])))


def _directory(directory: Path | None, what: str) -> Path:
    if directory is None or not directory.is_dir():
        raise UserError(f"{what} needs the directory where its files lie, not {directory}")
    return directory


def _numbered(labels_Q: Tensor) -> tuple[str, ...]:
    return tuple(str(i) for i in range(int(labels_Q.max()) + 1))


def _split(name: str, pixels: Tensor, labels_Q: Tensor, classes: tuple[str, ...], note: str = "") -> ImageSet:
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    a, b = round(0.7 * len(order)), round(0.8 * len(order))
    cuts = {"train": order[:a], "validation": order[a:b], "test": order[b:]}
    return _from_parts(name, {part: (pixels[rows], labels_Q[rows]) for part, rows in cuts.items()}, classes, note)


def _from_parts(name: str, parts: dict[str, files.Labelled], classes: tuple[str, ...], note: str = "") -> ImageSet:
    """Bytes become -1..1, other numbers stay. Without validation images, a seeded tenth of the training ones is it."""
    if "validation" not in parts:
        pixels, labels = parts["train"]
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        held_out = max(1, len(pixels) // 10)
        parts = parts | {
            "train": (pixels[order[:-held_out]], labels[order[:-held_out]]),
            "validation": (pixels[order[-held_out:]], labels[order[-held_out:]]),
        }
    for part, (pixels, _) in parts.items():
        if not len(pixels):
            raise UserError(f"{name}: no {part} images")

    def prepare(pixels: Tensor, labels: Tensor) -> LabelledImages:
        return LabelledImages(pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float(), labels)

    scaled = parts["train"][0].dtype == torch.uint8
    train, validation, test = (prepare(*parts[part]) for part in PARTS)
    return ImageSet(name, train, validation, test, classes, note + ("pixel / 127.5 - 1" if scaled else "as given"))
