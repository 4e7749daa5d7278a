"""The table of any torch module, derived from its graph: parameters, groups of units, layers.

The module is exported once on example inputs (torch.export: every operation with its shapes, whatever Python wrote it);
the axes of all tensors are then propagated through the operations (`rules.py`, `axes.py`). Groups are what is left
free. An operation without a rule keeps the axes of its tensors in order and is named in the table's notes.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from distrecon.errors import UserError
from distrecon.nets import axes, calls, rules, table
from distrecon.nets.axes import Atom, Label, Stack, fixed, free, parent, pin, settled
from distrecon.nets.calls import Call, Labels, flatten_labels
from distrecon.nets.table import Constant, Entry, Group, Rows, Table

COUNTER = "num_batches_tracked"
LARGEST_CONSTANT = 1 << 16  # numbers
MOVES = ("transpose", "permute", "contiguous", "clone", "unsqueeze", "squeeze", "view", "reshape", "detach")
NORMS = {  # operation -> roles of its parameters, from its second argument on
    "batch_norm": ("scale", "shift", "mean", "variance"),
    "instance_norm": ("scale", "shift", "mean", "variance"),
    "layer_norm": (None, "scale", "shift"),
    "rms_norm": (None, "scale"),
    "group_norm": (None, "scale", "shift"),
}
WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class WeightedSum:
    """A linear map or a convolution by entries of the state dict."""

    weight: str
    bias: str | None
    kernel: tuple[int, ...]  # () for linear maps
    settings: tuple[Any, ...] = ()  # stride, padding, dilation of a convolution, as far as given
    groups: int = 1

    @property
    def spatial(self) -> int:
        return len(self.kernel)


class Graph:
    """What tracing a module gives: its table, the exported program, the sizes of its outputs."""

    def __init__(self, module: nn.Module, inputs: Tensor, name: str) -> None:
        self.state = dict(module.state_dict(keep_vars=True))
        self.exported = exported(module, inputs, name)
        self.fqn = {
            spec.arg.name: spec.target for spec in self.exported.graph_signature.input_specs if spec.target is not None
        }
        for node in self.exported.graph.nodes:
            if not all(type(n) is int for value in _values(node) for n in value.shape):
                raise UserError(
                    f"{name} cannot run for many models at once: the size of what {node.target} at {where(node)} gives "
                    "depends on numbers"
                )
        output, self.output_place = self._output(name)
        self.num_outputs = output.meta["val"].shape[1]
        self.widest = max([1, *(v.numel() for node in self.exported.graph.nodes for v in _values(node))]) // max(
            1, len(inputs)
        )
        self.names = self._names()
        self.labels: dict[str, Labels] = {}  # of entries that the graph reads
        self.of: dict[Node, Any] = {}  # of nodes
        self.roles: dict[str, str] = {}
        self.rows: dict[str, list[str]] = {}  # weight -> the entries of its layer
        self.producer: dict[Node, str] = {}  # node -> the weight whose output channels it carries
        self.notes: list[str] = []
        self.shape = tuple(inputs.shape[1:])
        for node in self.exported.graph.nodes:
            self.of[node] = self._visit(node)
        for label in self.of[output]:
            pin(label)

    def _output(self, name: str) -> tuple[Node, int]:
        (last,) = (node for node in self.exported.graph.nodes if node.op == "output")
        outputs = [o for o in last.args[0] if isinstance(o, Node)]
        specs = self.exported.graph_signature.output_specs
        user = [o for o, s in zip(outputs, specs, strict=False) if s.kind.name == "USER_OUTPUT"]
        if len(user) != 1 or user[0].meta["val"].ndim != 2:
            shapes = [tuple(o.meta["val"].shape) for o in user]
            raise UserError(f"{name} must give one tensor [inputs, outputs], not {shapes}")
        return user[0], outputs.index(user[0])

    def _names(self) -> dict[str, str]:
        """Every name of the state dict -> the first name of the same tensor."""
        first: dict[int, str] = {}
        return {key: first.setdefault(id(tensor), key) for key, tensor in self.state.items()}

    # -- running it ---------------------------------------------------------------------------------------------------

    def arguments(self, state: Mapping[str, Tensor], inputs: Tensor) -> list[Tensor]:
        """What the exported program reads, in order: entries of a state dict, tensors of its own, the inputs."""
        own = self.exported.constants
        targets = [spec.target for spec in self.exported.graph_signature.input_specs]
        return [
            inputs if target is None else state[target] if target in state else own[target].to(inputs.device)
            for target in targets
        ]

    def weighted_sums(self) -> dict[Node, WeightedSum]:
        """The nodes that are linear maps or convolutions (none transposed) by an entry whose role is a weight."""
        found = {}
        for node in self.exported.graph.nodes:
            name = _operation(node) if node.op == "call_function" else ""
            if name not in WEIGHTED or "transpose" in name:
                continue
            arguments = [*node.args, *node.kwargs.values()]
            weight, bias = self._key(arguments[1]), self._key(arguments[2]) if len(arguments) > 2 else None
            if weight is None or self.roles[weight] != "weight":
                continue
            kernel = tuple(self.state[weight].shape[2:])
            groups = arguments[6] if len(arguments) > 6 else 1
            found[node] = WeightedSum(weight, bias, kernel, tuple(arguments[3:6]), groups)
        return found

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return calls.Tensor(map(fixed, node.meta["val"].shape)) if "val" in node.meta else None
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            source: Any = node.args[0]
            return self.of[source][node.args[1]]
        args: Any
        kwargs: Any
        args, kwargs = (torch.fx.map_arg(a, lambda n: self.of[n]) for a in (node.args, node.kwargs))
        name = _operation(node)
        self._layers(node, name)
        values = _values(node)
        call = Call(args, kwargs, [tuple(v.shape) for v in values], _singly_read(node))
        found = rules.RULES[name](call) if name in rules.RULES else NotImplemented
        if found is NotImplemented:
            return self._without_rule(node, call)
        return found

    def _placeholder(self, node: Node) -> Labels | None:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return None
        key = self.names.get(self.fqn.get(node.name, ""))
        if key is None or not value.is_floating_point() or not node.users:
            return calls.Tensor(map(fixed, value.shape))
        if key not in self.labels:
            self.labels[key] = calls.Tensor(map(free, value.shape))
        return self.labels[key]

    def _without_rule(self, node: Node, call: Call) -> Any:
        tensors = flatten_labels([*call.args, *call.kwargs.values()])
        if any(not a.pinned for t in tensors for label in t for s in settled(label) for a in s):
            self.notes.append(f"{node.target} at {where(node)} has no rule: the axes of what it reads keep their order")
        for label in (label for t in tensors for label in t):
            pin(label)
        results = [calls.Tensor(map(fixed, shape)) for shape in call.shapes]
        return results[0] if isinstance(node.meta.get("val"), Tensor) else results

    # -- layers -------------------------------------------------------------------------------------------------------

    def _key(self, node: Any) -> str | None:
        """The entry that an argument is."""
        key = self.names.get(self.fqn.get(node.name, "")) if isinstance(node, Node) else None
        return key if key is not None and self.state[key].is_floating_point() else None

    def _layers(self, node: Node, name: str) -> None:
        """Notes which entries make a layer: a weight, its bias, the normalisation of its outputs."""
        arguments = [*node.args, *node.kwargs.values()]
        if name in WEIGHTED and (weight := self._key(arguments[1])) is not None:
            self.roles.setdefault(weight, "weight")
            self.rows.setdefault(weight, [weight])
            self.producer[node] = weight
            if len(arguments) > 2 and (bias := self._key(arguments[2])) is not None:
                self._join(weight, bias, "bias")
        elif name == "embedding" and (weight := self._key(arguments[0])) is not None:
            self.roles.setdefault(weight, "embedding")
        elif name in NORMS:
            read = self.producer.get(arguments[0]) if isinstance(arguments[0], Node) else None
            for role, argument in zip(NORMS[name], arguments[1:], strict=False):
                if role and (key := self._key(argument)) is not None:
                    self._join(read, key, role)
            if read is not None:
                self.producer[node] = read
        elif name in MOVES and isinstance(arguments[0], Node) and arguments[0] in self.producer:
            self.producer[node] = self.producer[arguments[0]]

    def _join(self, weight: str | None, key: str, role: str) -> None:
        """Makes an entry part of a weight's layer if it has a part for each output channel and no layer yet."""
        self.roles.setdefault(key, role)
        taken = any(key in keys for keys in self.rows.values())
        if weight is not None and not taken and len(self.state[key]) == len(self.state[weight]):
            self.rows[weight].append(key)

    # -- the table ----------------------------------------------------------------------------------------------------

    def table(self) -> Table:
        entries = [key for key, tensor in self.state.items() if tensor.is_floating_point() and self.names[key] == key]
        self._drop_dependence(entries)
        atoms = self._groups(entries)
        number = {atom: i for i, atom in enumerate(atoms)}
        names = self._group_names(atoms, entries)
        groups = []
        for atom, name in zip(atoms, names, strict=True):
            inside = parent(atom)
            within = number[inside] if inside is not None else None
            groups.append(Group(name, atom.size, within, inside.size if inside is not None else 1))
        also = {key: tuple(k for k, first in self.names.items() if first == key and k != key) for key in entries}
        made = tuple(
            Entry(
                key,
                tuple(self.state[key].shape),
                tuple(_axis(label, number) for label in self.labels.get(key, ())) or _in_order(self.state[key]),
                self.roles.get(key, "other"),
                also[key],
            )
            for key in entries
        )
        return Table(made, tuple(groups), self._rows(entries), self._constants(), tuple(self.notes))

    def _drop_dependence(self, entries: list[str]) -> None:
        """Units may have an order for each unit of another group only where every tensor that has the ones has the
        others, once."""
        tensors: list[Labels] = [labels for value in self.of.values() for labels in flatten_labels(value)]
        tensors += [self.labels[key] for key in entries if key in self.labels]
        changed = True
        while changed:
            changed = False
            for labels in tensors:
                for counts, atoms in _blocks(labels):
                    for atom in atoms:
                        inside = parent(atom)
                        if atom.within is not None and (inside is None or counts[inside] != 1):
                            axes.keep_alone(atom)
                            changed = True

    def _groups(self, entries: list[str]) -> list[Atom]:
        """The atoms that parameters have, in the order in which the network makes them, outer before inner."""
        used = {a for key in entries for label in self.labels.get(key, ()) for s in settled(label) for a in s}
        order: dict[Atom, None] = {}
        for node, value in self.of.items():
            for labels in flatten_labels(value) if node.op != "placeholder" else ():
                for label in labels:
                    if isinstance(label, Stack | axes.Piece):
                        continue  # its tensors come when they are taken
                    for atom in (a for s in settled(label) for a in s):
                        inside = parent(atom)
                        for each in (inside, atom):
                            if each is not None and each in used and not each.pinned:
                                order.setdefault(each)
        for key in entries:  # and those that no result has: what one parameter sums over of another
            order |= dict.fromkeys(a for x in self.labels.get(key, ()) for s in settled(x) for a in s if not a.pinned)
        return [*order]

    def _group_names(self, atoms: list[Atom], entries: list[str]) -> list[str]:
        """After the layer whose outputs they are."""
        names: dict[Atom, str] = {}
        for key in sorted(entries, key=lambda k: self.roles.get(k) not in ("weight", "embedding")):
            labels = self.labels.get(key, ())
            for label in labels[-1:] if self.roles.get(key) == "embedding" else labels[:1]:
                for atom in (a for s in settled(label) for a in s if not a.pinned):
                    names.setdefault(atom, prefix(key))
        for key in entries:
            for label in self.labels.get(key, ()):
                for atom in (a for s in settled(label) for a in s):
                    names.setdefault(atom, prefix(key))
        count: Counter[str] = Counter()
        result = []
        for atom in atoms:
            name = names[atom]
            result.append(f"{name}:{count[name]}" if count[name] else name)
            count[name] += 1
        return result

    def _rows(self, entries: list[str]) -> tuple[Rows, ...]:
        number = {key: i for i, key in enumerate(entries)}
        layers = [(prefix(w), len(self.state[w]), sorted(number[k] for k in keys)) for w, keys in self.rows.items()]
        taken = {e for _, _, members in layers for e in members}
        alone: dict[tuple[str, int], list[int]] = {}
        for key in entries:
            if number[key] not in taken:
                shape = self.state[key].shape
                rows = prod(shape[:-1])
                alone.setdefault((prefix(key) if rows == 1 else key, rows), []).append(number[key])
        layers += [(name, rows, members) for (name, rows), members in alone.items()]
        layers.sort(key=lambda layer: layer[2][0])
        return tuple(Rows(name, rows, tuple(members)) for name, rows, members in layers)

    def _constants(self) -> tuple[Constant, ...]:
        found = []
        for key, tensor in self.state.items():
            if tensor.is_floating_point():
                continue
            if tensor.numel() > LARGEST_CONSTANT:
                raise UserError(f"{key} holds {tensor.numel()} whole numbers, more than {LARGEST_CONSTANT}")
            values = [0] * tensor.numel() if key.endswith(COUNTER) else tensor.flatten().tolist()
            found.append(Constant(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tuple(values)))
        return tuple(found)


