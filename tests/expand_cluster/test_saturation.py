"""Two hidden layers of tanh or sigmoid, seen from far out: directions, slopes, biases, and the whole network."""

import itertools

import pytest
import torch

from distrecon.expand_cluster import network, recover_network
from distrecon.expand_cluster.derivatives import jacobians
from distrecon.expand_cluster.saturation import Sample, SpanFit, Units, exact_units, first_layer, second_size
from distrecon.nets.activations import ACTIVATIONS


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def weights(sizes, seed=1, gain=1.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(gain * draw(out, cols) / cols**0.5, 0.5 * draw(out)) for cols, out in itertools.pairwise(sizes)]


def true_units(layers):
    w_HR, b_H = layers[0]
    slope_H = w_HR.norm(dim=1)
    return Units(w_HR / slope_H[:, None], slope_H, b_H)


def matched(units, layers):
    """The true neurons' numbers and the signs by which found directions differ."""
    cosine_HH = units.direction_HR @ true_units(layers).direction_HR.T
    number_H = cosine_HH.abs().argmax(1)
    assert sorted(number_H.tolist()) == list(range(len(number_H)))
    return number_H, cosine_HH[torch.arange(len(number_H)), number_H].sign()


def test_jacobians_by_hand():
    """y = (x0^2 x1, x1^3) at (2, 3): rows (2 x0 x1, x0^2) and (0, 3 x1^2)."""
    found = jacobians(
        lambda x: torch.stack([x[:, 0] ** 2 * x[:, 1], x[:, 1] ** 3], dim=1),
        torch.tensor([[2.0, 3.0]], dtype=torch.float64),
        torch.tensor([0.01], dtype=torch.float64),
    )
    expected = torch.tensor([[[12.0, 4.0], [0.0, 27.0]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_first_layer_shows_itself_far_out(name, generator):
    layers, activation = weights([5, 5, 6, 3]), ACTIVATIONS[name]
    ask = network(layers, name)
    units = first_layer(ask, 5, activation, generator)
    number_H, sign_H = matched(units, layers)
    truth = true_units(layers)
    error = units.direction_HR * sign_H[:, None] - truth.direction_HR[number_H]
    assert error.abs().max() < 1e-8
    torch.testing.assert_close(units.slope_H, truth.slope_H[number_H], rtol=1e-2, atol=0)  # from exponential tails
    size = second_size(ask, units, generator)
    assert size == 6
    exact, _, outside = exact_units(ask, units, size, activation, generator)
    assert outside < 1e-14
    torch.testing.assert_close(exact.slope_H, truth.slope_H[number_H], rtol=1e-6, atol=0)
    torch.testing.assert_close(exact.bias_H, (truth.bias_H[number_H] * sign_H), rtol=0, atol=1e-6)


def test_points_have_the_pre_activations_asked_for(generator):
    units = true_units(weights([7, 4, 4, 2]))
    u_SH = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    z_SR = units.points(u_SH)
    torch.testing.assert_close(z_SR @ units.neurons_HK[:, :-1].T + units.neurons_HK[:, -1], u_SH)


def test_only_true_slopes_and_biases_leave_nothing_outside_the_span(generator):
    layers, activation = weights([4, 4, 3, 3]), ACTIVATIONS["tanh"]
    truth = true_units(layers)
    sample = Sample.draw(network(layers, "tanh"), truth, 40, generator)
    fit = SpanFit(sample, activation, 3)
    theta_P = torch.cat([truth.slope_H, truth.bias_H])
    assert fit.loss(theta_P[None]) < 1e-16
    moved_PP = theta_P + 0.05 * torch.eye(8, dtype=torch.float64)
    assert (fit.loss(moved_PP) > 1e-6).all()


def test_gradient_of_what_is_outside_and_its_gauss_newton_matrix(generator):
    layers, activation = weights([4, 4, 3, 3]), ACTIVATIONS["sigmoid"]
    truth = true_units(layers)
    sample = Sample.draw(network(layers, "sigmoid"), truth, 40, generator)
    fit = SpanFit(sample, activation, 3)
    theta_P = torch.cat([truth.slope_H, truth.bias_H])
    theta_P = theta_P + 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
    _, gradient_1P, _ = fit.normal_equations(theta_P[None])
    step = 1e-5 * torch.eye(8, dtype=torch.float64)
    unit = fit._outside(theta_P)[2]  # the matrix's norm, which counts as fixed

    def outside(theta_P):
        share, _, norm, *_ = fit._outside(theta_P)
        return share * (norm / unit) ** 2

    slope_P = torch.stack([(outside(theta_P + row) - outside(theta_P - row)) / 2e-5 for row in step])
    torch.testing.assert_close(gradient_1P[0], slope_P / 2, rtol=1e-5, atol=1e-9)
    # at the solution the loss is the Gauss-Newton matrix's quadratic form
    exact_P = torch.cat([truth.slope_H, truth.bias_H])
    _, _, gram_1PP = fit.normal_equations(exact_P[None])
    direction_P = 1e-4 * torch.randn(8, generator=generator, dtype=torch.float64)
    expected = direction_P @ gram_1PP[0] @ direction_P
    torch.testing.assert_close(fit.loss((exact_P + direction_P)[None])[0], expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("name", "sizes"), [("tanh", [8, 5, 4, 3]), ("sigmoid", [6, 4, 7, 4])])
def test_two_hidden_layers_are_recovered_without_students(name, sizes):
    layers = weights(sizes)
    found = recover_network(network(layers, name), sizes[0], name, hidden_layers=2)
    assert found.verified, found.reason
    assert found.layer_sizes == sizes[1:-1]
    assert found.metrics["recover/students"] == 0
    x_QI = 3 * torch.randn(200, sizes[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(found(x_QI), network(layers, name)(x_QI), rtol=1e-9, atol=1e-9)


def test_more_neurons_than_inputs_and_networks_that_do_not_saturate_are_left_to_students(generator):
    tanh = ACTIVATIONS["tanh"]
    assert first_layer(network(weights([3, 5, 4, 3]), "tanh"), 3, tanh, generator) is None
    assert first_layer(network(weights([4, 4, 4, 3]), "softplus"), 4, ACTIVATIONS["softplus"], generator) is None
