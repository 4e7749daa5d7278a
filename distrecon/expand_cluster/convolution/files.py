"""Convolutional networks on disk: the state dict of `Chain.module`, with what it is as metadata."""

import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from distrecon.errors import UserError
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis, read_layers
from distrecon.expand_cluster.convolution.network import Chain
from distrecon.expand_cluster.weights import read_pairs
from distrecon.nets.activations import activation as find_activation


def write_chain(path: Path, chain: Chain, metadata: dict[str, str]) -> None:
    """The module's state dict as safetensors. Raises UserError where the file exists."""
    if path.exists():
        raise UserError(f"{path} exists already; recovered networks are never overwritten")
    shape = " ".join(map(str, chain.hypothesis.input_shape))
    what = {"layers": chain.hypothesis.text, "input_shape": shape, "activation": chain.activation.name}
    save_file(chain.module().state_dict(), path, metadata | what)


def stored_chain(path: Path) -> Chain | None:
    """The network of a file that `write_chain` wrote; None of other safetensors files."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata() or {}
    if "layers" not in metadata:
        return None
    channels, height, width = map(int, metadata["input_shape"].split())
    return read_chain(path, read_layers(metadata["layers"], (channels, height, width)), metadata["activation"])


def read_chain(path: Path, hypothesis: Hypothesis, activation: str) -> Chain:
    """A network of known layers from a state dict with one weight and one bias for each, in the natural order.

    Raises UserError when the file is missing, is no safetensors file, or holds anything else.
    """
    layers = read_pairs(path)
    if len(layers) != (wanted := len(hypothesis.stages) + 1):
        raise UserError(f"{path}: not the {wanted} layers NAME.weight, NAME.bias of {hypothesis.text!r}")
    weights, below = [], hypothesis.input_shape[0]
    for number, (name, w, b) in enumerate(layers):
        last = number == len(hypothesis.stages)
        stage = hypothesis.stages[number - 1 if last else number]
        flat = below * (stage.positions if last else math.prod(stage.kernel))
        shape = (len(w), flat) if last or stage.dense else (len(w), below, *stage.kernel)
        if tuple(w.shape) != shape or b.shape != shape[:1]:
            raise UserError(f"{path}: {name} has shape {list(w.shape)}, {hypothesis.text!r} needs {list(shape)}")
        weights.append((w, b))
        below = len(w)
    return Chain(hypothesis, weights, find_activation(activation))