def exported(module: nn.Module, inputs: Tensor, name: str) -> torch.export.ExportedProgram:
    """The module's operations on inputs of this shape; UserError where it cannot be traced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(module, (inputs,), strict=False)
        except Exception as error:  # whatever the module itself raises, too
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            at = [i for i, line in enumerate(lines) if line.startswith("The following call raised this error")]
            code = lines[at[0] + 1 : at[0] + 3] if at else []  # the line of the module's own code
            said = ": ".join([lines[0] if lines else repr(error), *code])
            raise UserError(f"{name} cannot be traced on inputs {tuple(inputs.shape)}: {said}") from error


def where(node: Node) -> str:
    """The node's place in the module."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return f"{node.name} of {paths[-1]}" if paths and paths[-1] else node.name


def prefix(key: str) -> str:
    return key.rpartition(".")[0] or key


def _operation(node: Node) -> str:
    """conv2d of aten.conv2d.default; operations in place have the name of those that are not."""
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("_") or not name.endswith("_") else name.removesuffix("_")


def _values(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]


def _singly_read(node: Node) -> set[int]:
    """The axes of a node's result of which whoever reads it takes single places only."""
    value = node.meta.get("val")
    return {d for d in range(value.ndim) if _taken_apart(node, d)} if isinstance(value, Tensor) else set()


