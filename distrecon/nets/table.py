"""A network's parameters and their symmetries as data: what each tensor's axes are made of, as in git-re-basin.

An axis is a row of segments (what was concatenated), a segment a product of factors, the outermost first (what was
flattened). A factor is a group of units that may come in any order, the same wherever the group appears, or a number of
places that stay where they are. Ainsworth et al. (Git Re-Basin, ICLR 2023) write such tables by hand; `graph.py`
derives them, and chains of layers give theirs (`architectures.py`).

Legend: B models, P parameters, U units of all groups, T tokens, D token size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

Factor = tuple[int | None, int]  # the group, None for places that stay; how many
Segment = tuple[Factor, ...]
Axis = tuple[Segment, ...]


@dataclass(frozen=True)
class Group:
    """Units in any order. `within` another group, each of whose units has an order of these of its own (heads)."""

    name: str
    size: int
    within: int | None = None
    blocks: int = 1  # units of the group that it lies within

    @property
    def units(self) -> int:
        return self.blocks * self.size


@dataclass(frozen=True)
class Entry:
    """A tensor of the state dict, and where it has a further name, in `also`."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    role: str = "other"  # weight, embedding, bias, scale, shift, mean, variance
    also: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Rows:
    """A layer as tokens see it: a row for each output channel, of its part of every entry."""

    name: str
    rows: int
    entries: tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """Entries as one matrix [O, F]: a weight and, where it has one, its bias as last column; others as one row each."""

    entries: tuple[int, ...]
    rows: int
    columns: int


