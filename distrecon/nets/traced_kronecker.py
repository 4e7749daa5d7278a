"""The Kronecker factors of any torch module: of its weighted sums as in `kronecker.py`, of everything else diagonals.

The module is traced on one input, and the graph run for all models and inputs at once, with a zero added to every
weighted sum (linear maps; convolutions of any stride, dilation and padding): the gradient with respect to the zero is
that with respect to the sum. A weight that is used at several places has the mean of what they read and the sum of how
they change the outputs (Eschenhagen et al. 2023, "expand"). A grouped convolution has one A, the mean over its groups,
and an S that is zero between groups.

All other entries (normalisation, its statistics, embeddings, transposed convolutions) are numbers that change the
outputs each by itself: the diagonal of the Gauss-Newton matrix, exactly, from a copy of the entry for each input.

Legend: B models, P parameters, Q inputs, C classes, O a matrix's rows, F its columns, N places at which a sum reads.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Interpreter, Node

from distrecon.nets import functional
from distrecon.nets.architectures import SMALLEST_VARIANCE, ModuleArchitecture
from distrecon.nets.graph import Graph, WeightedSum
from distrecon.nets.kronecker import PLACES, READ_NUMBERS, Factors
from distrecon.nets.table import Matrix

BY_STATISTICS = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)  # no gradient by these
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@torch.no_grad()
def factors(arch: ModuleArchitecture, theta_BP: Tensor, inputs: Tensor, temperature: float = 1.0) -> list[Factors]:
    """Both factors of each of `arch.table.matrices`, means over the models: [1, D, D], or [1, D] if diagonal; float64.

    In the metric of a softmax at this temperature (up to 1 / temperature^2), variances by their logarithms.
    """
    measured = Measured(arch, inputs[:1], theta_BP.device)
    pairs = max(1, READ_NUMBERS // measured.numbers)  # of a model and an input, at once
    for part_BP in theta_BP.split(max(1, pairs // len(inputs))):
        for some in inputs.split(pairs):
            measured.add(part_BP, some, temperature, places=max(1, PLACES * len(part_BP) * len(some) // len(inputs)))
    return measured.factors(len(theta_BP) * len(inputs))


class Measured:
    """Sums over models and inputs of which factors are made."""

    def __init__(self, arch: ModuleArchitecture, example: Tensor, device: torch.device) -> None:
        self.arch, self.table = arch, arch.table
        module = arch.running_on(device)
        own = next(value for value in module.state_dict().values() if value.is_floating_point())
        self.graph = Graph(module, example.to(own) if example.is_floating_point() else example, arch.name)
        self.names = [entry.name for entry in self.table.entries]
        matrix_of = {self.names[m.entries[0]]: i for i, m in enumerate(self.table.matrices)}
        nodes = self.graph.weighted_sums().items()
        self.sums: list[tuple[Node, WeightedSum, int]] = [(n, s, matrix_of[s.weight]) for n, s in nodes]
        summed = {e for _, _, i in self.sums for e in self.table.matrices[i].entries}
        self.rest = [self.names[e] for e in range(len(self.names)) if e not in summed]
        self.variances = {entry.name for entry in self.table.entries if entry.role == "variance"}
        self.groups = {i: s.groups for _, s, i in self.sums}
        self.moments: dict[int, Tensor] = {}  # of what a matrix reads, [F, F]
        self.places: dict[int, int] = {}  # of how many
        self.gradients: dict[int, Tensor] = {}  # [O, O]
        self.squares = {e.name: torch.zeros(e.shape, dtype=torch.float64, device=device) for e in self.table.entries}
        values = [n.meta["val"] for n in self.graph.exported.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        self.numbers = sum(value.numel() for value in values)

    def add(self, theta_BP: Tensor, inputs: Tensor, temperature: float, places: int) -> None:
        """Of these models on these inputs; each sum reads at so many places at most."""
        size = (len(theta_BP), len(inputs))
        state, dims = functional.states(self.table, theta_BP)
        inputs = inputs.to(theta_BP.dtype) if inputs.is_floating_point() else inputs
        first = self.graph.names  # of entries that have several
        shared = {name: value for name, value in state.items() if first.get(name, name) not in self.rest}

        def one(shared: Any, copies: Any, zeros: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            entries = shared | {name: copies[first[name]] for name in state if name not in shared}
            run = _Recording(self.graph, dict(zip([node for node, _, _ in self.sums], zeros, strict=True)))
            return run.outputs(entries, x[None])[0], run.read

        of_inputs = torch.func.vmap(one, in_dims=(None, 0, 0, 0))
        of_models = torch.func.vmap(of_inputs, in_dims=({name: dims[name] for name in shared}, 0, 0, None))
        with torch.enable_grad(), functional.plain_attention():
            copies = {name: state[name][:, None].repeat_interleave(size[1], 1).requires_grad_() for name in self.rest}
            zeros = [theta_BP.new_zeros(*size, *n.meta["val"].shape).requires_grad_() for n, _, _ in self.sums]
            logits_BQC, read = of_models(shared, copies, zeros, inputs)
            p_BQC = (logits_BQC.detach() / temperature).softmax(2)
            factor_C = (p_BQC.sqrt() * (logits_BQC - (p_BQC * logits_BQC).sum(2, keepdim=True))).sum((0, 1)).unbind()
        for x, (_, s, i) in zip(read, self.sums, strict=True):
            self._add_read(i, s, x.detach().flatten(0, 2), places)
        wanted = [*zeros, *copies.values()]
        for total in factor_C:  # gradients of a sum over models and inputs: each pair's own
            kept = total is not factor_C[-1]
            found = torch.autograd.grad(total, wanted, retain_graph=kept, allow_unused=True, materialize_grads=True)
            for grad, (_, s, i) in zip(found, self.sums, strict=False):
                rows_ON = grad.flatten(0, 2).movedim(1 if s.spatial else -1, 0).flatten(1)
                self.gradients[i] = self.gradients.get(i, 0) + (rows_ON @ rows_ON.T).double()
            for name, grad in zip(copies, found[len(zeros) :], strict=True):
                by_logarithm = grad * (copies[name] + SMALLEST_VARIANCE) if name in self.variances else grad
                self.squares[name] += by_logarithm.double().square().sum((0, 1))

    def _add_read(self, matrix: int, s: WeightedSum, x: Tensor, places: int) -> None:
        columns_FN = _columns(s, x)
        if columns_FN.shape[1] > places:
            order_N = torch.randperm(columns_FN.shape[1], generator=torch.Generator().manual_seed(0))
            columns_FN = columns_FN[:, order_N[:places].to(x.device)]
        if len(bias := self.table.matrices[matrix].entries[1:]):
            reads_one = s.bias is not None and s.bias == self.names[bias[0]]
            columns_FN = F.pad(columns_FN, (0, 0, 0, 1), value=float(reads_one))
        self.moments[matrix] = self.moments.get(matrix, 0) + (columns_FN @ columns_FN.T).double()
        self.places[matrix] = self.places.get(matrix, 0) + columns_FN.shape[1]

    def factors(self, pairs: int) -> list[Factors]:
        """Means, over so many pairs of a model and an input."""
        squares_BP = torch.cat([self.squares[name].flatten() for name in self.names])[None] / pairs
        diagonals = self.table.as_matrices(squares_BP)
        return [self._of_matrix(i, m, diagonals[i], pairs) for i, m in enumerate(self.table.matrices)]

    def _of_matrix(self, i: int, matrix: Matrix, diagonal_1OF: Tensor, pairs: int) -> Factors:
        if i not in self.gradients:  # its diagonal as far as it is a product
            mean = diagonal_1OF.mean().clamp_min(torch.finfo(torch.float64).tiny)
            return Factors(diagonal_1OF.mean(1), diagonal_1OF.mean(2) / mean)
        group_O = torch.arange(matrix.rows, device=diagonal_1OF.device) * self.groups[i] // matrix.rows
        same_OO = group_O[:, None] == group_O
        return Factors((self.moments[i] / self.places[i])[None], (self.gradients[i] * same_OO / pairs)[None])


def _columns(s: WeightedSum, x: Tensor) -> Tensor:
    """What a weight's rows are multiplied with, [F, N]; the operation reads [n, ..., I] or [n, I, *spatial]."""
    if not s.spatial:
        return x.flatten(0, -2).T
    picks = torch.eye(prod(s.kernel), dtype=x.dtype, device=x.device).view(-1, 1, *s.kernel)
    patches = CONVOLUTIONS[s.spatial - 1](x.flatten(0, 1)[:, None], picks, None, *s.settings)  # [n * I, k, *positions]
    by_group = patches.flatten(2).unflatten(0, (len(x), s.groups, -1))  # [n, G, I / G, k, positions]
    return by_group.movedim((2, 3), (0, 1)).flatten(2).flatten(0, 1)


class _Recording(Interpreter):
    """Runs a graph; keeps what weighted sums read, and adds to their results."""

    def __init__(self, graph: Graph, added: dict[Node, Tensor]) -> None:
        super().__init__(graph.exported.graph_module)
        self.traced, self.added = graph, added
        self.read: list[Tensor] = []

    def outputs(self, entries: dict[str, Tensor], inputs: Tensor) -> Tensor:
        results = self.run(*self.traced.arguments(entries, inputs))
        return results[self.traced.output_place]  # type: ignore[no-any-return]

    def run_node(self, n: Node) -> Any:
        if n not in self.added:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        self.read.append(args[0])
        return super().run_node(n) + self.added[n]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in BY_STATISTICS and not args[5]:
            x, weight, bias, mean, variance, training, momentum, eps = args[:8]
            return functional.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
        return super().call_function(target, args, kwargs)
