"""A tiny zoo, trained once for all tests of the zoos."""

from pathlib import Path

import pytest

from distrecon.zoos import Zoo
from distrecon.zoos.settings import GridConfig, TrainingConfig, ZooConfig

TINY = ZooConfig(
    name="tiny",
    grid=GridConfig(initialisation=("uniform", "kaiming_normal"), lr=(1e-3, 3e-3), weight_decay=(1e-3,), seeds=5),
    training=TrainingConfig(epochs=3, checkpoints=(1, 3), batch_size=50),
    group_size=7,
)


@pytest.fixture(scope="session")
def tiny_zoo(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """20 models of the digits CNN, two states each, in three parts."""
    from distrecon.zoos.train import ensure

    return ensure(TINY, tmp_path_factory.mktemp("zoos") / "tiny")


@pytest.fixture
def tiny_folder(tiny_zoo: Zoo) -> Path:
    return Path(tiny_zoo.store.root)
