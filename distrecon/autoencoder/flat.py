"""A module's parameters as one vector, for GPUs: what is done to all of them is then one kernel, not one a parameter.

The module's own parameters become views of the vector, so that whatever reads them sees the present values. Steps may
compute from a copy of the vector in a smaller type: what they add up to stays exact, and nothing is converted layer by
layer. Each parameter has a gradient of its own, there as soon as the backward pass is done with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

Result = TypeVar("Result")


class FlatParameters:
    """`vector` is what an optimiser steps on; `call` runs a function with the module's parameters taken from it.

    `leaves`, in the order of the vector, are what its backward pass gives gradients to: the module's parameters, or
    where `dtype` is given, views of the vector's copy of that type.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        named = [*module.named_parameters()]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        for parameter, view in zip(self.parameters, self._views(self.vector.detach()), strict=True):
            parameter.data = view
        self.module = module
        self.copy = None if dtype is None else self.vector.detach().to(dtype)
        views = () if self.copy is None else self._views(self.copy)
        self.leaves: list[Tensor] = [view.detach().requires_grad_() for view in views] or [*self.parameters]

    def call(self, function: Callable[[], Result]) -> Result:
        """The function's result, differentiable in the leaves, which have the vector's present values."""
        if self.copy is None:
            return function()
        self.copy.copy_(self.vector.detach())
        replaced = {f"module.{name}": leaf for name, leaf in zip(self.names, self.leaves, strict=True)}
        return functional_call(_Calls(self.module, function), replaced, ())  # type: ignore[no-any-return]

    def set_gradient(self, gradients: Sequence[Tensor | None]) -> None:
        """The vector's, from those of the leaves; a missing one is zero."""
        pairs = zip(gradients, self.leaves, strict=True)
        each = [(torch.zeros_like(leaf) if gradient is None else gradient).flatten() for gradient, leaf in pairs]
        self.vector.grad = torch.cat(each).to(self.vector)

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
