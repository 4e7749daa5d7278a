"""Trains a small zoo of digits classifiers, vectorised, and looks at it."""

import sys

from distrecon.zoos.settings import GridConfig, TrainingConfig, ZooConfig
from distrecon.zoos.train import ensure

folder = sys.argv[1] if len(sys.argv) > 1 else "zoos/example"
grid = GridConfig(initialisation=("kaiming_normal",), scale=(0.4,), lr=(2e-3, 5e-3), weight_decay=(1e-3,), seeds=20)
config = ZooConfig(name="example", grid=grid, training=TrainingConfig(epochs=4, checkpoints=(2, 4)))
zoo = ensure(config, folder)
models = zoo.models("test")
print(f"{zoo.num_models} models, {zoo.num_states} states of {zoo.architecture.num_parameters} parameters")
print(
    f"held-out models' test accuracy: mean {models.test_accuracy_B.mean():.3f}, best {models.test_accuracy_B.max():.3f}"
)
