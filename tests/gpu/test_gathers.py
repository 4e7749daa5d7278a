"""What a GPU computes otherwise than the CPU, compared with it on the CPU."""

import pytest
import torch

from distrecon.nets import architecture, grouped, initialise, plain, random_permutation
from distrecon.nets.architectures import _token_gathers
from distrecon.nets.symmetries import _gathered_index, _permutation_index

NAMES = {"cnn_small": {}, "cnn3": {}, "lenet5": {}, "mlp": {"sizes": (5, 7, 4, 3)}}


@pytest.mark.parametrize("name", NAMES)
def test_gathers_are_what_the_layers_say(name: str) -> None:
    arch = architecture(name, **NAMES[name])
    orders = random_permutation(arch, torch.Generator().manual_seed(0), 3)
    assert torch.equal(_gathered_index(arch, orders), _permutation_index(arch, orders))
    theta_BP = initialise(arch, ["kaiming_normal"] * 3, range(3))
    tokens_BTD, cpu = arch.tokenize(theta_BP), torch.device("cpu")
    to_tokens_N, to_theta_P = _token_gathers(arch, cpu)
    padded = torch.nn.functional.pad(theta_BP, (0, 1))
    assert torch.equal(padded[:, to_tokens_N], tokens_BTD.flatten(1))
    assert torch.equal(tokens_BTD.flatten(1)[:, to_theta_P], theta_BP)


@pytest.mark.parametrize("activation", ["relu", "tanh", "g"])
@pytest.mark.parametrize("name", ["cnn_small", "cnn3", "lenet5"])
def test_grouped_convolutions_equal_the_plain_path(name: str, activation: str) -> None:
    """Outputs, gradients in weights and inputs, and second derivatives, to 1e-12 of the largest."""
    arch = architecture(name, activation=activation, image_size=22)
    theta_BP = initialise(arch, ["kaiming_normal"] * 3, range(3)).double().requires_grad_()
    inputs = torch.randn(4, *arch.input_shape, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    found = []
    for forward in (plain.forward, grouped.forward):
        logits_BQC = forward(arch, theta_BP, inputs)
        gradients = torch.autograd.grad(logits_BQC.square().sum(), (theta_BP, inputs), create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), theta_BP)
        found.append((logits_BQC, *gradients, *second))
    for expected, other in zip(*found, strict=True):
        assert float(expected.detach().abs().max()) > 0
        assert float((expected - other).detach().abs().max() / expected.detach().abs().max()) < 1e-12


def test_grouped_convolutions_take_forward_mode() -> None:
    arch = architecture("cnn_small", image_size=6, activation="tanh")
    theta_BP = initialise(arch, ["kaiming_normal"] * 2, range(2)).double()
    inputs = torch.randn(3, *arch.input_shape).double()
    tangent_BP = torch.randn_like(theta_BP)

    def grouped_forward(theta: torch.Tensor) -> torch.Tensor:
        return grouped.forward(arch, theta, inputs, transformed=True)

    found = torch.func.jvp(grouped_forward, (theta_BP,), (tangent_BP,))[1]
    expected = torch.func.jvp(lambda theta: plain.forward(arch, theta, inputs), (theta_BP,), (tangent_BP,))[1]
    torch.testing.assert_close(found, expected)
