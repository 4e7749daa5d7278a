"""Outgoing weights, missing and redundant neurons, sign flips."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distrecon.expand_cluster.outgoing import drop_costs, features, pursue, solve_outgoing
from distrecon.expand_cluster.signs import choose_flips, flip_constant
from distrecon.nets.activations import ACTIVATIONS


def problem(activation, generator, hidden=6, outputs=3, inputs=4):
    neurons = torch.randn(hidden, inputs + 1, generator=generator, dtype=torch.float64)
    outgoing = torch.randn(hidden + 1, outputs, generator=generator, dtype=torch.float64)
    z = torch.randn(400, inputs, generator=generator, dtype=torch.float64)
    return neurons, outgoing, z, features(neurons, z, activation, False) @ outgoing


def test_outgoing_weights_are_found_and_missing_neurons_added(generator):
    tanh = ACTIVATIONS["tanh"]
    neurons, outgoing, z, y = problem(tanh, generator)
    coefficients, error = solve_outgoing(features(neurons, z, tanh, False), y)
    torch.testing.assert_close(coefficients, outgoing)
    assert error < 1e-28
    pool = torch.cat([torch.randn(5, 5, generator=generator, dtype=torch.float64), neurons])
    completed = pursue(neurons[:4], pool, z, y, tanh, False, 1e-20)
    assert solve_outgoing(features(completed, z, tanh, False), y)[1] < 1e-20
    assert all((completed - neuron).norm(dim=1).min() == 0 for neuron in neurons)


def test_drop_costs_equal_solving_again_without_the_neuron(generator):
    gelu = ACTIVATIONS["gelu"]
    neurons, _, z, y = problem(gelu, generator)
    design = features(neurons, z, gelu, False)
    coefficients, _ = solve_outgoing(design, y)
    costs = drop_costs(design, coefficients, len(neurons))
    for h in range(len(neurons)):
        rest = torch.cat([design[:, :h], design[:, h + 1 :]], dim=1)
        torch.testing.assert_close(float(costs[h]), solve_outgoing(rest, y)[1], rtol=1e-6, atol=0)


def test_a_duplicate_costs_nothing(generator):
    tanh = ACTIVATIONS["tanh"]
    neurons, _, z, y = problem(tanh, generator)
    design = features(torch.cat([neurons, -neurons[:1]]), z, tanh, False)
    costs = drop_costs(design, solve_outgoing(design, y)[0], 7)
    assert costs[0] < 1e-20
    assert costs[6] < 1e-20
    assert costs[1:6].min() > 1e-4


@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if a.symmetry in ("even_linear", "scaled")])
def test_flipped_neurons_follow_from_the_linear_term(name):
    activation = ACTIVATIONS[name]

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(1, 3), st.integers(0, 1000))
    def flips_are_found(flips, outputs, seed):
        generator = torch.Generator().manual_seed(seed)
        neurons, _, z, y = problem(activation, generator, outputs=outputs)
        share_on = (z @ neurons[:, :-1].T + neurons[:, -1] > 0).double().mean(0)
        assume(bool(((share_on > 0) & (share_on < 1)).all()))  # a neuron that never turns is one with the linear term
        flipped = torch.where(torch.tensor(flips)[:, None], -neurons, neurons)
        coefficients, error = solve_outgoing(features(flipped, z, activation, True), y)
        assert error < 1e-20  # with the linear term, the flipped neurons compute the same function
        found = choose_flips(flipped, coefficients[:6].T, coefficients[6:10].T, flip_constant(activation), 1e-12)
        assert found.flips_H.tolist() == flips

    flips_are_found()
