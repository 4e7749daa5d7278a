"""What an image set is: labelled images in three disjoint parts."""

from dataclasses import dataclass

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
