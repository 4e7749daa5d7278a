"""A module's parameters as one vector, for GPUs: what is done to all of them is then one kernel, not one a parameter.

The module's own parameters become views of the vector, so that whatever reads them sees the present values. In a step
they are replaced by differentiable views, whose gradient is the vector's, or by views of its copy in a smaller type:
what steps add up to stays exact, and nothing is converted layer by layer.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

Result = TypeVar("Result")


class FlatParameters:
    """`vector` is what an optimiser steps on; `call` runs a function with the module's parameters taken from it."""

    def __init__(self, module: nn.Module) -> None:
        named = [*module.named_parameters()]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        for parameter, view in zip(self.parameters, self._views(self.vector.detach()), strict=True):
            parameter.data = view
        self.module = module

    def call(self, function: Callable[[], Result], dtype: torch.dtype | None = None) -> Result:
        """The function's result, differentiable in `vector`; parameters are of the type `dtype`."""
        views = self._views(self.vector if dtype is None else self.vector.to(dtype))
        replaced = {f"module.{name}": view for name, view in zip(self.names, views, strict=True)}
        return functional_call(_Calls(self.module, function), replaced, ())  # type: ignore[no-any-return]

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        return (part.view(p.shape) for part, p in zip(vector.split(self.sizes), self.parameters, strict=True))

    def optimizer_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of an optimiser of `vector`, as that of one of the module's parameters."""
        (own,) = state["state"].values() or ({},)
        count = len(self.parameters)
        each = {key: [*self._views(value)] if value.ndim else [value] * count for key, value in own.items()}
        states = {i: {key: values[i].clone() for key, values in each.items()} for i in range(count)} if own else {}
        (group,) = state["param_groups"]
        return {"state": states, "param_groups": [{**group, "params": [*range(count)]}]}

    def flat_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `optimizer_state`."""
        (group,) = state["param_groups"]
        states = {}
        if state["state"]:
            own = [state["state"][i] for i in range(len(self.parameters))]
            states = {
                0: {
                    key: torch.cat([s[key].flatten() for s in own]) if value.ndim else value
                    for key, value in own[0].items()
                }
            }
        return {"state": states, "param_groups": [{**group, "params": [0]}]}


class _Calls(nn.Module):
    """Holds a module and calls a function that uses it."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self) -> Any:
        return self.function()
