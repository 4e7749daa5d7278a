"""What a zoo is made of, as configuration: images, architecture, grid of hyper-parameters, training, splits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distrecon.config import check, flatten, replace, setting
from distrecon.errors import UserError, nearest
from distrecon.images import IMAGE_SETS, ImageSet
from distrecon.nets import ACTIVATIONS, ARCHITECTURES, INITIALISATIONS, Architecture, architecture
from distrecon.nets.fit import OPTIMIZERS
from distrecon.nets.given import factory, module_of
from distrecon.nets.initialise import OWN
from distrecon.zoos.format import SPLITS


@dataclass(frozen=True)
class ArchitectureConfig:
    """Name and activation; channels, image size and classes follow from the image set."""

    name: str = setting("cnn_small", choices=ARCHITECTURES)
    activation: str = setting("relu", choices=ACTIVATIONS)
    hidden: tuple[int, ...] = setting((), "sizes of an mlp's hidden layers", least=1)
    module: str | None = setting(None, "package.file:factory of a torch module, in place of the name")

    def __post_init__(self) -> None:
        check(self, "architecture")
        if self.hidden and self.name != "mlp":
            raise UserError(f"architecture.hidden is for mlp, not for {self.name}")

    def build(self, images: ImageSet) -> Architecture:
        """The architecture for these images; the module that `module` names is imported."""
        if self.module is not None:
            make = factory(self.module)
            example = images.train.images[:4]
            found = architecture(module_of(make), inputs=example, source=self.module, make=make)
            if found.num_outputs != len(images.classes):
                raise UserError(
                    f"architecture.module: {self.module} gives {found.num_outputs} outputs, {images.name} has "
                    f"{len(images.classes)} classes"
                )
            return found
        channels, height, width = images.train.images.shape[1:]
        classes = len(images.classes)
        if self.name == "mlp":
            sizes = (channels * height * width, *self.hidden, classes)
            return architecture("mlp", sizes=sizes, activation=self.activation)
        if height != width:
            raise UserError(f"{self.name} reads square images, {images.name} has {height}x{width}")
        return architecture(
            self.name, in_channels=channels, image_size=height, num_classes=classes, activation=self.activation
        )


@dataclass(frozen=True)
class ImagesConfig:
    """The image set, where its files lie when it does not come with the package, and how much of it is trained on."""

    name: str = setting("digits", "the image set", choices=IMAGE_SETS)
    directory: str | None = setting(None, "where its files lie")
    limit: int | None = setting(None, "training images, always the same ones of the set", least=1)

    def __post_init__(self) -> None:
        check(self, "images")


@dataclass(frozen=True)
class GridConfig:
    """Every combination of these is trained with `seeds` different seeds."""

    initialisation: tuple[str, ...] = setting(INITIALISATIONS, choices=(*INITIALISATIONS, OWN), filled=True)
    scale: tuple[float, ...] = setting((1.0,), "factors of the initial weights", above=0, filled=True)
    lr: tuple[float, ...] = setting((1e-3,), above=0, filled=True)
    weight_decay: tuple[float, ...] = setting((1e-3,), least=0, filled=True)
    seeds: int = setting(1, "models of each combination", least=1)

    def __post_init__(self) -> None:
        check(self, "grid")


@dataclass(frozen=True)
class TrainingConfig:
    """Epochs, which of them are kept as states, batches."""

    epochs: int = setting(50, least=1)
    checkpoints: tuple[int, ...] = setting((20, 30, 40, 50), "epochs that are kept as states", least=1, filled=True)
    batch_size: int = setting(32, least=1)
    optimizer: str = setting("adam", choices=OPTIMIZERS)

    def __post_init__(self) -> None:
        check(self, "training")
        if max(self.checkpoints) > self.epochs:
            raise UserError(
                f"training.checkpoints must be epochs from 1 to {self.epochs}, not {list(self.checkpoints)}"
            )
        if list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise UserError(f"training.checkpoints must rise, not {list(self.checkpoints)}")


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the models; the rest is for testing."""

    train: float = setting(0.8, "share of the models", above=0, most=1)
    val: float = setting(0.05, "share of the models; the rest is for testing", least=0, most=1)

    def __post_init__(self) -> None:
        check(self, "split")
        if self.train + self.val > 1:
            raise UserError(f"split.train and split.val must be at most 1 together, not {self.train}, {self.val}")


MOST_MODELS = 1_000_000  # of a grid


