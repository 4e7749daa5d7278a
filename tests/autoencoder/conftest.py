"""Fixtures: digits images, the small CNN, two dozen related models."""

import pytest
import torch

from distrecon.autoencoder import ZooSample
from distrecon.images import ImageSet, load
from distrecon.nets import Architecture, architecture
from tests.autoencoder.small import related_models


@pytest.fixture(scope="session")
def images() -> ImageSet:
    return load("digits")


@pytest.fixture(scope="session")
def arch() -> Architecture:
    return architecture("cnn_small")


@pytest.fixture(scope="session")
def theta_BP(arch) -> torch.Tensor:
    return related_models(arch, 24)


@pytest.fixture(scope="session")
def zoo(arch, theta_BP, images) -> ZooSample:
    return ZooSample(arch, theta_BP, images)
