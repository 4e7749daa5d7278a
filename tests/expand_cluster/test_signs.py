"""Signs of neurons from the linear term: worked by hand, wide, and where there is none."""

import math

import numpy as np
import pytest
import torch

from distrecon.expand_cluster import signs
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.collapse import exact_network
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.coordinates import find_coordinates
from distrecon.expand_cluster.neurons import LayerClustering
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.signs import carried_term, carriers, choose_flips
from distrecon.expand_cluster.teachers import synthetic_teacher
from distrecon.expand_cluster.weights import network
from distrecon.nets.activations import ACTIVATIONS


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_two_neurons_by_hand():
    """relu(2 - x) + 3 relu(x) as relu(x - 2) + 3 relu(x) + K x + 2: relu(-u) = relu(u) - u, so K = -1."""
    flips = choose_flips(rows([1.0, -2.0], [1.0, 0.0]), rows([1.0, 3.0]), rows([-1.0]), 1.0, 1e-14)
    assert flips.flips_H.tolist() == [True, False]
    assert flips.rest_OR.tolist() == [[0.0]]


def test_three_neurons_in_one_equation_by_hand():
    """Terms 1, 2 and 4: only the first and the third add up to 5; least squares rounded would take others."""
    flips = choose_flips(rows([1.0, 0.0], [1.0, 1.0], [1.0, 2.0]), rows([1.0, 2.0, 4.0]), rows([-5.0]), 1.0, 1e-14)
    assert flips.flips_H.tolist() == [True, False, True]


def test_a_rounding_of_zero_is_taken_as_that_of_the_numbers():
    """Terms 1, 2 and 4 as above; and .5, which no set of them gives."""
    neurons, outgoing = rows([1.0, 0.0], [1.0, 1.0], [1.0, 2.0]), rows([1.0, 2.0, 4.0])
    assert choose_flips(neurons, outgoing, rows([-5.0]), 1.0, 0.0).flips_H.tolist() == [True, False, True]
    assert choose_flips(neurons, outgoing, rows([-0.5]), 1.0, 0.0).rest_OR.abs().max() > 0.1


def test_without_neurons_the_linear_term_stays():
    flips = choose_flips(torch.empty(0, 2).double(), torch.empty(1, 0).double(), rows([0.5]), 1.0, 0.0)
    assert not len(flips.flips_H)
    assert flips.rest_OR.tolist() == [[0.5]]


@pytest.mark.parametrize(("hidden", "inputs", "outputs"), [(20, 8, 1), (32, 8, 1), (64, 8, 1), (40, 16, 3)])
def test_wide_layers(hidden, inputs, outputs):
    generator = torch.Generator().manual_seed(hidden)
    neurons = torch.randn(hidden, inputs + 1, generator=generator, dtype=torch.float64)
    outgoing = torch.randn(outputs, hidden, generator=generator, dtype=torch.float64)
    true = torch.rand(hidden, generator=generator) < 0.5
    linear = -outgoing[:, true] @ neurons[true, :-1]
    flips = choose_flips(neurons, outgoing, linear, 1.0, 1e-13)
    assert torch.equal(flips.flips_H, true)
    assert flips.sure_H.all()


def test_a_linear_term_that_no_signs_explain_is_carried():
    flips = choose_flips(rows([1.0, 0.0], [1.0, 1.0]), rows([1.0, 2.0]), rows([math.pi]), 1.0, 1e-14)
    assert flips.rest_OR.abs().min() > 0.1
    neurons, outgoing = carriers(flips.rest_OR, 1.0, 1e-14)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    carried = torch.relu(x @ neurons[:, :-1].T + neurons[:, -1]) @ outgoing.T
    torch.testing.assert_close(carried, x @ flips.rest_OR.T)
    assert len(neurons) == 2


def test_one_equation_of_too_few_digits_does_not_determine_many_signs():
    """One equation of some 20 bits for 40 neurons: some 2^20 sets explain it, and whichever is taken is a guess."""
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    outgoing = torch.ones(1, 40, dtype=torch.float64)
    linear = -neurons[::2, 0].sum().reshape(1, 1)
    assert not choose_flips(neurons, outgoing, linear, 1.0, 1e-7).determined
    few = choose_flips(neurons[:6], outgoing[:, :6], -neurons[:6:2, 0].sum().reshape(1, 1), 1.0, 1e-12)
    assert few.determined
    assert few.flips_H.tolist() == [True, False] * 3


