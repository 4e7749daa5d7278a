"""Convolutional networks in float64 as the recovery fits them: features of the hidden layers, and their Jacobian.

theta[P] holds the hidden layers alone, one matrix [C, K + 1] each, its bias the last column; what follows the last
hidden layer is linear in its features, and is found by least squares (see projection.py).

Legend: Q queries, I inputs, O outputs, C channels (or units), K numbers that a channel reads at one position, L
positions before pooling, M after it, F features of the last hidden layer (C M), P parameters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.expand_cluster.convolution.hypothesis import Hypothesis, Stage
from distrecon.expand_cluster.weights import Weights
from distrecon.nets.activations import Activation
from distrecon.nets.architectures import Architecture, ChainArchitecture
from distrecon.nets.layers import Layer
from distrecon.nets.trace import of_module

MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus, "silu": nn.SiLU}
MODULES |= {"gelu": nn.GELU, "leaky_relu": nn.LeakyReLU}


@dataclass(frozen=True)
class Passed:
    """One stage's part of a forward pass.

    What each position reads [Q, K, L], the pre-activations [Q, C, L], what the next stage reads [Q, C, h, w], and
    which position a max pooling took [Q, C, M].
    """

    read_QKL: Tensor
    before_QCL: Tensor
    after: Tensor
    taken_QCM: Tensor | None

    def __getitem__(self, rows: slice) -> "Passed":
        """Of some of the queries."""
        taken = None if self.taken_QCM is None else self.taken_QCM[rows]
        return Passed(self.read_QKL[rows], self.before_QCL[rows], self.after[rows], taken)


@dataclass(frozen=True)
class ConvNet:
    """A hypothesis with widths (channels or units of every hidden layer) and an activation."""

    hypothesis: Hypothesis
    widths: tuple[int, ...]
    activation: Activation

    @cached_property
    def fan_ins(self) -> tuple[int, ...]:
        """K of every hidden layer."""
        channels = (self.hypothesis.input_shape[0], *self.widths)
        return tuple(c * math.prod(s.kernel) for c, s in zip(channels, self.hypothesis.stages, strict=False))

    @property
    def num_parameters(self) -> int:
        """P: of the hidden layers."""
        return sum(c * (k + 1) for c, k in zip(self.widths, self.fan_ins, strict=True))

    @property
    def num_features(self) -> int:
        """F: of the last hidden layer."""
        return self.widths[-1] * self.hypothesis.stages[-1].positions

    def matrices(self, theta_P: Tensor) -> list[Tensor]:
        """Views [C, K + 1] of theta, first layer first."""
        shapes = [(c, k + 1) for c, k in zip(self.widths, self.fan_ins, strict=True)]
        parts = theta_P.split([c * k for c, k in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @staticmethod
    def flatten(matrices: list[Tensor]) -> Tensor:
        """The inverse of `matrices`."""
        return torch.cat([m.flatten() for m in matrices])

    def trace(self, theta_P: Tensor, x_QI: Tensor) -> list[Passed]:
        """All stages on images that come flat."""
        hidden, passed = x_QI.unflatten(1, self.hypothesis.input_shape), []
        for stage, m in zip(self.hypothesis.stages, self.matrices(theta_P), strict=True):
            passed.append(self._pass(stage, m, hidden))
            hidden = passed[-1].after
        return passed

    def _pass(self, stage: Stage, m_CK: Tensor, hidden: Tensor) -> Passed:
        read_QKL = F.unfold(hidden, stage.kernel, padding=stage.padding, stride=stage.stride)
        before_QCL = torch.matmul(m_CK[:, :-1], read_QKL) + m_CK[:, -1:]
        after, taken = self.activation(before_QCL).unflatten(2, stage.before), None
        if stage.pool > 1 and stage.average:
            after = F.avg_pool2d(after, stage.pool)
        elif stage.pool > 1:
            after, taken = F.max_pool2d(after, stage.pool, return_indices=True)
        return Passed(read_QKL, before_QCL, after, None if taken is None else taken.flatten(2))

    def features(self, theta_P: Tensor, x_QI: Tensor) -> Tensor:
        """The last hidden layer's features [Q, F]."""
        return self.trace(theta_P, x_QI)[-1].after.flatten(1)

    def jacobian(self, theta_P: Tensor, passed: list[Passed], readout_OF: Tensor) -> Tensor:
        """d (readout features) / d theta, [Q, O, P], where the readout stays as it is."""
        blocks: list[Tensor] = []
        for here, delta_QOCL in self._backward(theta_P, passed, readout_OF):
            weights_QNK = torch.matmul(delta_QOCL.flatten(1, 2), here.read_QKL.transpose(1, 2))
            rows = torch.cat([weights_QNK, delta_QOCL.flatten(1, 2).sum(2, keepdim=True)], dim=2)
            blocks.insert(0, rows.unflatten(1, (len(readout_OF), -1)).flatten(2))
        return torch.cat(blocks, dim=2)

    def input_jacobian(self, theta_P: Tensor, passed: list[Passed], readout_OF: Tensor) -> Tensor:
        """d (readout features) / d inputs, [Q, O, I]."""
        *_, (_, delta_QOCL) = self._backward(theta_P, passed, readout_OF)
        back = self._read_back(0, self.matrices(theta_P)[0], delta_QOCL, self.hypothesis.input_shape[1:])
        return back.flatten(2)

    def _backward(self, theta_P: Tensor, passed: list[Passed], readout_OF: Tensor) -> Iterator[tuple[Passed, Tensor]]:
        """Every stage, last to first, with the gradients [Q, O, C, L] with respect to its pre-activations."""
        matrices = self.matrices(theta_P)
        shape = passed[-1].after.shape
        back = readout_OF.unflatten(1, shape[1:]).expand(shape[0], -1, -1, -1, -1)
        for number in range(len(passed) - 1, -1, -1):
            here = passed[number]
            slope_QCL = self.activation.derivative(here.before_QCL)
            delta_QOCL = _unpooled(self.hypothesis.stages[number], here, back) * slope_QCL[:, None]
            yield here, delta_QOCL
            if number:
                back = self._read_back(number, matrices[number], delta_QOCL, tuple(passed[number - 1].after.shape[2:]))

    def _read_back(self, number: int, m_CK: Tensor, delta_QOCL: Tensor, size: tuple[int, ...]) -> Tensor:
        """Gradients with respect to the map that a stage reads, [Q, O, C, h, w]."""
        stage = self.hypothesis.stages[number]
        read_NKL = torch.matmul(m_CK[:, :-1].T, delta_QOCL.flatten(0, 1))
        back = F.fold(read_NKL, size, stage.kernel, padding=stage.padding, stride=stage.stride)
        return back.unflatten(0, delta_QOCL.shape[:2])

    def weights(self, theta_P: Tensor, readout_OF: Tensor, bias_O: Tensor) -> Weights:
        """[(W, b), ...] as torch modules have them: W [C, C_in, k, k] of convolutions, [out, in] of dense layers."""
        found: Weights = []
        for stage, m in zip(self.hypothesis.stages, self.matrices(theta_P), strict=True):
            w = m[:, :-1].clone()
            found.append((w if stage.dense else w.unflatten(1, (-1, *stage.kernel)), m[:, -1].clone()))
        return [*found, (readout_OF.clone(), bias_O.clone())]

    @staticmethod
    def of(hypothesis: Hypothesis, weights: Weights, activation: Activation) -> tuple["ConvNet", Tensor]:
        """The network that weights are, and its theta[P]."""
        net = ConvNet(hypothesis, tuple(len(b) for _, b in weights[:-1]), activation)
        return net, net.flatten([torch.cat([w.flatten(1), b[:, None]], dim=1) for w, b in weights[:-1]])


