"""Black boxes from the command line: weights in a safetensors file, or any MODULE:CALLABLE.

Legend: Q queries, I inputs, O outputs.
"""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import Teacher
from distrecon.expand_cluster.teachers import Weights, network


@dataclass(frozen=True)
class Source:
    """A teacher, its input size where that is known, and its weights where they may be used to score a recovery."""

    teacher: Teacher
    input_size: int | None
    weights: Weights | None


def load_teacher(spec: str, activation: str) -> Source:
    """The teacher named by `spec`: a .safetensors file of dense layers, or MODULE:CALLABLE.

    The answers keep the file's own precision. Raises UserError that says what cannot be read.
    """
    if Path(spec).suffix == ".safetensors":
        weights = read_weights(Path(spec))
        return Source(network(weights, activation), weights[0][0].shape[1], weights)
    module_name, colon, name = spec.partition(":")
    if not colon or not name:
        raise UserError(f"a teacher is a .safetensors file or MODULE:CALLABLE, not {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"the teacher's module {module_name!r} cannot be imported: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"the teacher's module {module_name!r} has no callable {name!r}")

    def ask(x_QI: Tensor) -> Tensor:
        parameter = next(found.parameters(), None) if isinstance(found, torch.nn.Module) else None
        return found(x_QI if parameter is None else x_QI.to(parameter))

    return Source(ask, None, None)


def read_weights(path: Path) -> Weights:
    """[(W, b), ...] of dense layers from NAME.weight and NAME.bias, in the natural order of the names.

    Raises UserError when the file is missing, is no safetensors file, or holds anything but a chain of dense layers.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    names = sorted((n for n in tensors if n.endswith(".weight")), key=_natural)
    weights: Weights = []
    for name in names:
        bias = name.removesuffix("weight") + "bias"
        if bias not in tensors or tensors[name].ndim != 2 or tensors[bias].shape != tensors[name].shape[:1]:
            raise UserError(f"{path}: {name} {list(tensors[name].shape)} is not a dense layer with a bias")
        if weights and weights[-1][0].shape[0] != tensors[name].shape[1]:
            raise UserError(f"{path}: {name} does not take the outputs of the layer before it")
        weights.append((tensors[name], tensors[bias]))
    if len(weights) < 2 or len(tensors) != 2 * len(weights):
        raise UserError(f"{path}: not a chain of at least two dense layers NAME.weight, NAME.bias")
    return weights


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer10 after layer9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
