"""An architecture: the networks that a vector theta[P] can be, with the index maps by which it is read, made once.

All that is known of a network's parameters is its `Table`: tensors, groups of units, layers. A chain of layers gives
its table and runs by batched kernels (`forward.py`); any torch module's table is derived by tracing, and it runs by
`torch.func` (`functional.py`). State dict, tokens and theta are three layouts of the same numbers; a token is a row of
a layer, one output channel with its bias and normalisation (SANE; arXiv 2503.17138), cut in pieces where it is longer
than `piece`. Reordering units is in `symmetries.py`.

Legend: B models, P parameters, T tokens, D token size, Q queries, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.errors import UserError
from distrecon.nets import functional
from distrecon.nets.forward import forward
from distrecon.nets.layers import Chain, Layer, convolutions
from distrecon.nets.table import Axis, Entry, Group, Rows, Table

CHUNK_NUMBERS = 60_000_000  # intermediate numbers of a chunk in `plain.forward`: 240 MB in float32; fewer elsewhere
SMALLEST_VARIANCE = 1e-5  # what normalisation commonly adds to a variance: smaller ones are as good as zero


class Architecture(ABC):
    """Parameters, tokens, state dicts and functions of a kind of network; `forward` runs many of them at once."""

    name: str
    input_shape: tuple[int, ...]
    num_outputs: int
    table: Table  # tensors, groups, layers
    piece: int | None  # the largest token
    widest: int  # numbers of the widest intermediate result for one model and one input
    widest_outputs: int  # the same of a layer's outputs alone

    @abstractmethod
    def forward(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        """logits[B, Q, C] of B models on the shared inputs [Q, *input_shape]; differentiable in theta."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal architecture."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What sets it apart from networks with the same weights: its activation, its module."""

    @abstractmethod
    def same_networks(self, other: Architecture) -> bool:
        """Whether the other's models are models of this one, whatever it is called."""

    @property
    @abstractmethod
    def standardised_together_P(self) -> Tensor:
        """For each parameter the number of a set of parameters that have a scale in common."""

    def train_step(self, theta_BP: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward` while fitting, and theta with its normalisation statistics moved, where it has such."""
        return self.forward(theta_BP, inputs), None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of units that may be permuted."""
        return self.table.groups

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.table.layers]

    @property
    def has_statistics(self) -> bool:
        """Whether running statistics of batch normalisation are among its parameters."""
        return any(entry.role == "variance" for entry in self.table.entries)

    def remeasured(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        """theta with the normalisation statistics that these inputs give."""
        return theta_BP

    def to_logarithms(self, theta_BP: Tensor) -> Tensor:
        """theta with logarithms in the places of variances: what can be added to and scaled freely."""
        return theta_BP

    def from_logarithms(self, theta_BP: Tensor) -> Tensor:
        """The inverse of `to_logarithms`; no variance is below zero, whatever the numbers are."""
        return theta_BP

    def describe(self) -> str:
        """The table as text."""
        return f"{self.name}: {self.table.describe()}"

    def with_pieces(self, size: int | None) -> Architecture:
        """The same with tokens of at most this size; None: whole rows."""
        return self if size == self.piece else replace(self, piece=size)  # type: ignore[type-var]

    def check(self, theta_BP: Tensor) -> None:
        """Raises UserError unless theta is [B, P]."""
        if theta_BP.ndim != 2 or theta_BP.shape[1] != self.num_parameters:
            raise UserError(
                f"{self.name} has {self.num_parameters} parameters a model; "
                f"got weights of shape {tuple(theta_BP.shape)}, wanted [models, {self.num_parameters}]"
            )

    @cached_property
    def num_parameters(self) -> int:
        return self.table.num_parameters

    # -- tokens: sizes and index maps ---------------------------------------------------------------------------------

    @cached_property
    def token_size(self) -> int:
        longest = max(map(self.table.width, self.table.layers))
        return longest if self.piece is None else min(self.piece, longest)

    @cached_property
    def num_tokens(self) -> int:
        return len(self.token_positions_T3)

    @cached_property
    def token_index_TD(self) -> Tensor:
        """Position in theta of each token entry; P (one past the end) where the token is padding."""
        return self.table.token_index(self.token_size)

    @cached_property
    def token_mask_TD(self) -> Tensor:
        """True where a token entry is a parameter, False where it is padding."""
        return self.token_index_TD < self.num_parameters

    @cached_property
    def token_positions_T3(self) -> Tensor:
        """(index in the sequence, layer, index in the layer) of each token; a row's pieces follow each other."""
        return self.table.token_positions(self.token_size)

    @cached_property
    def layer_of_parameter_P(self) -> Tensor:
        """Layer index of each entry of theta."""
        return self.table.layer_of_parameter_P

    def tokenize(self, theta_BP: Tensor) -> Tensor:
        """tokens[B, T, D]; padding is zero."""
        index_N, _ = _token_gathers(self, theta_BP.device)
        return F.pad(theta_BP, (0, 1)).index_select(1, index_N).unflatten(1, (self.num_tokens, self.token_size))

    def detokenize(self, tokens_BTD: Tensor) -> Tensor:
        """theta[B, P], the inverse of `tokenize`; what lies in the padding is ignored."""
        expected, shape = (self.num_tokens, self.token_size), tuple(tokens_BTD.shape[1:])
        if shape != expected:
            raise UserError(f"{self.name} has tokens of shape {expected}, not {shape}")
        return tokens_BTD.flatten(1).index_select(1, _token_gathers(self, tokens_BTD.device)[1])

    def tokens_of(self, theta_BP: Tensor, span: slice) -> Tensor:
        """Some of the tokens, [B, t, D]."""
        index_tD = self.token_index_TD[span].to(theta_BP.device)
        return F.pad(theta_BP, (0, 1)).index_select(1, index_tD.flatten()).unflatten(1, (len(index_tD), -1))

    def with_tokens(self, theta_BP: Tensor, tokens_BtD: Tensor, span: slice) -> Tensor:
        """theta with some of its tokens replaced; differentiable in the tokens."""
        index_tD = self.token_index_TD[span].to(theta_BP.device)
        padded_BP = F.pad(theta_BP, (0, 1))
        return padded_BP.index_copy(1, index_tD.flatten(), tokens_BtD.flatten(1).to(theta_BP.dtype))[:, :-1]

    @cached_property
    def _gathers(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _permutation_maps(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    # -- theta and its other forms ------------------------------------------------------------------------------------

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
        for entry in self.table.entries:
            for other in entry.also:
                if not torch.equal(state_dict[other], state_dict[entry.name]):
                    raise UserError(f"{other!r} and {entry.name!r} are one tensor in {self.name}, but differ")
        for constant in self.table.constants:
            given = state_dict[constant.name]
            if not constant.counts and not torch.equal(given.cpu(), constant.tensor().to(given.dtype)):
                raise UserError(f"{constant.name!r} has other values than the constants of {self.name}")
        return torch.cat([state_dict[entry.name].reshape(-1) for entry in self.table.entries])

    def unflatten(self, theta_P: Tensor) -> dict[str, Tensor]:
        """The state dict of one model, as torch modules load it."""
        self.check(theta_P[None])
        found: dict[str, Tensor] = {}
        for entry, value in zip(self.table.entries, self.table.tensors(theta_P[None]), strict=True):
            shaped = value[0].reshape(entry.shape)
            shaped = shaped.clamp_min(0) if entry.role == "variance" else shaped  # as the forward pass reads it
            found |= {name: shaped.clone() for name in (entry.name, *entry.also)}
        found |= {constant.name: constant.tensor() for constant in self.table.constants}
        return {name: found[name] for name in self.state_shapes()}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every entry of the state dict."""
        shapes = {name: entry.shape for entry in self.table.entries for name in (entry.name, *entry.also)}
        return shapes | {constant.name: constant.shape for constant in self.table.constants}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` wrote."""
        if "table" in data:
            table, shape = Table.from_dict(data["table"]), tuple(data["input_shape"])
            return ModuleArchitecture(
                data["name"], table, shape, data["outputs"], data["widest"], data.get("module"), data.get("integers")
            )
        layers = tuple(Layer(**layer) for layer in data["layers"])
        return ChainArchitecture(data["name"], layers, data["activation"], tuple(data["input_shape"]))


def _token_gathers(arch: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    """What tokens [T * D] read of theta and one zero, and theta of tokens."""
    if device not in arch._gathers:
        index_N = arch.token_index_TD.flatten()
        both = torch.cat([index_N, index_N.argsort()[: arch.num_parameters]]).to(device, non_blocking=True)
        arch._gathers[device] = both[: len(index_N)], both[len(index_N) :]
    return arch._gathers[device]


# -- chains of layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainArchitecture(Chain, Architecture):  # type: ignore[override]
    """Layers one behind the other (see `Chain`), which run by kernels of their own."""

    piece: int | None = field(default=None, compare=False)

    @cached_property
    def table(self) -> Table:  # type: ignore[override]
        entries, groups, last = [], [], len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            out: Axis = _units(i, layer.out_features) if i < last else _places(layer.out_features)
            into: Axis = _places(layer.in_features)
            if i:
                below = self.layers[i - 1].out_features
                into = _units(i - 1, below, layer.in_features // below)
            kernel = [_places(layer.kernel)] * (2 if layer.kernel else 0)
            entries.append(Entry(f"{layer.name}.weight", layer.weight_shape, (out, into, *kernel), "weight"))
            entries.append(Entry(f"{layer.name}.bias", (layer.out_features,), (out,), "bias"))
            if i < last:
                groups.append(Group(layer.name, layer.out_features))
        rows = tuple(Rows(layer.name, layer.out_features, (2 * i, 2 * i + 1)) for i, layer in enumerate(self.layers))
        return Table(tuple(entries), tuple(groups), rows)

    @property
    def kind(self) -> str:
        return self.activation

    @cached_property
    def widest(self) -> int:  # type: ignore[override]
        """Bounded by positions x fan-in of any layer."""
        positions = prod(self.input_shape[1:])
        return max(positions * layer.fan_in if layer.kernel else layer.fan_in for layer in self.layers)

    @cached_property
    def widest_outputs(self) -> int:  # type: ignore[override]
        """Numbers of the widest layer's outputs for one model and input."""
        widths = [layer.out_features for layer in self.layers]
        if self.layers[0].kernel:
            widths += [layer.out_features * height * width for layer, (height, width), _ in convolutions(self)]
        return max(widths)

    def same_networks(self, other: Architecture) -> bool:
        return isinstance(other, ChainArchitecture) and (self.layers, self.activation) == (
            other.layers,
            other.activation,
        )

    @property
    def standardised_together_P(self) -> Tensor:
        return self.layer_of_parameter_P

    def tokenize(self, theta_BP: Tensor) -> Tensor:
        if theta_BP.device.type != "cpu" or self._cut:
            return super().tokenize(theta_BP)
        rows = [
            F.pad(torch.cat([weight.flatten(2), bias_BO[:, :, None]], 2), (0, self.token_size - layer.fan_in - 1))
            for layer, (weight, bias_BO) in zip(self.layers, self.weights_and_biases(theta_BP), strict=True)
        ]  # what token_index_TD says, layer by layer: on the CPU faster than a gather, its gradient many times
        return torch.cat(rows, dim=1)

    def detokenize(self, tokens_BTD: Tensor) -> Tensor:
        expected = (self.num_tokens, self.token_size)
        if tokens_BTD.device.type != "cpu" or self._cut or tuple(tokens_BTD.shape[1:]) != expected:
            return super().detokenize(tokens_BTD)
        parts = []
        for layer, rows_BOD in zip(
            self.layers, tokens_BTD.split([layer.out_features for layer in self.layers], dim=1), strict=True
        ):
            padding = self.token_size - layer.fan_in - 1
            weight_BOF, bias_BO1, _ = rows_BOD.split([layer.fan_in, 1, padding], dim=2)
            parts += [weight_BOF.flatten(1), bias_BO1.flatten(1)]
        return torch.cat(parts, dim=1)

    @property
    def _cut(self) -> bool:
        return self.token_size < max(layer.fan_in for layer in self.layers) + 1

    def forward(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        return forward(self, theta_BP, inputs)

    def to_dict(self) -> dict[str, Any]:
        layers = [asdict(layer) for layer in self.layers]
        return {
            "name": self.name,
            "layers": layers,
            "activation": self.activation,
            "input_shape": [*self.input_shape],
        }


def _places(count: int) -> Axis:
    return (((None, count),),) if count > 1 else ((),)


def _units(group: int, count: int, each: int = 1) -> Axis:
    """Units of a group, each with so many numbers."""
    return (((group, count), *(((None, each),) if each > 1 else ())),)


# -- any torch module --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleArchitecture(Architecture):
    """The networks that a torch module's state dicts are, by the table that was derived from it.

    `source` says where the module came from, for people: nothing is ever imported by it. Without `module` (a zoo that
    was opened) everything but running the networks works. `integers`: inputs are whole numbers below it.
    """

    name: str
    table: Table
    input_shape: tuple[int, ...]
    num_outputs: int
    widest: int = field(compare=False)
    source: str | None = field(default=None, compare=False)
    integers: bool | None = field(default=None, compare=False)
    module: nn.Module | None = field(default=None, compare=False, repr=False)
    make: Callable[[], nn.Module] | None = field(default=None, compare=False, repr=False)
    piece: int | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        return f"module {self.source or 'given in Python'}"

    @property
    def widest_outputs(self) -> int:  # type: ignore[override]
        return self.widest

    def same_networks(self, other: Architecture) -> bool:
        return isinstance(other, ModuleArchitecture) and self.table == other.table

    @property
    def standardised_together_P(self) -> Tensor:
        """A tensor's numbers: weights, scales and variances have little in common."""
        return self.table.entry_of_parameter_P

    @property
    def running(self) -> nn.Module:
        """The module; UserError that says how to give it."""
        if self.module is None:
            hint = f"; the zoo was made with {self.source}" if self.source else ""
            raise UserError(
                f"{self.name}: running these networks needs their module: give it with --module PACKAGE.FILE:FACTORY, "
                f"or open_zoo(..., module=){hint}"
            )
        return self.module

    def running_on(self, device: torch.device) -> nn.Module:
        """The module with its constants on the device; left alone where they are, since transforms of autograd do not
        bear a module's being moved."""
        module = self.running
        here = next((t.device for t in (*module.parameters(), *module.buffers())), device)
        return module if here == device else module.to(device)

    def forward(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        self.check(theta_BP)
        if tuple(inputs.shape[1:]) != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise UserError(f"{self.name} reads inputs of shape [Q, {wanted}], not {tuple(inputs.shape)}")
        if not len(theta_BP) or not len(inputs):
            return theta_BP.new_zeros(len(theta_BP), len(inputs), self.num_outputs)
        chunk = max(1, functional.NUMBERS // (len(inputs) * self.widest))
        module = self.running_on(theta_BP.device)
        return functional.forward(module, self.table, theta_BP, inputs, chunk if chunk < len(theta_BP) else None)

    def train_step(self, theta_BP: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.has_statistics:
            return self.forward(theta_BP, inputs), None
        return functional.train(self.running_on(theta_BP.device), self.table, theta_BP, inputs)

    def remeasured(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        if not self.has_statistics:
            return theta_BP
        chunk = max(1, functional.NUMBERS // (len(inputs) * self.widest))
        return functional.remeasure(self.running_on(theta_BP.device), self.table, theta_BP, inputs, chunk)

    @cached_property
    def _variances(self) -> Tensor:
        return self.table.places(("variance",))

    def to_logarithms(self, theta_BP: Tensor) -> Tensor:
        """Logarithms of variances and SMALLEST_VARIANCE; differentiable."""
        return self._at_variances(theta_BP, lambda v: (v.clamp_min(0) + SMALLEST_VARIANCE).log())

    def from_logarithms(self, theta_BP: Tensor) -> Tensor:
        return self._at_variances(theta_BP, lambda v: (v.exp() - SMALLEST_VARIANCE).clamp_min(0))

    def _at_variances(self, theta_BP: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        if not len(self._variances):
            return theta_BP
        places = self._variances.to(theta_BP.device)
        return theta_BP.index_copy(-1, places, function(theta_BP.index_select(-1, places)))

    def with_module(self, module: nn.Module, make: Callable[[], nn.Module] | None = None) -> ModuleArchitecture:
        """The same, able to run; UserError that names the first entry in which the module differs."""
        functional.check(module, self.table, self.name)
        return replace(self, module=functional.own_copy(module), make=make)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "input_shape": [*self.input_shape],
            "outputs": self.num_outputs,
            "widest": self.widest,
            "integers": self.integers,
            "module": self.source,
            "table": self.table.to_dict(),
        }
