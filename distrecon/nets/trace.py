"""An architecture of any torch module: traced, tried out, and proved on random weights.

Legend: B models, Q inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from distrecon.errors import UserError
from distrecon.nets import functional, graph
from distrecon.nets.architectures import ModuleArchitecture
from distrecon.nets.symmetries import permute, random_permutation
from distrecon.nets.table import Table

TOLERANCE = 1e-8  # of the outputs' size, in float64: what permuted units may change by rounding
EXAMPLES = 4  # inputs to try it on


def of_module(
    module: nn.Module,
    inputs: Tensor,
    *,
    name: str | None = None,
    source: str | None = None,
    make: Callable[[], nn.Module] | None = None,
) -> ModuleArchitecture:
    """The architecture of a module that reads inputs [Q, ...] and gives [Q, C]; theta is its state dict, flattened.

    Parameters and buffers of floating type are part of theta, in the state dict's order, shared tensors once. `source`
    is kept as a hint where the module came from, `make` makes a module with fresh weights. The derived groups are
    proved on random weights: one that changes the outputs (a mistake of a rule) is kept in order and noted.

    Raises UserError when the module cannot be traced or cannot run for many models at once; it names the operation.
    """
    name = name or type(module).__name__
    own = functional.own_copy(module)
    example = inputs[:EXAMPLES] if len(inputs) > 1 else inputs.expand(2, *inputs.shape[1:]).clone()
    found = graph.Graph(own, example, name)
    integers = not inputs.is_floating_point()
    shape = tuple(inputs.shape[1:])
    arch = ModuleArchitecture(
        name, found.table(), shape, found.num_outputs, found.widest, source, integers, own, make or _again(own)
    )
    with torch.no_grad():
        theta_BP = random_models(arch, 2)
        try:
            outputs = arch.forward(theta_BP, example.double() if not integers else example)
        except Exception as error:
            raise UserError(
                f"{name} cannot run for many models at once: {_failing(found, arch, theta_BP, error)}"
            ) from error
        return _proved(arch, theta_BP, example if integers else example.double(), outputs)


def random_models(arch: ModuleArchitecture, count: int, seed: int = 0) -> Tensor:
    """theta[count, P] in float64: the module's weights moved by a tenth of their size, variances above zero."""
    draw = torch.Generator().manual_seed(seed)
    theta_BP = arch.flatten(arch.running.state_dict()).double()[None].repeat(count, 1)
    for tensor in arch.table.tensors(theta_BP):
        size = float(tensor.square().mean().sqrt()) or 1.0
        tensor += 0.1 * size * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
    places = arch.table.places(("variance",))
    theta_BP[:, places] = theta_BP[:, places].abs() + 0.1
    return theta_BP


def _proved(arch: ModuleArchitecture, theta_BP: Tensor, inputs: Tensor, outputs: Tensor) -> ModuleArchitecture:
    """The architecture, without groups whose permutation changes the outputs."""
    if not arch.groups:
        return arch
    permutation = random_permutation(arch, torch.Generator().manual_seed(0), len(theta_BP))
    if _same(arch.forward(permute(arch, theta_BP, permutation), inputs), outputs):
        return arch
    identity = [torch.arange(g.size).repeat(g.blocks).expand(len(theta_BP), -1) for g in arch.groups]
    wrong = []
    for i in range(len(arch.groups)):
        alone = [permutation[j] if j == i else identity[j] for j in range(len(arch.groups))]
        if not _same(arch.forward(permute(arch, theta_BP, alone), inputs), outputs):
            wrong.append(i)
    return replace(arch, table=without(arch.table, wrong or [*range(len(arch.groups))]))


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()))


def without(table: Table, wrong: list[int]) -> Table:
    """The table with these groups, and those within them, kept in order."""
    gone = {i for i, group in enumerate(table.groups) if i in wrong or group.within in wrong}
    number = {i: k for k, i in enumerate(i for i in range(len(table.groups)) if i not in gone)}
    entries = tuple(
        replace(
            entry,
            axes=tuple(
                tuple(tuple((None if g is None else number.get(g), n) for g, n in s) for s in axis)
                for axis in entry.axes
            ),
        )
        for entry in table.entries
    )
    groups = tuple(
        replace(g, within=number[g.within] if g.within is not None else None)
        for i, g in enumerate(table.groups)
        if i not in gone
    )
    names = ", ".join(table.groups[i].name for i in sorted(gone))
    note = f"kept in order, since permuting them changed the outputs: {names}"
    return replace(table, entries=entries, groups=groups, notes=(*table.notes, note))


def _again(module: nn.Module) -> Callable[[], nn.Module]:
    """Fresh weights by each part's own reset_parameters."""

    def make() -> nn.Module:
        fresh = functional.own_copy(module)
        for part in fresh.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        return fresh

    return make


class _Naming(Interpreter):
    """Runs a graph and names the node that fails."""

    def run_node(self, n: Node) -> object:
        try:
            return super().run_node(n)
        except Exception as error:
            raise UserError(f"{n.target} at {graph.where(n)}: {str(error).splitlines()[0]}") from error


def _failing(found: graph.Graph, arch: ModuleArchitecture, theta_BP: Tensor, error: Exception) -> str:
    """The node of the graph that fails, or the error itself where the graph does not."""
    state, dims = functional.states(arch.table, theta_BP)
    program = found.exported
    example = next(n.meta["val"] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs)
    inputs = torch.zeros(example.shape, dtype=torch.float64 if example.is_floating_point() else example.dtype)

    def one(state: dict[str, Tensor]) -> object:
        return _Naming(program.graph_module).run(*found.arguments(state, inputs))

    try:
        torch.func.vmap(one, in_dims=(dims,))(state)
    except UserError as named:
        return str(named).splitlines()[0]
    except Exception:
        pass
    return str(error).splitlines()[0]
