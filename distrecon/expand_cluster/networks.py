"""Groups of dense networks in float64: one matrix theta[N, P], batched forward, gradient and normal equations.

Layer l maps the augmented input `[h_l, (h_{l-1} with a skip), 1]` to pre-activations with one matrix `M_l`, so that a
bias is a column like any other. The optional skip is a linear path round each hidden layer: activations with
f(-u) = f(u) - u turn a neuron's sign flip into a linear term, which needs somewhere to live (Expand-and-Cluster,
arXiv 2304.12794, sec. 4).

Legend: N students, Q queries, I inputs, H hidden, O outputs, P parameters, K columns of an augmented input.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrecon.nets.activations import Activation

ROW_BYTES = 48 << 20  # the Jacobian is built in row chunks of about this size,
TRACE_BYTES = 64 << 20  # and all layers' pre-activations, a few copies of which are alive, where only a loss is wanted


@dataclass(frozen=True)
class DenseNet:
    """The architecture shared by a group of dense networks; the parameters live outside, as theta[N, P].

    `sizes` is (I, H_1, ..., O); `skip` adds the linear path round every hidden layer.
    """

    sizes: tuple[int, ...]
    activation: Activation
    skip: bool = False
    columns: tuple[int, ...] = field(init=False)
    num_parameters: int = field(init=False)

    def __post_init__(self) -> None:
        columns = tuple(
            self.sizes[layer] + (self.sizes[layer - 1] if self.skip and layer else 0) + 1
            for layer in range(len(self.sizes) - 1)
        )
        object.__setattr__(self, "columns", columns)
        parameters = sum(out * cols for out, cols in zip(self.sizes[1:], columns, strict=True))
        object.__setattr__(self, "num_parameters", parameters)

    def matrices(self, theta_NP: Tensor) -> list[Tensor]:
        """Views M_l[N, out, K_l] of theta[N, P], first layer first."""
        parts = theta_NP.split([o * k for o, k in zip(self.sizes[1:], self.columns, strict=True)], dim=-1)
        return [
            part.unflatten(-1, (out, cols)) for part, out, cols in zip(parts, self.sizes[1:], self.columns, strict=True)
        ]

    @staticmethod
    def flatten(matrices: list[Tensor]) -> Tensor:
        """The inverse of `matrices`."""
        return torch.cat([m.flatten(-2) for m in matrices], dim=-1)

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """theta[N, P] with unit-variance pre-activations for standardised inputs and small outgoing weights."""
        matrices = []
        for layer, (out, cols) in enumerate(zip(self.sizes[1:], self.columns, strict=True)):
            width, last = self.sizes[layer], layer == len(self.columns) - 1
            m = torch.randn(count, out, cols, generator=generator, dtype=torch.float64)
            m[..., :width] *= (0.5 if last else 1.0) / math.sqrt(width)
            m[..., width:-1] = 0.0
            m[..., -1] *= 0.0 if last else 0.5
            matrices.append(m)
        return self.flatten(matrices)

    def trace(self, theta_NP: Tensor, x_QI: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Augmented inputs [N, Q, K_l] and pre-activations [N, Q, H_l] of every layer; the last ones are the outputs.

        The first input is shared by all networks and comes as [1, Q, K_0].
        """
        matrices = self.matrices(theta_NP)
        ones_Q1 = x_QI.new_ones(x_QI.shape[0], 1)
        inputs = [torch.cat([x_QI, ones_Q1], dim=1)[None]]
        z = torch.matmul(inputs[0], matrices[0].transpose(1, 2))
        pre, previous = [z], x_QI.expand(theta_NP.shape[0], -1, -1)
        for m in matrices[1:]:
            hidden = self.activation(z)
            parts = [hidden, previous] if self.skip else [hidden]
            inputs.append(torch.cat([*parts, ones_Q1.expand(hidden.shape[0], -1, 1)], dim=2))
            z = torch.bmm(inputs[-1], m.transpose(1, 2))
            pre.append(z)
            previous = hidden
        return inputs, pre

    def __call__(self, theta_NP: Tensor, x_QI: Tensor) -> Tensor:
        """Outputs y[N, Q, O]."""
        return self.trace(theta_NP, x_QI)[1][-1]

    def loss(self, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor) -> Tensor:
        """Mean squared error of every network, [N]; in chunks of rows, as there may be many wide networks."""
        step = max(16, TRACE_BYTES // (8 * len(theta_NP) * sum(self.sizes[1:])))
        parts = zip(x_QI.split(step), y_QO.split(step), strict=True)
        return torch.stack([(self(theta_NP, x) - y).square().sum(dim=(1, 2)) for x, y in parts]).sum(0) / y_QO.numel()

    def loss_gradients(self, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Loss[N] and its gradient for every layer's matrix, by hand-written backpropagation."""
        inputs, pre = self.trace(theta_NP, x_QI)
        error = pre[-1] - y_QO
        gradients = self.pull_back(self.matrices(theta_NP), inputs, pre, error * (2 / y_QO.numel()))
        return error.square().mean(dim=(1, 2)), gradients

    def pull_back(
        self, matrices: list[Tensor], inputs: list[Tensor], pre: list[Tensor], delta_NQO: Tensor
    ) -> list[Tensor]:
        """J^T delta as one matrix for each layer; `inputs` and `pre` are the trace's."""
        deltas: dict[int, Tensor] = {len(matrices) - 1: delta_NQO}
        for layer in range(len(matrices) - 2, -1, -1):
            width = self.sizes[layer + 1]
            back = torch.bmm(deltas[layer + 1], matrices[layer + 1][..., :width])
            if self.skip and layer + 2 < len(matrices):
                start = self.sizes[layer + 2]
                back = back + torch.bmm(deltas[layer + 2], matrices[layer + 2][..., start : start + width])
            deltas[layer] = back * self.activation.derivative(pre[layer])
        return [torch.matmul(deltas[i].transpose(1, 2), inputs[i]) for i in range(len(matrices))]

    def push_forward(
        self, matrices: list[Tensor], inputs: list[Tensor], pre: list[Tensor], moves: list[Tensor]
    ) -> Tensor:
        """J moves [N, Q, O], where the matrices move by `moves`; `inputs` and `pre` are the trace's."""
        change = torch.matmul(inputs[0], moves[0].transpose(1, 2))
        before: Tensor | None = None
        for layer in range(1, len(matrices)):
            width = self.sizes[layer]
            hidden = self.activation.derivative(pre[layer - 1]) * change
            change = torch.matmul(inputs[layer], moves[layer].transpose(1, 2))
            change = change + torch.bmm(hidden, matrices[layer][..., :width].transpose(1, 2))
            if self.skip and before is not None:
                change = change + torch.bmm(before, matrices[layer][..., width:-1].transpose(1, 2))
            before = hidden
        return change

    def sensitivities(self, matrices: list[Tensor], pre: list[Tensor]) -> list[Tensor]:
        """d outputs / d pre-activations of every layer, [N, Q, O, H_l]."""
        count, rows, outputs = pre[-1].shape
        found = {len(pre) - 1: torch.eye(outputs, dtype=pre[-1].dtype).expand(count, rows, outputs, outputs)}
        for layer in range(len(pre) - 2, -1, -1):
            width = self.sizes[layer + 1]
            back = torch.matmul(found[layer + 1], matrices[layer + 1][:, None, :, :width])
            if self.skip and layer + 2 < len(pre):
                start = self.sizes[layer + 2]
                back = back + torch.matmul(found[layer + 2], matrices[layer + 2][:, None, :, start : start + width])
            found[layer] = back * self.activation.derivative(pre[layer])[:, :, None, :]
        return [found[i] for i in range(len(pre))]

    def jacobian(self, theta_NP: Tensor, x_QI: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs y[N, Q, O] and their Jacobian [N, Q, O, P]."""
        inputs, pre = self.trace(theta_NP, x_QI)
        jacobian_NQOP = theta_NP.new_empty(*pre[-1].shape, self.num_parameters)
        sizes = [out * cols for out, cols in zip(self.sizes[1:], self.columns, strict=True)]
        blocks = zip(
            jacobian_NQOP.split(sizes, dim=3), self.sensitivities(self.matrices(theta_NP), pre), inputs, strict=True
        )
        for block, s_NQOH, a_NQK in blocks:
            torch.mul(
                s_NQOH[..., None], a_NQK[:, :, None, None, :], out=block.unflatten(3, (s_NQOH.shape[3], a_NQK.shape[2]))
            )
        return pre[-1], jacobian_NQOP

    def normal_equations(self, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss[N], J^T r / M [N, P] and J^T J / M [N, P, P], where M = Q O residuals; built in chunks of rows."""
        count, outputs = theta_NP.shape[0], y_QO.shape[1]
        step = max(16, ROW_BYTES // (8 * count * self.num_parameters * min(outputs, 2)))
        loss = theta_NP.new_zeros(count)
        gradient = theta_NP.new_zeros(count, self.num_parameters)
        gram = theta_NP.new_zeros(count, self.num_parameters, self.num_parameters)
        for x, y in zip(x_QI.split(step), y_QO.split(step), strict=True):
            add = self._add_rows if outputs <= 2 else self._add_blocks
            add(theta_NP, x, y, loss, gradient, gram)
        if outputs > 2:
            gram = gram.triu() + gram.triu(1).transpose(1, 2)
        return loss / y_QO.numel(), gradient / y_QO.numel(), gram / y_QO.numel()

    def _add_rows(self, theta_NP: Tensor, x: Tensor, y: Tensor, loss: Tensor, gradient: Tensor, gram: Tensor) -> None:
        outputs, jacobian = self.jacobian(theta_NP, x)
        error, rows = (outputs - y).flatten(1), jacobian.flatten(1, 2)
        loss += error.square().sum(1)
        gradient += torch.bmm(error[:, None, :], rows)[:, 0]
        gram.baddbmm_(rows.transpose(1, 2), rows)

    def _add_blocks(self, theta_NP: Tensor, x: Tensor, y: Tensor, loss: Tensor, gradient: Tensor, gram: Tensor) -> None:
        """The same sums (upper half) without the outputs' axis: they need only sum_o s_oh s_oh', O times less work."""
        inputs, pre = self.trace(theta_NP, x)
        slopes = self.sensitivities(self.matrices(theta_NP), pre)
        error = pre[-1] - y
        loss += error.square().sum((1, 2))
        starts = [0]
        for out, cols in zip(self.sizes[1:], self.columns, strict=True):
            starts.append(starts[-1] + out * cols)
        for i, (s_i, a_i) in enumerate(zip(slopes, inputs, strict=True)):
            delta = torch.matmul(error[:, :, None, :], s_i)[:, :, 0]
            gradient[:, starts[i] : starts[i + 1]] += torch.matmul(delta.transpose(1, 2), a_i).flatten(1)
            for j in range(i, len(slopes)):
                coupling = torch.matmul(s_i.transpose(2, 3), slopes[j])  # [N, Q, H_i, H_j]
                for h in range(self.sizes[i + 1]):
                    first = h if i == j else 0
                    right = (coupling[:, :, h, first:, None] * inputs[j][:, :, None, :]).flatten(2)
                    block = torch.matmul(a_i.transpose(1, 2), right)
                    top, left = starts[i] + h * self.columns[i], starts[j] + first * self.columns[j]
                    gram[:, top : top + self.columns[i], left : starts[j + 1]] += block
