"""Labelled image sets as tensors; `load(name)` is the one way in. Adding a set is adding one function to IMAGE_SETS."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from distrecon.errors import UserError, nearest
from distrecon.images import published
from distrecon.images.labelled import ImageSet, LabelledImages

LIMIT_SEED = 42


def digits(directory: Path | None = None) -> ImageSet:
    """scikit-learn's 1,797 digits, 8x8 grey: 1,000 train, 200 validation, 597 test; pixels 0..16 become -1..1."""
    from sklearn.datasets import load_digits  # here, because importing it takes every worker process a second

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images = torch.from_numpy((raw.images[order] / 8 - 1).astype(np.float32))[:, None]
    labels_Q = torch.from_numpy(raw.target[order].astype(np.int64))
    train, validation, test = (
        LabelledImages(images[a:b], labels_Q[a:b]) for a, b in ((0, 1000), (1000, 1200), (1200, None))
    )
    return ImageSet("digits", train, validation, test, tuple("0123456789"), "pixel / 8 - 1")


IMAGE_SETS: dict[str, Callable[[Path | None], ImageSet]] = {
    "digits": digits,
    **{name: partial(published.published, name) for name in published.PUBLISHED},
    "eurosat": published.eurosat,
    "arrays": published.arrays,
    "folders": published.folders,
}


def load(name: str, directory: str | Path | None = None, limit: int | None = None) -> ImageSet:
    """The image set called `name`, read from `directory` where it does not come with scikit-learn.

    With `limit`, only so many of its training images, always the same ones; validation and test images stay.
    """
    if name not in IMAGE_SETS:
        raise UserError(f"unknown image set {name!r}{nearest(name, IMAGE_SETS)}")
    whole = IMAGE_SETS[name](Path(directory) if directory is not None else None)
    if limit is None or limit >= len(whole.train):
        return whole
    few = torch.randperm(len(whole.train), generator=torch.Generator().manual_seed(LIMIT_SEED))[:limit]
    return replace(whole, train=LabelledImages(whole.train.images[few], whole.train.labels_Q[few]))