@dataclass(frozen=True)
class ZooConfig:
    """A zoo to train. `group_size` models are trained together, as one task, and see the same batches in order."""

    name: str = setting("zoo", "of the zoo; its models' ids begin with it")
    images: ImagesConfig = field(default_factory=ImagesConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    group_size: int = setting(64, "models trained together, as one task", least=1)
    seed: int = setting(0, "of everything random", least=0)

    def __post_init__(self) -> None:
        check(self)
        if (models := self.models) > MOST_MODELS:
            raise UserError(f"the grid has {models:,} models, more than {MOST_MODELS:,}: shorten its lists or seeds")

    @property
    def models(self) -> int:
        """How many models are trained."""
        grid = self.grid
        return math.prod(map(len, (grid.initialisation, grid.scale, grid.lr, grid.weight_decay))) * grid.seeds


def described(config: ZooConfig) -> dict[str, Any]:
    """The configuration as plain data, by which a zoo is known; that of known networks as it has always been."""
    flat = flatten(config)
    if config.architecture.module is None:
        del flat["architecture.module"]
    return flat


@dataclass(frozen=True)
class ModelPlan:
    """One model to train."""

    model_id: str
    initialisation: str
    scale: float
    lr: float
    weight_decay: float
    seed: int
    split: str


def plan(config: ZooConfig) -> list[ModelPlan]:
    """All models, in a seeded random order. Each combination of the grid has its share in each split, within one model.

    A model's seed depends on its place in the grid alone, so that another grouping trains the same initial weights.
    """
    grid, rng = config.grid, np.random.default_rng(config.seed)
    combinations = list(product(grid.initialisation, grid.scale, grid.lr, grid.weight_decay))
    total = len(combinations) * grid.seeds
    splits = assign_splits(total, config.split)
    models = []
    for number, (kind, scale, lr, decay) in enumerate(combinations):
        shuffled = rng.permutation(grid.seeds)
        for k, replica in enumerate(shuffled):
            index = number * grid.seeds + int(replica)
            model_seed = int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0])
            split = splits[number * grid.seeds + k]
            models.append(ModelPlan(f"{config.name}-{index:05d}", kind, scale, lr, decay, model_seed, split))
    return [models[i] for i in rng.permutation(total)]


def assign_splits(total: int, shares: SplitConfig) -> list[str]:
    """A split for each of `total` models, evenly interleaved: any run of models has its shares within one model."""
    wanted = np.array([shares.train, shares.val, 1 - shares.train - shares.val])
    given = np.zeros(3)
    names = []
    for count in range(1, total + 1):
        chosen = int(np.argmax(wanted * count - given - 1e-9 * np.arange(3)))
        given[chosen] += 1
        names.append(SPLITS[chosen])
    return names


def groups(config: ZooConfig) -> Iterator[list[ModelPlan]]:
    """The models of each task."""
    models = plan(config)
    for start in range(0, len(models), config.group_size):
        yield models[start : start + config.group_size]


# About 1,000 small CNNs on digits whose weights are mostly learned, not left over from initialisation: small initial
# weights, strong decay. An autoencoder learns such a zoo in minutes.
DIGITS_ZOO = ZooConfig(
    name="digits",
    grid=GridConfig(scale=(0.4,), lr=(1e-3, 2e-3), weight_decay=(1.25e-3, 2.5e-3, 5e-3), seeds=42),
    training=TrainingConfig(epochs=12, checkpoints=(4, 8, 12)),
)

# The four initialisations of "Structure Is Not Enough" (arXiv 2503.17138) at full scale with its learning rates and
# weight decays: a much harder zoo, most of whose numbers are what initialisation left.
DIGITS_PAPER_ZOO = ZooConfig(
    name="digits-paper",
    grid=GridConfig(lr=(1e-4, 2.5e-4, 5e-4, 7.5e-4, 1e-3), weight_decay=(1e-4, 5e-4, 1e-3), seeds=20),
    training=TrainingConfig(epochs=50, checkpoints=(20, 30, 40, 50)),
)

# The smallest that every task can use, for smoke runs; nothing can be learned from it.
SMOKE_ZOO = ZooConfig(
    name="smoke",
    grid=GridConfig(scale=(0.4,), lr=(5e-3,), seeds=12),
    training=TrainingConfig(epochs=2, checkpoints=(1, 2)),
    split=SplitConfig(train=0.5, val=0.25),
)

ZOOS = {"digits": DIGITS_ZOO, "digits_paper": DIGITS_PAPER_ZOO, "smoke": SMOKE_ZOO}


GRIDS = Path(__file__).parent / "grids"


def named_zoos() -> list[str]:
    """The zoos that come with the package: `ZOOS`, and the papers' grids as files."""
    return [*ZOOS, *sorted(path.stem for path in GRIDS.glob("*.yaml"))]


def read_config(name: str) -> ZooConfig:
    """A shipped zoo's configuration, or that of a YAML file with dotted keys.

    Raises UserError that names the file and the key.
    """
    if name in ZOOS:
        return ZOOS[name]
    path = GRIDS / f"{name}.yaml" if (GRIDS / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        raise UserError(f"{name}: no such file, and no zoo of that name comes along{nearest(name, named_zoos())}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be dotted keys with values")
    return replace(ZooConfig(), values, str(path))