def _unpooled(stage: Stage, here: Passed, back: Tensor) -> Tensor:
    """Gradients [Q, O, C, h, w] with respect to what was pooled, [Q, O, C, L]."""
    if stage.pool == 1:
        return back.flatten(3)
    shape = (*back.shape[:3], stage.before[0] * stage.before[1])
    if here.taken_QCM is not None:
        index = here.taken_QCM[:, None].expand(back.flatten(3).shape)
        return back.new_zeros(shape).scatter_(3, index, back.flatten(3))
    spread = (back / stage.pool**2).repeat_interleave(stage.pool, 3).repeat_interleave(stage.pool, 4)
    rest = (stage.before[1] - spread.shape[4], stage.before[0] - spread.shape[3])
    return F.pad(spread, (0, rest[0], 0, rest[1])).flatten(3)


@dataclass(frozen=True)
class Chain:
    """A network of convolutions and dense layers with all its weights, as a function."""

    hypothesis: Hypothesis
    weights: Weights
    activation: Activation

    @property
    def widest(self) -> int:
        """Numbers of its largest intermediate result for one query."""
        net, _ = ConvNet.of(self.hypothesis, self.weights, self.activation)
        stages = zip(net.fan_ins, net.widths, net.hypothesis.stages, strict=True)
        return max(max(k, c) * math.prod(stage.before) for k, c, stage in stages)

    def __call__(self, x_QI: Tensor) -> Tensor:
        """Outputs y[Q, O] of images that come flat."""
        net, theta_P = ConvNet.of(self.hypothesis, self.weights, self.activation)
        w, b = self.weights[-1]
        return torch.addmm(b, net.features(theta_P, x_QI), w.T)

    def outputs_and_terms(self, x_QI: Tensor) -> tuple[Tensor, Tensor]:
        """As certificate.outputs_and_terms, for convolutions and pooling."""
        net, theta_P = ConvNet.of(self.hypothesis, self.weights, self.activation)
        passed, matrices = net.trace(theta_P, x_QI), net.matrices(theta_P)
        image = x_QI.unflatten(1, self.hypothesis.input_shape)
        size, hidden = image.abs(), image
        for stage, m, here in zip(self.hypothesis.stages, matrices, passed, strict=True):
            read = F.unfold(hidden.abs() + size, stage.kernel, padding=stage.padding, stride=stage.stride)
            size = torch.matmul(m[:, :-1].abs(), read) + m[:, -1:].abs()
            if self.activation.symmetry != "scaled":
                size = self.activation.derivative(here.before_QCL).abs() * size
            size = (size + self.activation(here.before_QCL).abs()).unflatten(2, stage.before)
            if stage.pool > 1:
                size = F.avg_pool2d(size, stage.pool) if stage.average else F.max_pool2d(size, stage.pool)
            hidden = here.after
        w, b = self.weights[-1]
        y_QO = torch.addmm(b, hidden.flatten(1), w.T)
        return y_QO, torch.addmm(b.abs(), (hidden.abs() + size).flatten(1), w.abs().T)

    def module(self) -> nn.Sequential:
        """The same as a float64 torch module, whose state dict has the weights."""
        found: list[nn.Module] = []
        for stage, (w, _) in zip(self.hypothesis.stages, self.weights[:-1], strict=True):
            if stage.dense:
                found += [nn.Flatten(), nn.Linear(w.shape[1], w.shape[0])]
            else:
                found.append(nn.Conv2d(w.shape[1], w.shape[0], stage.kernel, stage.stride, stage.padding))
            found.append(MODULES[self.activation.name]())
            if stage.pool > 1:
                found.append((nn.AvgPool2d if stage.average else nn.MaxPool2d)(stage.pool))
        out, features = self.weights[-1][0].shape
        module = nn.Sequential(*found, nn.Flatten(), nn.Linear(features, out)).double()
        layers = [layer for layer in module if isinstance(layer, nn.Conv2d | nn.Linear)]
        for layer, (w, b) in zip(layers, self.weights, strict=True):
            layer.load_state_dict({"weight": w, "bias": b})
        return module

    def architecture(self) -> Architecture:
        """That of its module's state dict: a chain of layers where nets know such, else derived from the module."""
        stages, module = self.hypothesis.stages, self.module()
        monotone = self.activation.name not in ("gelu", "silu")  # nets' chains pool before the activation
        if any(s.stride > 1 or s.average or (s.pool > 1 and not monotone) for s in stages):
            return of_module(module, torch.zeros(1, *self.hypothesis.input_shape, dtype=torch.float64))
        names = [name for name, layer in module.named_children() if isinstance(layer, nn.Conv2d | nn.Linear)]
        layers, positions = list[Layer](), 1
        for name, (w, b), stage in zip(names, self.weights, (*stages, None), strict=True):
            if stage is None or stage.dense:
                layers.append(Layer(name, w.shape[1], len(b), positions=positions))
            else:
                layers.append(Layer(name, w.shape[1], len(b), stage.kernel[0], stage.padding, stage.pool))
            positions = 1 if stage is None else stage.positions
        return ChainArchitecture("recovered", tuple(layers), self.activation.name, self.hypothesis.input_shape)
