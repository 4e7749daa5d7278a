"""Labelled image sets, split into train, validation and test."""

from distrecon.images.labelled import ImageSet, LabelledImages
from distrecon.images.sets import IMAGE_SETS, load

__all__ = ["IMAGE_SETS", "ImageSet", "LabelledImages", "load"]
