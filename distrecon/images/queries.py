"""Query sets: the inputs on which original and reconstructed networks are compared.

A query set is named: `data` (the training images), `uniform` (over the training images' range), `gaussian` (with each
input's mean and deviation over the training images), `patches` (random crops of scikit-learn's two photographs: natural
images that come with it), the name of another image set, or a union of these joined by `+`, in equal parts.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError, nearest
from distrecon.images.sets import IMAGE_SETS, ImageSet, load
from distrecon.nets import Architecture, inputs_for


def _data(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator)[:count]]


def _uniform(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    low, high = images.amin(), images.amax()
    return low + (high - low) * torch.rand(count, *images.shape[1:], generator=generator)


def _gaussian(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, *images.shape[1:], generator=generator)
    return images.mean(0) + images.std(0) * noise


def _patches(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Crops of 4 times the images' side, shrunk; as many channels; stretched to the training images' range."""
    from sklearn.datasets import load_sample_images

    channels, height, width = images.shape[1:]
    low, high = images.amin(), images.amax()
    photographs = [torch.from_numpy(p.copy()).float().movedim(2, 0) / 255 for p in load_sample_images().images]
    crops = []
    for i in range(count):
        photo = photographs[i % len(photographs)]
        y, x = (
            int(torch.randint(s - 4 * t, (1,), generator=generator))
            for s, t in zip(photo.shape[1:], (height, width), strict=True)
        )
        crops.append(photo[:, y : y + 4 * height, x : x + 4 * width])
    small = F.avg_pool2d(torch.stack(crops), 4)
    return low + (high - low) * _with_channels(small, channels, "patches")


def _with_channels(images: Tensor, channels: int, what: str) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 1:
        return images.mean(1, keepdim=True)
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    raise UserError(f"query set {what!r} has {images.shape[1]} channels, not {channels}")


RANDOM_SETS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "data": _data,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "patches": _patches,
}


def _other(name: str, like: Tensor, count: int, generator: torch.Generator, directory: str | Path | None) -> Tensor:
    """Training images of another set, resized to the size and number of channels of `like`."""
    images = _data(load(name, directory).train.images, count, generator)
    if images.shape[2:] != like.shape[2:]:
        size = [*like.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return _with_channels(images, like.shape[1], name)


def query_pool(
    query_set: str,
    images: ImageSet,
    arch: Architecture,
    count: int,
    seed: int = 0,
    directory: str | Path | None = None,
) -> Tensor:
    """Up to `count` inputs [Q, *arch.input_shape] of the named query set, the same for the same seed.

    Only sets of real images may hold fewer than asked. UserError names an unknown set or one of the wrong shape.
    """
    names = [name.strip() for name in query_set.split("+")]
    parts = []
    for i, name in enumerate(names):
        share = count // len(names) + (i < count % len(names))
        generator = torch.Generator().manual_seed(seed * 1000 + i)
        if name in RANDOM_SETS:
            parts.append(RANDOM_SETS[name](images.train.images, share, generator))
        elif name in IMAGE_SETS:
            parts.append(_other(name, images.train.images, share, generator, directory))
        else:
            known = [*RANDOM_SETS, *IMAGE_SETS]
            raise UserError(f"data.query_set: {name!r} is unknown{nearest(name, known)}")
    return torch.cat([inputs_for(arch, part, f"query set {query_set!r}: inputs") for part in parts])
