"""The known networks: a function each, by name in `ARCHITECTURES`.

Adding an architecture is adding one function to that table.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from distrecon.errors import UserError, nearest
from distrecon.nets.architectures import Architecture, ChainArchitecture
from distrecon.nets.layers import Layer
from distrecon.nets.trace import of_module


def mlp(sizes: Sequence[int] = (64, 20, 10), activation: str = "tanh") -> ChainArchitecture:
    """Linear layers between the given sizes, inputs and outputs included."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise UserError(f"mlp needs at least two positive sizes, not {list(sizes)}")
    layers = tuple(Layer(f"layers.{i}", a, b) for i, (a, b) in enumerate(pairwise(sizes)))
    return ChainArchitecture("mlp", layers, activation, (sizes[0],))


def cnn(
    name: str,
    convolutions: Sequence[Mapping[str, Any]],
    linears: Sequence[tuple[str, int]],
    in_channels: int,
    image_size: int,
    activation: str,
) -> ChainArchitecture:
    """Convolutions (name, out, kernel, padding, pool), then linear layers (name, out)."""
    layers, channels, size = [], in_channels, image_size
    for conv in convolutions:
        layer = Layer(conv["name"], channels, conv["out"], conv["kernel"], conv.get("padding", 0), conv.get("pool", 1))
        layers.append(layer)
        channels, size = layer.out_features, (size + 2 * layer.padding - layer.kernel + 1) // layer.pool
        if size < 1:
            raise UserError(f"{name}: images of {image_size}x{image_size} are too small for its convolutions")
    features, positions = channels * size * size, size * size
    for linear_name, out in linears:
        layers.append(Layer(linear_name, features, out, positions=positions))
        features, positions = out, 1
    return ChainArchitecture(name, tuple(layers), activation, (in_channels, image_size, image_size))


def cnn_small(
    in_channels: int = 1, image_size: int = 8, num_classes: int = 10, activation: str = "relu"
) -> ChainArchitecture:
    """The digits zoo's network: 1,198 parameters in 40 tokens for 8x8 images."""
    convolutions = [
        {"name": "conv1", "out": 6, "kernel": 3, "padding": 1, "pool": 2},
        {"name": "conv2", "out": 8, "kernel": 3},
    ]
    linears = [("fc1", 16), ("fc2", num_classes)]
    return cnn("cnn_small", convolutions, linears, in_channels, image_size, activation)


def cnn3(
    in_channels: int = 3, image_size: int = 32, num_classes: int = 10, activation: str = "relu"
) -> ChainArchitecture:
    """The network of "Structure Is Not Enough": 10,853 parameters in 93 tokens for 3x32x32 images."""
    convolutions = [{"name": f"conv{i + 1}", "out": out, "kernel": 3, "pool": 2} for i, out in enumerate((16, 32, 15))]
    linears = [("fc1", 20), ("fc2", num_classes)]
    return cnn("cnn3", convolutions, linears, in_channels, image_size, activation)


def lenet5(
    in_channels: int = 3, image_size: int = 32, num_classes: int = 10, activation: str = "relu"
) -> ChainArchitecture:
    """LeNet-5 with max pooling."""
    convolutions = [{"name": f"conv{i + 1}", "out": out, "kernel": 5, "pool": 2} for i, out in enumerate((6, 16))]
    linears = [("fc1", 120), ("fc2", 84), ("fc3", num_classes)]
    return cnn("lenet5", convolutions, linears, in_channels, image_size, activation)


def zoo_cnn(
    in_channels: int = 1, image_size: int = 28, num_classes: int = 10, activation: str = "tanh"
) -> ChainArchitecture:
    """ "CNN" of the published model zoos (modelzoos.cc): 2,464 parameters for 1x28x28 images."""
    return _module_list("zoo_cnn", (8, 6, 4), in_channels, image_size, num_classes, activation)


def zoo_cnn2(
    in_channels: int = 1, image_size: int = 28, num_classes: int = 10, activation: str = "tanh"
) -> ChainArchitecture:
    """ "CNN2" of the published model zoos: its sibling with 6, 9 and 6 channels."""
    return _module_list("zoo_cnn2", (6, 9, 6), in_channels, image_size, num_classes, activation)


def _module_list(
    name: str, channels: tuple[int, int, int], in_channels: int, image_size: int, num_classes: int, activation: str
) -> ChainArchitecture:
    """Two pooled 5x5 convolutions and a 2x2 one, named as the published state dicts name them (without dropout)."""
    convolutions = [
        {"name": f"module_list.{3 * i}", "out": out, "kernel": kernel, "pool": pool}
        for i, (out, kernel, pool) in enumerate(zip(channels, (5, 5, 2), (2, 2, 1), strict=True))
    ]
    linears = [("module_list.9", 20), ("module_list.11", num_classes)]
    return cnn(name, convolutions, linears, in_channels, image_size, activation)


ARCHITECTURES: dict[str, Callable[..., ChainArchitecture]] = {
    "mlp": mlp,
    "cnn_small": cnn_small,
    "cnn3": cnn3,
    "lenet5": lenet5,
    "zoo_cnn": zoo_cnn,
    "zoo_cnn2": zoo_cnn2,
}


def architecture(name: str | nn.Module, inputs: Tensor | None = None, **options: Any) -> Architecture:
    """The architecture called `name`, e.g. `architecture("cnn3", in_channels=3, image_size=32)`.

    Or that of any torch module, traced on example `inputs` [Q, ...]; its options are those of `of_module`.
    """
    if isinstance(name, nn.Module):
        if inputs is None:
            raise UserError("architecture(module) needs inputs=, an example [Q, ...] of what the module reads")
        return of_module(name, inputs, **options)
    if name not in ARCHITECTURES:
        raise UserError(f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}")
    try:
        return ARCHITECTURES[name](**options)
    except TypeError as error:
        raise UserError(f"architecture {name!r}: {error}") from None
