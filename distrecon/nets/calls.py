"""What a rule gets: an operation with its arguments as labels, one for each axis of a tensor (see `axes.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distrecon.nets.axes import Label, fixed, length, pin, unify

Labels = tuple[Label, ...]


@dataclass
class Call:
    """One operation: arguments in which tensors are labels, and the shapes of its results."""

    args: Sequence[Any]
    kwargs: dict[str, Any]
    shapes: list[tuple[int, ...]]  # of its results, one after the other
    unstacked: set[int] = field(default_factory=set)  # axes of the result of which only single places are taken

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


Rule = Callable[[Call], Any]


def adder(table: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator, given names, that puts rules into the table."""

    def rule(*names: str) -> Callable[[Rule], Rule]:
        def add(function: Rule) -> Rule:
            table.update(dict.fromkeys(names, function))
            return function

        return add

    return rule


class Tensor(tuple[Label, ...]):
    """The labels of a tensor's axes."""


def flatten_labels(value: Any) -> list[Tensor]:
    """All tensors' labels among arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [found for item in value for found in flatten_labels(item)]
    return []


def kept(x: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    """The first axes as they are, places in fixed order for the others."""
    for label in x[first:]:
        pin(label)
    return Tensor((*x[:first], *map(fixed, shape[first:])))


def broadcast(tensors: Sequence[Tensor], ndim: int) -> Tensor:
    result: list[Label] = []
    for place in range(-ndim, 0):
        labels = [t[place] for t in tensors if len(t) >= -place]
        wide = [label for label in labels if length(label) != 1] or labels[:1]
        for other in wide[1:]:
            unify(wide[0], other)
        result.append(wide[0] if wide else ((),))
    return Tensor(result)
