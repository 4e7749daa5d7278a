"""Black boxes from the command line: weights in a safetensors file, or any MODULE:CALLABLE.

Legend: Q queries, I inputs, O outputs.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import Function
from distrecon.expand_cluster.weights import Weights, network, read_weights


@dataclass(frozen=True)
class Source:
    """A black box, its input size where that is known, its weights where they may be used to score a recovery."""

    black_box: Function
    input_size: int | None
    weights: Weights | None


def load_black_box(spec: str, activation: str) -> Source:
    """The black box named by `spec`: a .safetensors file of dense layers, or MODULE:CALLABLE.

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

    def answer(x_QI: Tensor) -> Tensor:
        parameter = next(found.parameters(), None) if isinstance(found, torch.nn.Module) else None
        return found(x_QI if parameter is None else x_QI.to(parameter))

    return Source(answer, None, None)
