"""Places networks in the zoo that an autoencoder was trained on: what `distrecon.recover` and `evaluate` share."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder.model import Autoencoder
from distrecon.autoencoder.place import Place, place, zoo_with
from distrecon.autoencoder.probes import Probes, load_probes
from distrecon.autoencoder.scoring import zoo_index
from distrecon.autoencoder.store import load_autoencoder
from distrecon.errors import UserError
from distrecon.kinds.autoencoder import autoencoder_folder, zoo_folder
from distrecon.nets import Architecture
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos.checkpoints import read_state_dict, to_theta


@dataclass(frozen=True)
class Placer:
    """An autoencoder with its probes and the zoo that these were fitted on."""

    run: str
    autoencoder: Autoencoder
    probes: Probes
    zoo: Zoo

    @staticmethod
    def of(args: argparse.Namespace) -> "Placer":
        """Of the options --autoencoder and --zoo (default: the run's). UserError for what is missing or differs."""
        folder = autoencoder_folder(args.autoencoder)
        autoencoder, probes = load_autoencoder(folder), load_probes(folder)
        zoo = open_zoo(args.zoo or zoo_folder(args.autoencoder))
        if zoo_index(autoencoder, zoo) != probes.zoo:
            raise UserError(f"{zoo.store}: the probes of {args.autoencoder} are of another of its zoos")
        return Placer(args.autoencoder, autoencoder, probes, zoo)

    def layers(
        self, weights: Sequence[tuple[Tensor, Tensor]], activation: str, images: Architecture | None = None
    ) -> Place:
        """The place of a network of layers [(W[out, in, ...], b[out]), ...]; UserError when the zoo has no such.

        `images`: what it is, if it has convolutions.
        """
        zoo_with([self.zoo.architecture], weights, activation, images)
        return self._place(torch.cat([part.flatten() for layer in weights for part in layer]))

    def file(self, path: str) -> Place:
        """The place of the network in a checkpoint file; UserError when the zoo has no such."""
        if not Path(path).is_file():
            raise UserError(f"--model {path}: no such file")
        return self._place(to_theta(self.zoo.architecture, read_state_dict(Path(path).read_bytes(), path), path))

    def _place(self, theta_P: Tensor) -> Place:
        return place(self.autoencoder, self.probes, theta_P, self.zoo.models("train"), self.zoo.models("val"))

    # -- what is told of it -------------------------------------------------------------------------------------------

    def summary(self, found: Place) -> dict[str, Any]:
        """For summary.json."""
        return {
            "autoencoder": str(self.run),
            "zoo": str(self.zoo.store),
            "predicted": found.predicted,
            "error": {name: probe.error for name, probe in self.probes.of.items()},
            "nearest": [asdict(neighbour) for neighbour in found.nearest],
            "novelty": found.novelty,
        }

    def lines(self, found: Place) -> list[str]:
        """For people."""
        values = [
            f"{name.replace('_', ' ')} {value:.3g} (error on held-out models {self.probes.of[name].error:.2g})"
            for name, value in found.predicted.items()
        ]
        nearest = [
            f"{n.model_id} at {n.distance:.3g} (epoch {n.epoch}, test accuracy {n.test_accuracy:.3g})"
            for n in found.nearest
        ]
        return [
            f"predicted    {', '.join(values) or 'nothing: the zoo varies in no property'}",
            f"nearest      {', '.join(nearest)}",
            f"novelty      {found.novelty:.2f} times as far from them as held-out models of {self.zoo.name} are",
        ]

    def arrays(self, found: Place) -> dict[str, np.ndarray]:
        """For the figure; none where no accuracy is predicted."""
        if "test_accuracy" not in found.predicted:
            return {}
        accuracy_N = self.zoo.models("train").test_accuracy_B
        error = self.probes.of["test_accuracy"].error
        return {
            "place/distance": found.distance_N.numpy(),
            "place/accuracy": accuracy_N.numpy(),
            "place/predicted": np.array([found.predicted["test_accuracy"], error]),
            "place/lines": np.array([" ".join(line.split()) for line in self.lines(found)]),
        }


def metrics(found: Place) -> dict[str, float]:
    """What was found as metrics `place/...`, which the kinds list."""
    named = {f"place/{name}": value for name, value in found.predicted.items()}
    return {**named, "place/distance": found.nearest[0].distance, "place/novelty": found.novelty}
