"""The exact file formats of the published image sets, read without unpickling anything.

Readers return uint8 images [Q, channels, height, width] and int64 labels [Q], and raise UserError that names a file
which is missing, incomplete or of another format. `UserError` messages begin with the path.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError, said

Labelled = tuple[Tensor, Tensor]


def find(directory: Path | None, what: str, *names: str) -> Path:
    """The first of the files that is there, also with .gz; UserError names the directory and what it should hold."""
    if directory is None:
        raise UserError(f"{what} needs the directory where its files lie")
    for name in names:
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(f"{directory}: {what} needs {' or '.join(names)} there")


MOST_IMAGES = 100_000  # in a file that does not say how many it holds


def _read(path: Path, *sizes: int) -> list[bytes]:
    """The file's next pieces of at most these sizes, unpacked as far as that and no farther."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return [file.read(size) for size in sizes]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {error or 'truncated'}") from None


def _images(path: Path, size: int) -> np.ndarray:
    """The bytes [Q, size] of a file of images without a header."""
    (content,) = _read(path, MOST_IMAGES * size + 1)
    values = np.frombuffer(content, np.uint8)
    if len(values) > MOST_IMAGES * size:
        raise UserError(f"{path}: more than {MOST_IMAGES:,} images of {size} bytes")
    if not len(values) or len(values) % size:
        raise UserError(f"{path}: incomplete: {len(values)} bytes are no multiple of {size}")
    return values.reshape(-1, size)


def idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes (MNIST's format): magic, sizes as big-endian integers, then the numbers."""
    header = 4 + 4 * dimensions
    (start,) = _read(path, header)
    if start[:4] != bytes([0, 0, 8, dimensions]) or len(start) < header:
        raise UserError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions")
    shape = np.frombuffer(start, ">u4", dimensions, offset=4).tolist()
    promised = math.prod(shape)
    values = np.frombuffer(_read(path, header, promised + 1)[1], np.uint8)
    if len(values) != promised:
        what = "incomplete: " if len(values) < promised else "more than it promises: "
        raise UserError(f"{path}: {what}{len(values)} of {promised} bytes")
    return values.reshape(shape)


def records(path: Path, shape: tuple[int, int, int]) -> Labelled:
    """Records of one label byte and one image of `shape` (CIFAR-10's binary version)."""
    rows = torch.from_numpy(_images(path, 1 + math.prod(shape)).copy())
    return rows[:, 1:].unflatten(1, shape), rows[:, 0].long()


MOST_SVHN = 32 * 32 * 3 * 1_000_000  # numbers; its largest file has 531,131 images


def mat(path: Path) -> Labelled:
    """SVHN's cropped digits: X [32, 32, 3, Q], y [Q, 1] with ten for zero."""
    from scipy.io import loadmat, whosmat

    try:
        shapes = {name: shape for name, shape, _ in whosmat(path)}  # before anything is unpacked
        if any(math.prod(shapes[name]) > MOST_SVHN for name in ("X", "y")):
            raise ValueError("too many images")
        content = loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1)
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{path}: not SVHN's .mat file with X and y ({type(error).__name__})") from None
    if images.ndim != 4 or images.shape[2] != 3 or images.shape[3] != len(labels):
        raise UserError(f"{path}: X is {images.shape}, y {labels.shape}: not SVHN's cropped digits")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return pixels, torch.from_numpy(labels.astype(np.int64) % 10)


def stl10(images: Path, labels: Path) -> Labelled:
    """STL-10's binary version: 3x96x96 column by column, labels from 1."""
    values = _images(images, 3 * 96 * 96)
    pixels = torch.from_numpy(values.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2).copy())
    classes = np.frombuffer(_read(labels, len(pixels) + 1)[0], np.uint8)
    if len(classes) != len(pixels):
        raise UserError(f"{labels}: {len(classes)} labels for {len(pixels)} images")
    return pixels, torch.from_numpy(classes.astype(np.int64) - 1)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp")


def class_folders(directory: Path, size: int | None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """One folder a class, images in any usual format, resized to `size` if given; with the classes' names.

    Raises UserError for a file that is no image, images of different sizes where none is given, or no images at all.
    """
    from PIL import Image, UnidentifiedImageError

    classes = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((directory / name).iterdir()):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                with Image.open(path) as image:
                    array = np.asarray(image if image.mode == "L" else image.convert("RGB"))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise UserError(f"{path}: not an image that can be read ({error})") from None
            tensor = torch.from_numpy(array.copy())
            tensor = tensor[None] if tensor.ndim == 2 else tensor.movedim(2, 0)
            pixels.append(tensor if size is None else resize(tensor[None], size)[0])
            if pixels[-1].shape != pixels[0].shape:
                raise UserError(f"{path}: {tuple(tensor.shape)} where the first image is {tuple(pixels[0].shape)}")
            labels.append(label)
    if not pixels:
        raise UserError(f"{directory}: no class folders with images in it")
    return torch.stack(pixels), torch.tensor(labels), tuple(classes)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images to size x size, by antialiased bilinear interpolation."""
    if images.shape[2:] == (size, size):
        return images
    resized = [
        F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        for chunk in images.split(1000)
    ]
    return torch.cat([chunk.round().clamp(0, 255).to(torch.uint8) for chunk in resized])


def arrays(images: Path, labels: Path) -> Labelled:
    """Two .npy files: images [Q, H, W], [Q, C, H, W] or [Q, H, W, C], labels [Q]; the pixels keep their type."""
    pixels, classes = _npy(images), _npy(labels).reshape(-1)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or len(pixels) != len(classes):
        raise UserError(f"{images}: {pixels.shape} images do not fit {len(classes)} labels in {labels.name}")
    if classes.dtype.kind not in "iu" or (len(classes) and classes.min() < 0):
        raise UserError(f"{labels}: labels must be integers from 0, not {classes.dtype}")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UserError(f"{images}: non-finite pixels")
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(classes.astype(np.int64))


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{path}: not a plain .npy array ({said(error)})") from None