def _taken_apart(node: Node, dim: int) -> bool:
    ndim = node.meta["val"].ndim
    for user in node.users:
        name, args = _operation(user), user.args
        if name in ("select", "unbind"):
            if (args[1] if len(args) > 1 else 0) % ndim != dim:
                return False
        else:
            moved = _moved(name, args, ndim, dim)
            if moved is None or not _taken_apart(user, moved):
                return False
    return bool(node.users)


def _moved(name: str, args: Any, ndim: int, dim: int) -> int | None:
    """Where an axis is after an operation that only moves axes; None for other operations."""
    if name in ("contiguous", "clone"):
        return dim
    if name == "permute":
        return [d % ndim for d in args[1]].index(dim)
    if name == "transpose":
        a, b = args[1] % ndim, args[2] % ndim
        return {a: b, b: a}.get(dim, dim)
    if name == "unsqueeze":
        at = args[1] % (ndim + 1)
        return dim + (at <= dim)
    if name == "squeeze" and len(args) > 1 and isinstance(args[1], int):
        at = args[1] % ndim
        return None if at == dim else dim - (at < dim)
    return None


def _blocks(labels: Labels) -> Iterator[tuple[Counter[Atom], list[Atom]]]:
    """How often each atom occurs in each block of a tensor: a segment of each axis."""
    known = [settled(label) for label in labels if not isinstance(label, Stack | axes.Piece)]
    if any(isinstance(label, Stack | axes.Piece) for label in labels):
        return
    dependent = {a for axis in known for s in axis for a in s if a.within is not None}
    if not dependent:
        return
    everywhere = [Counter(a for s in axis for a in s) for axis in known]
    for place, axis in enumerate(known):
        for segment in axis:
            counts = Counter(segment)
            for other, counter in enumerate(everywhere):
                if other != place:
                    counts.update(counter)
            yield counts, [a for a in segment if a in dependent]


def _axis(label: Label, number: dict[Atom, int]) -> table.Axis:
    return tuple(tuple((number.get(atom), atom.size) for atom in segment) for segment in settled(label))


def _in_order(tensor: Tensor) -> tuple[table.Axis, ...]:
    """The axes of an entry that the graph never reads."""
    return tuple(((((None, n),) if n != 1 else ()),) for n in tensor.shape)
