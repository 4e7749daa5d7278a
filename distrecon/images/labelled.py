"""What an image set is: labelled images in three disjoint parts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """Images [Q, channels, height, width] float32, normalised, and their classes [Q] int64."""

    images: Tensor
    labels_Q: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ImageSet:
    """Three disjoint sets of images: models are fitted on `train`, chosen on `validation` and judged on `test`."""

    name: str
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    preprocessing: str

    def on(self, device: torch.device | str) -> "ImageSet":
        """The same with its images on that device; labels stay, since what they are compared with is small."""
        parts = (self.train, self.validation, self.test)
        train, validation, test = (LabelledImages(part.images.to(device), part.labels_Q) for part in parts)
        return replace(self, train=train, validation=validation, test=test)
