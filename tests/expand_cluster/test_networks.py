"""Hand-written derivatives against autograd, for every activation, depth and skip."""

import pytest
import torch

from distrecon.expand_cluster import networks
from distrecon.expand_cluster.networks import DenseNet
from distrecon.nets.activations import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(4, 6, 1), (4, 5, 3), (5, 4, 3, 4), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_derivatives_agree_with_autograd(name, sizes, skip, generator):
    net = DenseNet(sizes, ACTIVATIONS[name], skip)
    noise = torch.randn(2, net.num_parameters, generator=generator, dtype=torch.float64)
    theta_NP = (net.random(2, generator) if all(sizes) else 0) + 0.3 * noise
    x_QI = torch.randn(30, sizes[0], generator=generator, dtype=torch.float64)
    y_QO = torch.randn(30, sizes[-1], generator=generator, dtype=torch.float64)
    truth = torch.stack([torch.func.jacfwd(lambda t: net(t[None], x_QI)[0])(theta) for theta in theta_NP])
    outputs_NQO, jacobian = net.jacobian(theta_NP, x_QI)
    torch.testing.assert_close(jacobian, truth)
    torch.testing.assert_close(outputs_NQO, net(theta_NP, x_QI))
    loss_N, gradient_NP, gram_NPP = net.normal_equations(theta_NP, x_QI, y_QO)
    rows, errors = truth.flatten(1, 2), (net(theta_NP, x_QI) - y_QO).flatten(1)
    torch.testing.assert_close(gram_NPP, rows.transpose(1, 2) @ rows / errors.shape[1])
    torch.testing.assert_close(gradient_NP, (rows.transpose(1, 2) @ errors[..., None])[..., 0] / errors.shape[1])
    torch.testing.assert_close(loss_N, errors.square().mean(1))
    same_loss_N, gradients = net.loss_gradients(theta_NP, x_QI, y_QO)
    torch.testing.assert_close(same_loss_N, loss_N)
    torch.testing.assert_close(net.flatten(gradients), 2 * gradient_NP)


def test_matrices_and_flatten_are_inverse(generator):
    net = DenseNet((3, 4, 2), ACTIVATIONS["tanh"], skip=True)
    theta_NP = net.random(2, generator)
    assert theta_NP.shape == (2, net.num_parameters)
    torch.testing.assert_close(net.flatten(net.matrices(theta_NP)), theta_NP)


def test_a_loss_in_chunks_of_rows_is_the_whole_one(monkeypatch, generator):
    net = DenseNet((3, 5, 2), ACTIVATIONS["softplus"], skip=True)
    theta, x = net.random(4, generator), torch.randn(70, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(70, 2, generator=generator, dtype=torch.float64)
    whole = (net(theta, x) - y).square().mean(dim=(1, 2))
    monkeypatch.setattr(networks, "TRACE_BYTES", 1)
    torch.testing.assert_close(net.loss(theta, x, y), whole, rtol=1e-14, atol=0)
