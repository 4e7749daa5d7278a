"""Probes: linear maps from a model's features to its properties, and where they lie beside an autoencoder.

`probes.safetensors` holds each probe's tensors, `probes.json` the rest. How features are made and probes fitted is in
`predict.py`.

Legend: B models, F features.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit, logit

from distrecon.errors import UserError

FORMAT = "distrecon.probes"
VERSION = 1
JSON, TENSORS = "probes.json", "probes.safetensors"


@dataclass(frozen=True)
class Link:
    """What of a property is linear in the features (generalised linear models), and back."""

    forward: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


SHARE = 1e-3  # a share of 0 or 1 counts as half of this from it
LINKS = {
    "identity": Link(lambda value_B: value_B, lambda linear_B: linear_B),
    "logit": Link(  # of shares, which saturate
        lambda value_B: logit(SHARE / 2 + (1 - SHARE) * value_B),
        lambda linear_B: (expit(linear_B) - SHARE / 2) / (1 - SHARE),
    ),
}


@dataclass(frozen=True)
class Probe:
    """`back(intercept + ((f - mean) / scale) @ weight)` of features f[B, F], in float64; `back` is the link's."""

    mean_F: np.ndarray
    scale_F: np.ndarray
    weight_F: np.ndarray
    intercept: float
    link: str = "identity"

    def __call__(self, features_BF: np.ndarray) -> np.ndarray:
        linear_B = ((features_BF - self.mean_F) / self.scale_F) @ self.weight_F + self.intercept
        return LINKS[self.link].back(linear_B)


@dataclass(frozen=True)
class PropertyProbe:
    """A property's probe, the name of its features (`predict.features`), and how good it was on test models."""

    probe: Probe
    features: str
    r2: float
    error: float  # root mean squared, in the property's units


@dataclass(frozen=True)
class Probes:
    """What predicts properties of the models of one of an autoencoder's zoos, by the properties' names."""

    zoo: int
    of: Mapping[str, PropertyProbe]


def save_probes(folder: Path, probes: Probes) -> None:
    """Writes both files into a folder that exists; the tensors first, so that the JSON means complete."""
    tensors: dict[str, np.ndarray] = {}
    for name, found in probes.of.items():
        parts = {"mean": found.probe.mean_F, "scale": found.probe.scale_F, "weight": found.probe.weight_F}
        tensors |= {f"{name}.{part}": np.ascontiguousarray(values) for part, values in parts.items()}
    save_file(tensors, folder / TENSORS)
    described = {
        name: {
            "features": p.features,
            "link": p.probe.link,
            "intercept": p.probe.intercept,
            "r2": p.r2,
            "error": p.error,
        }
        for name, p in probes.of.items()
    }
    content = {"format": FORMAT, "version": VERSION, "zoo": probes.zoo, "properties": described}
    (folder / JSON).write_text(json.dumps(content, indent=1) + "\n")


def load_probes(folder: Path) -> Probes:
    """The probes saved in `folder`. Raises UserError when there are none, damaged ones, or those of a newer format."""
    if not (folder / JSON).is_file():
        raise UserError(
            f"{folder} holds no probes: run python -m distrecon.evaluate --autoencoder ... --zoo ... and name its run"
        )
    try:
        content = json.loads((folder / JSON).read_text())
        if content["format"] != FORMAT or content["version"] > VERSION:
            raise UserError(f"{folder / JSON}: not probes that this distrecon can read; update it")
        tensors = load_file(folder / TENSORS)
        of = {}
        for name, described in content["properties"].items():
            mean_F, scale_F, weight_F = (tensors[f"{name}.{part}"] for part in ("mean", "scale", "weight"))
            if described["link"] not in LINKS:
                raise UserError(
                    f"{folder / JSON}: a link {described['link']!r} is not known to this distrecon; update it"
                )
            probe = Probe(mean_F, scale_F, weight_F, described["intercept"], described["link"])
            of[name] = PropertyProbe(probe, described["features"], described["r2"], described["error"])
        return Probes(content["zoo"], of)
    except UserError:
        raise
    except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"the probes in {folder} cannot be read: {error}") from None
