"""Architectures as data: a network is a tuple of weighted layers, a model is a flat vector theta[P].

Everything that depends on the architecture is an index map over theta, compiled once and cached:

- the flat order is the state dict's: layer by layer, weight then bias;
- a token is one output channel: its flattened weights, then its bias, zero padded (SANE; arXiv 2503.17138);
- a permutation of hidden units is a gather (see `symmetries.py`).

Adding an architecture is adding one function to `ARCHITECTURES`.

Legend: B models, P parameters, T tokens, D token size, Q queries, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError, nearest
from distrecon.nets import forward as _forward
from distrecon.nets import symmetries as _symmetries
from distrecon.nets.activations import activation as _activation


@dataclass(frozen=True)
class Layer:
    """A weighted layer: a convolution (kernel > 0) or a linear map (kernel = 0), then max pooling, then the activation.

    `positions` is the number of spatial positions that each incoming channel has after flattening: a linear layer
    that follows a convolution reads `in_features = channels * positions` numbers, channel by channel.
    """

    name: str  # prefix in the state dict
    in_features: int
    out_features: int
    kernel: int = 0
    padding: int = 0
    pool: int = 1
    positions: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        square = (self.kernel, self.kernel) if self.kernel else ()
        return (self.out_features, self.in_features, *square)

    @property
    def fan_in(self) -> int:
        """Weights of one output channel."""
        return prod(self.weight_shape[1:])

    @property
    def num_parameters(self) -> int:
        return self.out_features * (self.fan_in + 1)


@dataclass(frozen=True)
class Architecture:
    """A feed-forward network whose every layer but the last is followed by `activation`.

    `input_shape` is (I,) for vectors or (channels, height, width) for images.
    """

    name: str
    layers: tuple[Layer, ...]
    activation: str
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _activation(self.activation)

    # -- sizes and index maps -----------------------------------------------------------------------------------------

    @cached_property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def num_outputs(self) -> int:
        return self.layers[-1].out_features

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer's parameters start in theta, and the end of the last."""
        starts = [0]
        for layer in self.layers:
            starts.append(starts[-1] + layer.num_parameters)
        return tuple(starts)

    @cached_property
    def num_tokens(self) -> int:
        return sum(layer.out_features for layer in self.layers)

    @cached_property
    def token_size(self) -> int:
        return max(layer.fan_in for layer in self.layers) + 1

    @cached_property
    def token_index_TD(self) -> Tensor:
        """Position in theta of each token entry; P (one past the end) where the token is padding."""
        index_TD = torch.full((self.num_tokens, self.token_size), self.num_parameters)
        row = 0
        for layer, start in zip(self.layers, self.offsets, strict=False):
            out, fan_in = layer.out_features, layer.fan_in
            index_TD[row : row + out, :fan_in] = start + torch.arange(out * fan_in).view(out, fan_in)
            index_TD[row : row + out, fan_in] = start + out * fan_in + torch.arange(out)
            row += out
        return index_TD

    @cached_property
    def token_mask_TD(self) -> Tensor:
        """True where a token entry is a parameter, False where it is padding."""
        return self.token_index_TD < self.num_parameters

    @cached_property
    def token_positions_T3(self) -> Tensor:
        """(index in the sequence, layer, index in the layer) of each token."""
        layer_T = torch.cat([torch.full((layer.out_features,), i) for i, layer in enumerate(self.layers)])
        within_T = torch.cat([torch.arange(layer.out_features) for layer in self.layers])
        return torch.stack([torch.arange(self.num_tokens), layer_T, within_T], dim=1)

    @cached_property
    def layer_of_parameter_P(self) -> Tensor:
        """Layer index of each entry of theta."""
        return torch.cat([torch.full((layer.num_parameters,), i) for i, layer in enumerate(self.layers)])

    # -- theta and its other forms ------------------------------------------------------------------------------------

    def weights_and_biases(self, theta_BP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of theta: per layer the weight [B, *weight_shape] and the bias [B, out]."""
        self.check(theta_BP)
        views = []
        for layer, start, end in zip(self.layers, self.offsets, self.offsets[1:], strict=False):
            split = end - layer.out_features
            views.append((theta_BP[:, start:split].unflatten(1, layer.weight_shape), theta_BP[:, split:end]))
        return views

    def flatten(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """theta[P] of a state dict with this architecture's names and shapes; UserError names an entry that differs."""
        expected = self.state_shapes()
        for name in [*expected, *state_dict]:
            if name not in state_dict or name not in expected:
                where = "is missing from the state dict" if name in expected else "is not part of"
                raise UserError(f"{name!r} {where} {'' if name in expected else self.name}".rstrip())
            if tuple(state_dict[name].shape) != expected[name]:
                raise UserError(
                    f"{name!r} has shape {tuple(state_dict[name].shape)}, {self.name} needs {expected[name]}"
                )
        return torch.cat([state_dict[name].reshape(-1) for name in expected])

    def unflatten(self, theta_P: Tensor) -> dict[str, Tensor]:
        """The state dict of one model, as torch modules load it."""
        values = [value[0] for pair in self.weights_and_biases(theta_P[None]) for value in pair]
        return {name: value.clone() for name, value in zip(self.state_shapes(), values, strict=True)}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every entry of the state dict, in order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            shapes[f"{layer.name}.weight"] = layer.weight_shape
            shapes[f"{layer.name}.bias"] = (layer.out_features,)
        return shapes

    def tokenize(self, theta_BP: Tensor) -> Tensor:
        """tokens[B, T, D]; padding is zero."""
        rows = [
            F.pad(torch.cat([weight.flatten(2), bias_BO[:, :, None]], 2), (0, self.token_size - layer.fan_in - 1))
            for layer, (weight, bias_BO) in zip(self.layers, self.weights_and_biases(theta_BP), strict=True)
        ]  # what token_index_TD says, layer by layer: faster than a gather, its gradient many times
        return torch.cat(rows, dim=1)

    def detokenize(self, tokens_BTD: Tensor) -> Tensor:
        """theta[B, P], the inverse of `tokenize`; what lies in the padding is ignored."""
        expected, shape = (self.num_tokens, self.token_size), tuple(tokens_BTD.shape[1:])
        if shape != expected:
            raise UserError(f"{self.name} has tokens of shape {expected}, not {shape}")
        parts, row = [], 0
        for layer in self.layers:
            rows_BOD = tokens_BTD[:, row : row + layer.out_features]
            parts += [rows_BOD[:, :, : layer.fan_in].flatten(1), rows_BOD[:, :, layer.fan_in]]
            row += layer.out_features
        return torch.cat(parts, dim=1)

    def check(self, theta_BP: Tensor) -> None:
        """Raises UserError unless theta is [B, P]."""
        if theta_BP.ndim != 2 or theta_BP.shape[1] != self.num_parameters:
            raise UserError(
                f"{self.name} has {self.num_parameters} parameters a model; "
                f"got weights of shape {tuple(theta_BP.shape)}, wanted [models, {self.num_parameters}]"
            )

    # -- function and symmetries --------------------------------------------------------------------------------------

    def forward(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        """logits[B, Q, C] of B models on the shared inputs [Q, *input_shape]; differentiable in theta."""
        return _forward.forward(self, theta_BP, inputs)

    def random_permutation(self, generator: torch.Generator | None = None, count: int = 1) -> "list[Tensor]":
        """Per hidden layer a random order of its units for each of `count` models, [count, units]."""
        return _symmetries.random_permutation(self, generator, count)

    def permute(self, theta_BP: Tensor, permutation: "list[Tensor]") -> Tensor:
        """The same functions with their hidden units in another order."""
        return _symmetries.permute(self, theta_BP, permutation)

    def align(self, theta_BP: Tensor, reference_P: Tensor) -> Tensor:
        """Each model with its hidden units ordered as close to the reference as weight matching finds."""
        return _symmetries.align(self, theta_BP, reference_P)

    # -- as plain data ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal architecture."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "input_shape": [*self.input_shape]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Architecture":
        layers = tuple(Layer(**layer) for layer in data["layers"])
        return Architecture(data["name"], layers, data["activation"], tuple(data["input_shape"]))


# -- constructors -----------------------------------------------------------------------------------------------------


def mlp(sizes: Sequence[int] = (64, 20, 10), activation: str = "tanh") -> Architecture:
    """Linear layers between the given sizes, inputs and outputs included."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise UserError(f"mlp needs at least two positive sizes, not {list(sizes)}")
    layers = tuple(Layer(f"layers.{i}", a, b) for i, (a, b) in enumerate(pairwise(sizes)))
    return Architecture("mlp", layers, activation, (sizes[0],))


def cnn(
    name: str,
    convolutions: Sequence[Mapping[str, Any]],
    linears: Sequence[tuple[str, int]],
    in_channels: int,
    image_size: int,
    activation: str,
) -> Architecture:
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
    return Architecture(name, tuple(layers), activation, (in_channels, image_size, image_size))


def cnn_small(
    in_channels: int = 1, image_size: int = 8, num_classes: int = 10, activation: str = "relu"
) -> Architecture:
    """The digits zoo's network: 1,198 parameters in 40 tokens for 8x8 images."""
    convolutions = [
        {"name": "conv1", "out": 6, "kernel": 3, "padding": 1, "pool": 2},
        {"name": "conv2", "out": 8, "kernel": 3},
    ]
    linears = [("fc1", 16), ("fc2", num_classes)]
    return cnn("cnn_small", convolutions, linears, in_channels, image_size, activation)


def cnn3(in_channels: int = 3, image_size: int = 32, num_classes: int = 10, activation: str = "relu") -> Architecture:
    """The network of "Structure Is Not Enough": 10,853 parameters in 93 tokens for 3x32x32 images."""
    convolutions = [{"name": f"conv{i + 1}", "out": out, "kernel": 3, "pool": 2} for i, out in enumerate((16, 32, 15))]
    linears = [("fc1", 20), ("fc2", num_classes)]
    return cnn("cnn3", convolutions, linears, in_channels, image_size, activation)


def lenet5(in_channels: int = 3, image_size: int = 32, num_classes: int = 10, activation: str = "relu") -> Architecture:
    """LeNet-5 with max pooling."""
    convolutions = [{"name": f"conv{i + 1}", "out": out, "kernel": 5, "pool": 2} for i, out in enumerate((6, 16))]
    linears = [("fc1", 120), ("fc2", 84), ("fc3", num_classes)]
    return cnn("lenet5", convolutions, linears, in_channels, image_size, activation)


def zoo_cnn(
    in_channels: int = 1, image_size: int = 28, num_classes: int = 10, activation: str = "tanh"
) -> Architecture:
    """ "CNN" of the published model zoos (modelzoos.cc): 2,464 parameters for 1x28x28 images."""
    return _module_list("zoo_cnn", (8, 6, 4), in_channels, image_size, num_classes, activation)


def zoo_cnn2(
    in_channels: int = 1, image_size: int = 28, num_classes: int = 10, activation: str = "tanh"
) -> Architecture:
    """ "CNN2" of the published model zoos: its sibling with 6, 9 and 6 channels."""
    return _module_list("zoo_cnn2", (6, 9, 6), in_channels, image_size, num_classes, activation)


def _module_list(
    name: str, channels: tuple[int, int, int], in_channels: int, image_size: int, num_classes: int, activation: str
) -> Architecture:
    """Two pooled 5x5 convolutions and a 2x2 one, named as the published state dicts name them (without dropout)."""
    convolutions = [
        {"name": f"module_list.{3 * i}", "out": out, "kernel": kernel, "pool": pool}
        for i, (out, kernel, pool) in enumerate(zip(channels, (5, 5, 2), (2, 2, 1), strict=True))
    ]
    linears = [("module_list.9", 20), ("module_list.11", num_classes)]
    return cnn(name, convolutions, linears, in_channels, image_size, activation)


ARCHITECTURES: dict[str, Callable[..., Architecture]] = {
    "mlp": mlp,
    "cnn_small": cnn_small,
    "cnn3": cnn3,
    "lenet5": lenet5,
    "zoo_cnn": zoo_cnn,
    "zoo_cnn2": zoo_cnn2,
}


def architecture(name: str, **options: Any) -> Architecture:
    """The architecture called `name`, e.g. `architecture("cnn3", in_channels=3, image_size=32)`."""
    if name not in ARCHITECTURES:
        raise UserError(f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}")
    try:
        return ARCHITECTURES[name](**options)
    except TypeError as error:
        raise UserError(f"architecture {name!r}: {error}") from None
