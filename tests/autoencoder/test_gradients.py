"""The poster's first-order formulas against autograd."""

import pytest
import torch
from torch import Tensor

from distrecon.autoencoder import gradients
from distrecon.nets import Architecture, architecture
from tests.autoencoder.small import random_models


@pytest.fixture(scope="module")
def case():
    arch = architecture("mlp", sizes=(5, 4, 3), activation="tanh")
    draw = torch.Generator().manual_seed(0)
    theta_BP = random_models(arch, 3).double()
    delta_BP = 0.3 * torch.randn(theta_BP.shape, generator=draw, dtype=torch.float64)
    return arch, theta_BP, delta_BP, torch.randn(7, 5, generator=draw, dtype=torch.float64)


def jacobian(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """d logits / d theta of every model and query, [B, Q, C, P]; for small networks."""
    theta_BP = theta_BP.detach().requires_grad_(True)
    logits_BQC = arch.forward(theta_BP, inputs)
    rows = [
        torch.autograd.grad(logits_BQC[:, q, c].sum(), theta_BP, retain_graph=True)[0]
        for q in range(len(inputs))
        for c in range(arch.num_outputs)
    ]
    return torch.stack(rows, dim=1).unflatten(1, (len(inputs), arch.num_outputs))


def fisher_matrix(arch: Architecture, theta_BP: Tensor, theta_hat_BP: Tensor, inputs: Tensor) -> Tensor:
    """F_j of every model, [B, P, P]; for small networks (P^2 numbers a model)."""
    original = jacobian(arch, theta_BP, inputs).flatten(1, 2)
    rebuilt = jacobian(arch, theta_hat_BP, inputs).flatten(1, 2)
    return original.transpose(1, 2) @ rebuilt / len(inputs)


def test_jacobian_is_finite_differences(case):
    arch, theta_BP, delta_BP, inputs = case
    h = 1e-6
    slope = (arch.forward(theta_BP + h * delta_BP, inputs) - arch.forward(theta_BP - h * delta_BP, inputs)) / (2 * h)
    jacobian_BQCP = jacobian(arch, theta_BP, inputs)
    torch.testing.assert_close(torch.einsum("bqcp,bp->bqc", jacobian_BQCP, delta_BP), slope, rtol=1e-6, atol=1e-8)


def test_predicted_gradient_is_delta_times_the_matrix(case):
    arch, theta_BP, delta_BP, inputs = case
    theta_hat_BP = theta_BP + delta_BP
    f_BPP = fisher_matrix(arch, theta_BP, theta_hat_BP, inputs)
    expected_BP = torch.einsum("bp,bpq->bq", delta_BP, f_BPP)
    found_BP = gradients.predicted_gradient(arch, theta_BP, theta_hat_BP, inputs)
    torch.testing.assert_close(found_BP, expected_BP, rtol=1e-9, atol=1e-12)


def test_cosine_is_one_for_small_differences_and_falls(case):
    arch, theta_BP, delta_BP, inputs = case
    curve = gradients.cosine_curve(arch, theta_BP, theta_BP + 10 * delta_BP, inputs, [1e-4, 1e-2, 0.1, 1.0])
    assert curve[0] > 1 - 1e-6
    assert curve[1] > 0.99
    assert curve[3] < curve[1] - 0.05


def test_a_network_linear_in_its_weights_is_predicted_exactly(case):
    _, _, _, inputs = case
    arch = architecture("mlp", sizes=(5, 3), activation="tanh")
    theta_BP = random_models(arch, 2).double()
    theta_hat_BP = random_models(arch, 2, first_seed=9).double()
    predicted_BP = gradients.predicted_gradient(arch, theta_BP, theta_hat_BP, inputs)
    exact_BP = gradients.behavioral_gradient(arch, theta_BP, theta_hat_BP, inputs)
    torch.testing.assert_close(predicted_BP, exact_BP, rtol=1e-10, atol=1e-12)


def test_layers_and_convolutions(images):
    arch = architecture("cnn_small")
    theta_BP = random_models(arch, 4)
    theta_hat_BP = theta_BP + 1e-3 * torch.randn(theta_BP.shape, generator=torch.Generator().manual_seed(1))
    found = gradients.analyse(arch, theta_BP, theta_hat_BP, images.train.images[:64])
    assert found.cosine_B.min() > 0.99
    assert found.cosine_LB.shape == (4, 4)
    assert found.cosine_LB.min() > 0.99
    assert found.structural_cosine_LB.abs().max() < 0.9  # a random error is no descent direction of the outputs
    last = arch.layer_of_parameter_P == 3
    expected = (theta_hat_BP - theta_BP)[:, last].norm(dim=1)
    torch.testing.assert_close(found.structural_norm_LB[3], expected)
