"""Black boxes from the command line: weights in a safetensors file, or any MODULE:CALLABLE.

Legend: Q queries, I inputs, O outputs.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from distrecon.errors import UserError
from distrecon.expand_cluster.convolution.files import read_chain
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.weights import Weights, network, read_weights


@dataclass(frozen=True)
class Source:
    """A black box, its input size where that is known, its weights where they may be used to score a recovery."""

    black_box: Callable[..., Any]
    input_size: int | None
    weights: Weights | None


def load_black_box(spec: str, activation: str, hypothesis: Hypothesis | None = None) -> Source:
    """The black box named by `spec`: a .safetensors file of dense layers, or MODULE:CALLABLE.

    With a hypothesis the file is a state dict of such a network.

    CALLABLE may be a method, such as classifier.predict_proba. The answers keep the file's own precision. Raises
    UserError that says what cannot be read.
    """
    if Path(spec).suffix == ".safetensors":
        if hypothesis is not None:
            chain = read_chain(Path(spec), hypothesis, activation)
            return Source(chain.module().requires_grad_(False), None, chain.weights)
        weights = read_weights(Path(spec))
        return Source(network(weights, activation), weights[0][0].shape[1], weights)
    module_name, colon, name = spec.partition(":")
    if not colon or not name:
        raise UserError(f"a teacher is a .safetensors file or MODULE:CALLABLE, not {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"the teacher's module {module_name!r} cannot be imported: {error}") from None
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        found = None
    if not callable(found):
        raise UserError(f"the teacher's module {module_name!r} has no callable {name!r}")
    return Source(found, None, None)