def test_as_many_equations_as_neurons_determine_signs_with_few_digits():
    """Terms (1, 0) and (0, 1) to one digit: any other set is 2 away, though 1 / .4 is far from 20 bits."""
    flips = choose_flips(rows([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), rows([1.0, 1.0]), rows([-1.0, 0.0]), 1.0, 0.01)
    assert flips.determined
    assert flips.flips_H.tolist() == [True, False]


def test_a_neuron_below_the_rounding_has_no_sign_to_show():
    flips = choose_flips(rows([1.0, 0.0], [1.0, 1.0]), rows([1.0, 1e-16]), rows([-1.0]), 1.0, 1e-14)
    assert flips.sure_H.tolist() == [True, False]


def fitted(box, inputs, activation, neurons):
    """The irreducible network from neurons that are right but for their signs."""
    run = Run(
        BlackBox(box, inputs),
        ACTIVATIONS[activation],
        1,
        RecoveryConfig(),
        torch.Generator().manual_seed(0),
        None,
        None,
        lambda stage, value: None,
        None,
    )
    problem = run.problem(Probes(find_coordinates(run.box, run.activation, False, run.generator)), 400)
    none = LayerClustering(neurons, torch.zeros(len(neurons)).numpy(), torch.zeros(0, 4).numpy(), 0.0, [], True)
    return problem, exact_network(problem, neurons, neurons[:0], problem.floor, none)


def test_a_linear_rest_is_not_carried_where_it_may_be_a_neuron_that_is_not_found_yet():
    """relu(x0), relu(x1) and a third that never turns: with its linear term carried by two more, or not at all."""
    weights = [(rows([1.0, 0.0], [0.0, 1.0], [0.3, -0.2]), torch.tensor([0.0, 0.0, 1e3]).double())]
    weights.append((rows([1.0, -2.0, 3.0]), torch.zeros(1).double()))
    known = rows([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    problem, found = fitted(network(weights, "relu"), 2, "relu", known)
    assert found.loss < 1e-20
    assert "carry a linear term" in found.objection
    kept = exact_network(problem, known, known[:0], problem.floor, carry=False)
    assert len(kept.net.matrices(kept.theta_1P)[0][0]) == 2
    assert kept.loss > 1e-6


@pytest.mark.parametrize("activation", ["softplus", "gelu", "silu"])
def test_signs_of_wide_smooth_layers(activation):
    weights = synthetic_teacher(8, 24, activation, 1)
    neurons = torch.cat([weights[0][0], weights[0][1][:, None]], dim=1)
    signs = torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0).double()[:, None]
    _, found = fitted(network(weights, activation), 8, activation, signs * neurons)
    assert not found.objection
    assert found.loss < 1e-24
    rows_ = found.net.matrices(found.theta_1P)[0][0]
    torch.testing.assert_close(rows_, neurons)


def test_a_smooth_layer_and_a_linear_path_are_fitted_exactly_and_said():
    weights = synthetic_teacher(4, 3, "softplus", 1)
    net, path = network(weights, "softplus"), rows([0.3, -0.7, 0.2, 1.1])
    neurons = torch.cat([weights[0][0], weights[0][1][:, None]], dim=1)
    _, found = fitted(lambda x: net(x) + x @ path.T, 4, "softplus", neurons)
    assert found.loss < 1e-24
    assert found.net.sizes[1] == 5
    assert found.objection == carried_term(3, 2)


def test_twelve_more_bits_of_the_equations_are_reduced_at_a_time(monkeypatch):
    """Terms of up to 2^30 roundings: multiplied so that their largest is 2^12, 2^24, then 2^30 and 2^27."""
    largest = []

    def unchanged(chosen_NN, terms_NE, depth):
        largest.append(float(np.abs(terms_NE).max()))
        return chosen_NN

    monkeypatch.setattr(signs, "_reduced", unchanged)
    assert not list(signs._short_vectors(np.array([[2.0**30], [-(2.0**29)], [1.0]])))
    assert largest == [2.0**12, 2.0**24, *[2.0**30, 2.0**27] * 2]