@dataclass(frozen=True)
class Constant:
    """An entry of the state dict that holds whole numbers, the same in all models (counters of batches are zero)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: tuple[int, ...]

    @property
    def counts(self) -> bool:
        """A counter of training batches, which no function reads."""
        return self.name.endswith("num_batches_tracked")

    def tensor(self) -> Tensor:
        return torch.tensor(self.values, dtype=getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class Table:
    """theta[P] is the entries in order, flattened. `notes` say which operations keep axes in order, and why."""

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    layers: tuple[Rows, ...]
    constants: tuple[Constant, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def num_parameters(self) -> int:
        return sum(entry.size for entry in self.entries)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each entry starts in theta."""
        starts = [0]
        for entry in self.entries:
            starts.append(starts[-1] + entry.size)
        return tuple(starts[:-1])

    def tensors(self, theta_BP: Tensor) -> list[Tensor]:
        """Views of theta: each entry as [B, *shape]."""
        parts = self._parts(theta_BP)
        return [part.unflatten(1, e.shape or (1,)) for part, e in zip(parts, self.entries, strict=True)]

    def _parts(self, theta_BP: Tensor) -> tuple[Tensor, ...]:
        return theta_BP.split([entry.size for entry in self.entries], dim=1)

    def places(self, roles: tuple[str, ...]) -> Tensor:
        """The positions in theta of the entries with these roles."""
        chosen = [(o, e.size) for o, e in zip(self.offsets, self.entries, strict=True) if e.role in roles]
        return torch.cat([torch.empty(0, dtype=torch.long), *(torch.arange(o, o + n) for o, n in chosen)])

    @cached_property
    def _groups_of(self) -> list[frozenset[int]]:
        return [
            frozenset(g for axis in entry.axes for segment in axis for g, _ in segment if g is not None)
            for entry in self.entries
        ]

    def groups_of(self, entry: int) -> frozenset[int]:
        """The groups that an entry has."""
        return self._groups_of[entry]

    def entries_of(self, group: int) -> list[int]:
        """The entries that have a group."""
        return [i for i, groups in enumerate(self._groups_of) if group in groups]

    @cached_property
    def layer_of_parameter_P(self) -> Tensor:
        return self._per_entry([next(i for i, r in enumerate(self.layers) if e in r.entries) for e in self._numbers])

    @cached_property
    def entry_of_parameter_P(self) -> Tensor:
        return self._per_entry([*self._numbers])

    @property
    def _numbers(self) -> range:
        return range(len(self.entries))

    def _per_entry(self, values: list[int]) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values), torch.tensor([entry.size for entry in self.entries]))

    # -- matrices -----------------------------------------------------------------------------------------------------

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every entry in one matrix, in the order of their first entries."""
        found = []
        for layer in self.layers:
            roles = {self.entries[e].role: e for e in layer.entries}
            both = tuple(roles[role] for role in ("weight", "bias") if role in roles and "weight" in roles)
            for members in ([both] if both else []) + [(e,) for e in layer.entries if e not in both]:
                rows = self.entries[members[0]].shape[0] if members == both else 1
                found.append(Matrix(members, rows, sum(self.entries[e].size for e in members) // rows))
        return tuple(sorted(found, key=lambda matrix: matrix.entries))

    def as_matrices(self, theta_BP: Tensor) -> list[Tensor]:
        """theta as `matrices`, [B, O, F] each."""
        parts = self._parts(theta_BP)
        each = ([parts[e].unflatten(1, (m.rows, -1)) for e in m.entries] for m in self.matrices)
        return [torch.cat(columns, dim=2) if len(columns) > 1 else columns[0] for columns in each]

    def of_matrices(self, matrices: Sequence[Tensor]) -> Tensor:
        """theta[B, P], the inverse of `as_matrices`."""
        parts: dict[int, Tensor] = {}
        for matrix, value_BOF in zip(self.matrices, matrices, strict=True):
            columns = value_BOF.split([self.entries[e].size // matrix.rows for e in matrix.entries], dim=2)
            parts |= {e: part.flatten(1) for e, part in zip(matrix.entries, columns, strict=True)}
        return torch.cat([parts[e] for e in self._numbers], dim=1)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def width(self, layer: Rows) -> int:
        """Numbers of one row."""
        return sum(self.entries[e].size for e in layer.entries) // layer.rows

    def token_index(self, size: int) -> Tensor:
        """Position in theta of each entry of the tokens [T, D]; P where a token is padding. Rows are cut in pieces."""
        parts = []
        for layer in self.layers:
            of_rows = [
                (self.offsets[e] + torch.arange(self.entries[e].size)).view(layer.rows, -1) for e in layer.entries
            ]
            row_RW = torch.cat(of_rows, dim=1)
            padding = -row_RW.shape[1] % size
            row_RW = torch.nn.functional.pad(row_RW, (0, padding), value=self.num_parameters)
            parts.append(row_RW.reshape(-1, size))
        return torch.cat(parts)

    def token_positions(self, size: int) -> Tensor:
        """(index in the sequence, layer, index in the layer) of each token, [T, 3]."""
        counts = torch.tensor([layer.rows * -(-self.width(layer) // size) for layer in self.layers])
        layer_T = torch.repeat_interleave(torch.arange(len(counts)), counts)
        within_T = torch.cat([torch.arange(int(count)) for count in counts])
        return torch.stack([torch.arange(len(layer_T)), layer_T, within_T], dim=1)

    # -- permutations -------------------------------------------------------------------------------------------------

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Where each group's units start among all U, and U."""
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + group.units)
        return tuple(starts)

    @cached_property
    def coefficients(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """start_P and pairs (unit_P, step_P): a permutation reads theta at start + the sum of order[unit] * step.

        `order` are the orders of all units and, at U, a zero. Each factor of a parameter's axes has its pair.
        """
        slots: list[list[tuple[int, Tensor, Tensor]]] = [self.factors_of(entry) for entry in self.entries]
        count, none = max([0, *map(len, slots)]), self.firsts[-1]
        units = torch.full((count, self.num_parameters), none)
        steps = torch.zeros(count, self.num_parameters, dtype=torch.long)
        for offset, entry, found in zip(self.offsets, self.entries, slots, strict=True):
            for k, (_, unit, step) in enumerate(found):
                units[k, offset : offset + entry.size] = unit
                steps[k, offset : offset + entry.size] = step
        identity_U = torch.cat([*(torch.arange(g.size).repeat(g.blocks) for g in self.groups), torch.zeros(1).long()])
        start_P = torch.arange(self.num_parameters) - (identity_U[units] * steps).sum(0)
        return start_P, list(zip(units, steps, strict=True))

    def factors_of(self, entry: Entry) -> list[tuple[int, Tensor, Tensor]]:
        """(group, unit of each number, step in theta) for each place that groups take in the entry's axes."""
        shape = entry.shape or (1,)
        local: dict[int, Tensor] = {}  # group -> which of its units each number belongs to, -1 for none
        found: list[tuple[int, Tensor, Tensor]] = []
        for a, axis in enumerate(entry.axes):
            view = [1] * len(shape)
            view[a] = shape[a]
            for group, unit_n, step_n in _of_axis(axis):
                unit = unit_n.view(view).expand(shape).flatten()
                local[group] = torch.maximum(local[group], unit) if group in local else unit
                found.append((group, unit, (step_n * prod(shape[a + 1 :])).view(view).expand(shape).flatten()))
        none = self.firsts[-1]
        result = []
        for group, unit, step in found:
            of = self.groups[group]
            block = local[of.within] if of.within is not None else torch.zeros_like(unit)
            result.append((group, torch.where(unit < 0, none, self.firsts[group] + block * of.size + unit), step))
        return result

    # -- as text and as plain data ------------------------------------------------------------------------------------

    def describe(self) -> str:
        """The table for people: each tensor with its axes, then the groups, then what keeps its order and why."""
        lines = [f"{self.num_parameters:,} parameters in {len(self.entries)} tensors, {len(self.groups)} groups"]
        width = max(len(entry.name) for entry in self.entries)
        for entry in self.entries:
            axes = ", ".join(self._axis_text(axis) for axis in entry.axes)
            lines.append(f"  {entry.name:<{width}}  {'x'.join(map(str, entry.shape)) or '1':<14}  ({axes})")
        for group in self.groups:
            inside = f" in each of {self.groups[group.within].name}" if group.within is not None else ""
            lines.append(f"  group {group.name}: {group.size} units{inside}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _axis_text(self, axis: Axis) -> str:
        def text(factor: Factor) -> str:
            return str(factor[1]) if factor[0] is None else self.groups[factor[0]].name

        return " + ".join(" * ".join(map(text, segment)) or "1" for segment in axis)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal table."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Table:
        entries = tuple(
            Entry(e["name"], tuple(e["shape"]), tuple(map(_axis, e["axes"])), e["role"], tuple(e["also"]))
            for e in data["entries"]
        )
        layers = tuple(Rows(r["name"], r["rows"], tuple(r["entries"])) for r in data["layers"])
        constants = tuple(
            Constant(c["name"], tuple(c["shape"]), c["dtype"], tuple(c["values"])) for c in data["constants"]
        )
        return Table(entries, tuple(Group(**g) for g in data["groups"]), layers, constants, tuple(data["notes"]))


def _axis(data: Any) -> Axis:
    return tuple(tuple((factor[0], factor[1]) for factor in segment) for segment in data)


def _of_axis(axis: Axis) -> list[tuple[int, Tensor, Tensor]]:
    """(group, its unit at each place or -1, step along the axis) for each group in each segment."""
    length = sum(prod(n for _, n in segment) for segment in axis)
    result, start = [], 0
    for segment in axis:
        size = prod(n for _, n in segment)
        inner = size
        for group, n in segment:
            inner //= n
            if group is None:
                continue
            unit_n, step_n = torch.full((length,), -1), torch.zeros(length, dtype=torch.long)
            unit_n[start : start + size] = torch.arange(size) // inner % n
            step_n[start : start + size] = inner
            result.append((group, unit_n, step_n))
        start += size
    return result
