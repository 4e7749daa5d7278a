"""Activations and the symmetries of a single neuron that each allows.

A neuron `a * f(w.x + b)` keeps its function under the symmetries of `f`
(Expand-and-Cluster, arXiv 2304.12794, section 4):

- `odd`              f(-u) = -f(u)           (w, b, a) -> (-w, -b, -a)
- `odd_constant`     f(-u) = 1 - f(u)        the same, and a constant moves to the next bias
- `even_linear`      f(-u) = f(u) - u        (w, b) -> (-w, -b), and a linear term moves to the next layer
- `scaled`           f(s u) = s f(u), s > 0  (w, b, a) -> (s w, s b, a / s), with even_linear's sign flip
- `none`             no symmetry
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError, nearest


@dataclass(frozen=True)
class Activation:
    """A pointwise function, its derivative (both written with differentiable torch operations) and its symmetry."""

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    symmetry: str  # "none" | "odd" | "odd_constant" | "even_linear" | "scaled"

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def _g(x: Tensor) -> Tensor:
    return torch.sigmoid(4 * x) + F.softplus(x)


def _g_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(4 * x)
    return 4 * s * (1 - s) + torch.sigmoid(x)


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_derivative(x: Tensor) -> Tensor:
    cdf = 0.5 * torch.erfc(-x * 0.5**0.5)
    return cdf + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5


LEAKY_SLOPE = 0.01

ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("relu", torch.relu, lambda x: (x > 0).to(x.dtype), "scaled"),
        Activation(
            "leaky_relu",
            lambda x: F.leaky_relu(x, LEAKY_SLOPE),
            lambda x: torch.where(x > 0, 1.0, LEAKY_SLOPE).to(x.dtype),
            "scaled",
        ),
        Activation("tanh", torch.tanh, lambda x: 1 - torch.tanh(x).square(), "odd"),
        Activation("sigmoid", torch.sigmoid, _sigmoid_derivative, "odd_constant"),
        # beta and threshold at their defaults; torch's softplus is linear above 20, off by 2e-9 relative
        Activation("softplus", F.softplus, torch.sigmoid, "even_linear"),
        Activation("silu", F.silu, _silu_derivative, "even_linear"),
        Activation("gelu", F.gelu, _gelu_derivative, "even_linear"),
        Activation("g", _g, _g_derivative, "none"),
    )
}


def activation(name: str) -> Activation:
    """The activation called `name`; UserError names the nearest known one."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
