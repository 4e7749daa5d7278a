"""An architecture: a chain of layers, and the index maps by which a model theta[P] is read, made once and cached.

A token is one output channel: its flattened weights, then its bias, zero padded (SANE; arXiv 2503.17138). State dict,
tokens and theta are three layouts of the same numbers; reordering hidden units is in `symmetries.py`.

Legend: B models, P parameters, T tokens, D token size, Q queries, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.forward import forward
from distrecon.nets.layers import Chain, Layer


@dataclass(frozen=True)
class Architecture(Chain):
    """A feed-forward network: its layers (see `Chain`), its tokens, its forward pass, its description as JSON data."""

    # -- tokens: sizes and index maps ---------------------------------------------------------------------------------

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
        if theta_BP.device.type != "cpu":
            index_N, _ = _token_gathers(self, theta_BP.device)
            return F.pad(theta_BP, (0, 1)).index_select(1, index_N).unflatten(1, (self.num_tokens, self.token_size))
        rows = [
            F.pad(torch.cat([weight.flatten(2), bias_BO[:, :, None]], 2), (0, self.token_size - layer.fan_in - 1))
            for layer, (weight, bias_BO) in zip(self.layers, self.weights_and_biases(theta_BP), strict=True)
        ]  # what token_index_TD says, layer by layer: on the CPU faster than a gather, its gradient many times
        return torch.cat(rows, dim=1)

    def detokenize(self, tokens_BTD: Tensor) -> Tensor:
        """theta[B, P], the inverse of `tokenize`; what lies in the padding is ignored."""
        expected, shape = (self.num_tokens, self.token_size), tuple(tokens_BTD.shape[1:])
        if shape != expected:
            raise UserError(f"{self.name} has tokens of shape {expected}, not {shape}")
        if tokens_BTD.device.type != "cpu":
            return tokens_BTD.flatten(1).index_select(1, _token_gathers(self, tokens_BTD.device)[1])
        parts = []
        for layer, rows_BOD in zip(
            self.layers, tokens_BTD.split([layer.out_features for layer in self.layers], dim=1), strict=True
        ):
            padding = self.token_size - layer.fan_in - 1
            weight_BOF, bias_BO1, _ = rows_BOD.split([layer.fan_in, 1, padding], dim=2)
            parts += [weight_BOF.flatten(1), bias_BO1.flatten(1)]
        return torch.cat(parts, dim=1)

    # -- function ----------------------------------------------------------------------------------------------------

    def forward(self, theta_BP: Tensor, inputs: Tensor) -> Tensor:
        """logits[B, Q, C] of B models on the shared inputs [Q, *input_shape]; differentiable in theta."""
        return forward(self, theta_BP, inputs)

    # -- as plain data ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal architecture."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "input_shape": [*self.input_shape]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` wrote."""
        layers = tuple(Layer(**layer) for layer in data["layers"])
        return Architecture(data["name"], layers, data["activation"], tuple(data["input_shape"]))


@lru_cache(maxsize=16)
def _token_gathers(arch: Architecture, device: torch.device) -> tuple[Tensor, Tensor]:
    """What tokens [T * D] read of theta and one zero, and theta of tokens: for GPUs, where a gather is one kernel."""
    index_N = arch.token_index_TD.flatten()
    both = torch.cat([index_N, index_N.argsort()[: arch.num_parameters]]).to(device, non_blocking=True)
    return both[: len(index_N)], both[len(index_N) :]
