"""Which architecture a state dict belongs to, from the shapes of its entries alone.

A state dict shows kernels and sizes, not pooling or activation: those come from the known architecture that has the
same weights in the same order. Its layers then take the state dict's own names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.architectures import ChainArchitecture
from distrecon.nets.known import ARCHITECTURES, mlp

IMAGE_SIZES = (28, 32, 8, *range(4, 129))  # the usual ones first: several sizes may fit, as pooling rounds down

Shapes = list[tuple[str, tuple[int, ...]]]


def recognise(state_dict: Mapping[str, Tensor], activation: str = "relu", name: str | None = None) -> ChainArchitecture:
    """The architecture of a state dict, with its names; `name` restricts the search to one known architecture.

    Raises UserError that says what does not fit when no known architecture has these weights.
    """
    for weights in _orders(state_dict):
        for candidate in _candidates(weights, activation, name):
            if [layer.weight_shape for layer in candidate.layers] == [shape for _, shape in weights]:
                return _renamed(candidate, weights)
    shapes = ", ".join(f"{prefix} {'x'.join(map(str, shape))}" for prefix, shape in next(_orders(state_dict)))
    raise UserError(f"no known architecture{f' called {name!r}' if name else ''} has the weights {shapes}")


def flatten_as(arch: ChainArchitecture, state_dict: Mapping[str, Tensor]) -> Tensor:
    """theta[P] of a state dict whose layers have the architecture's shapes, in its order if not under its names.

    (Dropout layers shift the numbers in a module list's names.) Raises UserError that names what does not fit.
    """
    if state_dict.keys() == arch.state_shapes().keys():
        return arch.flatten(state_dict)
    for weights in _orders(state_dict):
        if [shape for _, shape in weights] == [layer.weight_shape for layer in arch.layers]:
            return _renamed(arch, weights).flatten(state_dict)
    return arch.flatten(state_dict)  # which says what differs


def _orders(state_dict: Mapping[str, Tensor]) -> Iterator[Shapes]:
    """The weighted layers in the orders worth trying: as they come, then convolutions first and by number in the name.

    Raises UserError for an entry that is neither a weight nor the bias of one.
    """
    names = [key.removesuffix(".weight") for key in state_dict if key.endswith(".weight")]
    expected = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    for key in [*state_dict, *expected]:
        if key not in expected or key not in state_dict:
            raise UserError(f"{key!r} {'is not a weight or bias' if key in state_dict else 'is missing'}")
    if not names:
        raise UserError("the state dict is empty")
    given = [(name, tuple(state_dict[f"{name}.weight"].shape)) for name in names]
    yield given
    yield sorted(given, key=lambda item: (-len(item[1]), _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key by which conv10 comes after conv9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _candidates(weights: Shapes, activation: str, name: str | None) -> Iterator[ChainArchitecture]:
    first, last = weights[0][1], weights[-1][1]
    for known in ARCHITECTURES if name is None else [name]:
        if known == "mlp":
            if all(len(shape) == 2 for _, shape in weights):
                yield mlp((first[1], *(shape[0] for _, shape in weights)), activation)
        elif len(first) == 4:
            yield from _sized(known, first[1], last[0], activation)


def _sized(known: str, channels: int, classes: int, activation: str) -> Iterator[ChainArchitecture]:
    for size in IMAGE_SIZES:
        try:
            yield ARCHITECTURES[known](
                in_channels=channels, image_size=size, num_classes=classes, activation=activation
            )
        except UserError:  # images too small for its convolutions
            continue


def _renamed(arch: ChainArchitecture, weights: Shapes) -> ChainArchitecture:
    layers = tuple(replace(layer, name=name) for layer, (name, _) in zip(arch.layers, weights, strict=True))
    return replace(arch, layers=layers)
