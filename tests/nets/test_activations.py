"""Derivatives by autograd, and the symmetry that each activation claims."""

import pytest
import torch

from distrecon.nets import ACTIVATIONS, activation

X = torch.linspace(-6, 6, 101, dtype=torch.float64) + 0.013  # not at the kink of relu

SYMMETRIES = {
    "odd": lambda f: f(-X) + f(X),
    "odd_constant": lambda f: f(-X) + f(X) - 1,
    "even_linear": lambda f: f(-X) - f(X) + X,
    "scaled": lambda f: f(2.5 * X) - 2.5 * f(X),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_autograds(name: str) -> None:
    act = activation(name)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(act(x).sum(), x)
    torch.testing.assert_close(act.derivative(X), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_claimed_symmetry_holds_and_unclaimed_ones_do_not(name: str) -> None:
    act = activation(name)
    for kind, residual in SYMMETRIES.items():
        holds = residual(act).abs().max() < 1e-7
        implied = (kind, act.symmetry, name) == ("even_linear", "scaled", "relu")  # relu(-u) = relu(u) - u
        assert bool(holds) == (kind == act.symmetry or implied), kind
