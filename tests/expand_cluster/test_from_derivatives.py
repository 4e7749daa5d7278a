"""Neurons from derivatives: their terms, their responses, the fit without matrices, and whole recoveries."""

from functools import partial

import pytest
import torch

from distrecon import config as configuration
from distrecon.expand_cluster import RecoveryConfig, network, recover_network, score, synthetic_teacher
from distrecon.expand_cluster import problem as problem_module
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.derivatives import Derivatives, triples, unfolded
from distrecon.expand_cluster.least_squares import levenberg_marquardt
from distrecon.expand_cluster.matrix_free import matrix_free
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.problem import NetworkFit, Problem, TrainingData
from distrecon.expand_cluster.profiles import derivative, fit_profile
from distrecon.expand_cluster.rank_one import rank_one_terms, span
from distrecon.expand_cluster.teachers import synthetic_problem
from distrecon.nets.activations import ACTIVATIONS

WITHOUT_STUDENTS = configuration.replace(RecoveryConfig(), {"solver.student_parameters": 0, "budget.attempts": 1})


def test_the_only_two_rank_one_matrices_of_a_plane_by_hand(generator):
    first, second = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 0], [3, 4]])  # e1 (1, 0)^T and e2 (3, 4)^T
    mixed = torch.stack([first + second, 2 * first - second, first + 3 * second]).double()
    left, right = rank_one_terms(span(mixed, 2), generator)
    order = left[:, 1].abs().argsort()
    torch.testing.assert_close(left[order].abs(), torch.eye(2).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        right[order].abs(), torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_more_terms_than_rows_and_columns_are_found(generator):
    left, right = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    terms = left[:, :, None] * right[:, None, :]
    samples = torch.einsum("sh,hab->sab", torch.randn(20, 9, generator=generator, dtype=torch.float64), terms)
    found_left, found_right = rank_one_terms(span(samples, 9), generator)
    cosines = torch.nn.functional.normalize(right, dim=1) @ found_right.T
    cosines = cosines * (torch.nn.functional.normalize(left, dim=1) @ found_left.T)
    assert len(found_right) == 9
    torch.testing.assert_close(cosines.abs().amax(1), torch.ones(9).double(), rtol=0, atol=1e-10)


def test_terms_that_are_much_alike_are_told_apart(generator):
    left, right = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (3, 5))
    right[1:3] = right[0] + 0.1 * right[1:3]  # the three right factors are within a few degrees of one another
    samples = torch.einsum("sh,ha,hb->sab", torch.randn(40, 5, generator=generator, dtype=torch.float64), left, right)
    found_left, found_right = rank_one_terms(span(samples, 5), generator)
    cosines = torch.nn.functional.normalize(right, dim=1) @ found_right.T
    cosines = cosines * (torch.nn.functional.normalize(left, dim=1) @ found_left.T)
    torch.testing.assert_close(cosines.abs().amax(1), torch.ones(5).double(), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_small_black_box_that_students_miss_is_read_from_derivatives():
    def clamped(x):  # nearly linear inside its limits
        return network(layers, "tanh")(x.clamp(0, 1))

    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layers = [(1.5 * draw(out, cols) / cols**0.5, draw(out) / 2) for cols, out in ((8, 5), (5, 3))]
    result = recover_network(clamped, 8, "tanh")
    assert result.verified, result.reason
    assert result.layer_sizes == [5]
    assert result.metrics["recover/students"] == 0


def test_derivatives_by_hand(generator):
    def box(x):  # Jacobian [[x1, x0], [3 x0^2, 0]]; along (1, 2): [[2, 1], [6 x0, 0]]
        return torch.stack([x[:, 0] * x[:, 1], x[:, 0] ** 3], dim=1)

    eye = torch.eye(2, dtype=torch.float64)
    here = Derivatives(BlackBox(box, 2), Coordinates(eye / 2, 2 * eye, 0 * eye, 2.0, 0.0), 5, generator)
    x0, x1 = (2 * here.z_SR).T
    zero = torch.zeros_like(x0)
    jacobian = torch.stack([torch.stack([x1, x0], 1), torch.stack([3 * x0**2, zero], 1)], 1)
    torch.testing.assert_close(here.jacobians(), 2 * jacobian, rtol=0, atol=1e-9)
    along = torch.stack([torch.stack([zero + 2, zero + 1], 1), torch.stack([6 * x0, zero], 1)], 1)
    torch.testing.assert_close(here.along(torch.tensor([[1.0, 2.0]]).double()), 4 * along, rtol=0, atol=1e-6)
    assert here.cost(1, 0) == 5 * 4 * 2


def test_third_derivatives_by_hand(generator):
    def box(x):  # x0^2 x1 has d^3 / dx0 dx0 dx1 = 2, x1^4 has 24 x1
        return torch.stack([x[:, 0] ** 2 * x[:, 1], x[:, 1] ** 4], dim=1)

    eye = torch.eye(2, dtype=torch.float64)
    here = Derivatives(BlackBox(box, 2), Coordinates(eye / 2, 2 * eye, 0 * eye, 2.0, 0.0), 5, generator)
    thirds = here.thirds(generator)  # in z = x / 2: 8 times as large
    assert triples(2).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    expected = torch.zeros(5, 2, 4, dtype=torch.float64)
    expected[:, 0, 1], expected[:, 1, 3] = 8 * 2, 8 * 24 * 2 * here.z_SR[:, 1]
    torch.testing.assert_close(thirds, expected, rtol=0, atol=1e-4)
    entries = torch.tensor([[[7.0, 8, 9, 10]]]).double()
    assert unfolded(entries, 2).tolist() == [[[7, 8], [8, 9], [9, 10]]]  # rows of the pairs 00, 01, 11
    assert here.cost(3, 0) == 5 * 8 * 6


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_steps_are_those_of_the_noise_relative_to_the_answers(size, generator):
    """Answers of any size with the same digits are asked at the same places."""

    def box(x):
        return size * (torch.sin(x.sum(1, keepdim=True)) * 2**20).round() / 2**20

    eye = torch.eye(2, dtype=torch.float64)
    here = Derivatives(BlackBox(box, 2), Coordinates(eye, eye, 0 * eye, 1.0, 0.0), 50, generator)
    deviation = float(torch.sin(here.x_SI.sum(1)).std())
    assert here.noise * deviation == pytest.approx(2**-20 / 12**0.5, rel=0.5)  # of a uniform rounding error


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "g", "softplus", "gelu", "silu"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_response_gives_slope_and_bias(name, order, generator):
    t = 2 * torch.randn(200, generator=generator, dtype=torch.float64)
    values = -0.3 * derivative(ACTIVATIONS[name], order)(0.8 * t - 0.5).detach()
    alpha, beta, loss = fit_profile(ACTIVATIONS[name], order, t, values)
    assert loss < 1e-20
    flip = -1 if alpha < 0 and ACTIVATIONS[name].symmetry != "none" else 1
    if ACTIVATIONS[name].symmetry == "even_linear" and order == 1:
        assert flip == 1  # f'(-u) = 1 - f'(u): only one sign fits
    assert (flip * alpha, flip * beta) == pytest.approx((0.8, -0.5), abs=1e-8)


def test_a_neuron_far_from_its_bend_is_found_by_the_little_that_its_slope_changes(generator):
    t = torch.randn(200, generator=generator, dtype=torch.float64)
    values = derivative(ACTIVATIONS["silu"], 1)(0.27 * t + 2.5).detach()
    assert fit_profile(ACTIVATIONS["silu"], 1, t, values)[:2] == pytest.approx((0.27, 2.5), abs=1e-6)


def test_without_matrices_a_linear_problem_is_solved_in_one_step(generator):
    net = DenseNet((4, 2), ACTIVATIONS["tanh"])
    x, y = torch.randn(30, 4, generator=generator).double(), torch.randn(30, 2, generator=generator).double()
    solution = matrix_free(net, net.random(1, generator), x, y, 1, 0.0)
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], dim=1), y).solution.T
    torch.testing.assert_close(net.matrices(solution.theta_NP)[0][0], exact, rtol=0, atol=3e-2)  # damped: not near
    closer = matrix_free(net, net.random(1, generator), x, y, 20, 0.0)
    torch.testing.assert_close(net.matrices(closer.theta_NP)[0][0], exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("skip", [False, True])
def test_products_with_the_jacobian_and_its_transpose(skip, generator):
    net = DenseNet((4, 3, 5, 2), ACTIVATIONS["tanh"], skip)
    x, theta, move = torch.randn(7, 4, generator=generator).double(), net.random(1, generator), net.random(1, generator)
    inputs, pre = net.trace(theta, x)
    _, jacobian = net.jacobian(theta, x)
    pushed = net.push_forward(net.matrices(theta), inputs, pre, net.matrices(move))
    torch.testing.assert_close(pushed, jacobian @ move[0], rtol=0, atol=1e-13)
    pulled = net.flatten(net.pull_back(net.matrices(theta), inputs, pre, pushed))
    torch.testing.assert_close(pulled[0], torch.einsum("qop,qo->p", jacobian[0], pushed[0]), rtol=0, atol=1e-12)


def test_with_and_without_matrices_a_fit_ends_at_rounding(generator):
    net = DenseNet((6, 5, 3), ACTIVATIONS["tanh"])
    x, true = torch.randn(200, 6, generator=generator).double(), net.random(1, generator)
    start = true + 0.02 * torch.randn(true.shape, generator=generator).double()
    y = net(true, x)[0]
    with_matrices = levenberg_marquardt(NetworkFit(net, x, y), start, 50)
    without = matrix_free(net, start, x, y, 50, 1e-28)
    assert float(with_matrices.loss_N) < 1e-26
    assert float(without.loss_N) < 1e-26
    torch.testing.assert_close(without.theta_NP, true, rtol=0, atol=1e-10)


@pytest.mark.parametrize("floor", [1e-26, 1e-15])
def test_a_polish_whose_steps_stay_short_goes_on(floor, generator, monkeypatch):
    """Inputs of scales 1 to 1e-3 in one direction: products alone take dozens of steps, matrices a few. Below the floor
    these go on, too: what hardly acts is told by the last digits."""
    net = DenseNet((40, 30, 4), ACTIVATIONS["tanh"])
    turn, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator).double())
    x = torch.randn(1500, 40, generator=generator).double() * torch.logspace(0, -3, 40).double() @ turn
    true = net.random(1, generator)
    data = TrainingData(x, x, net(true, x)[0], torch.zeros(4).double(), 1.0)
    config = configuration.replace(RecoveryConfig(), {"solver.iterations": 30 if floor < 1e-20 else 6})
    problem = Problem(data, ACTIVATIONS["tanh"], config, None, 1e-20, floor, None)
    steps = []
    plain = problem_module.matrix_free

    def kept(*args, **settings):
        steps.append(plain(*args, **settings))
        return steps[-1]

    monkeypatch.setattr(problem_module, "matrix_free", kept)
    solution = problem.refine(net, true + 1e-6 * torch.randn(true.shape, generator=generator).double())
    assert steps[0].iterations < 10
    if floor == 1e-26:
        assert float(steps[0].loss_N) > floor
        assert float(solution.loss_N) <= floor
        assert solution.iterations < 20
    else:
        assert float(steps[0].loss_N) < floor
        assert float(solution.loss_N) < 1e-3 * float(steps[0].loss_N)
        assert solution.iterations <= problem_module.LAST_STEPS
        assert solution is not steps[-1]


def _random(inputs, hidden, outputs, generator):
    return [
        (torch.randn(hidden, inputs, generator=generator).double() / inputs**0.5, torch.randn(hidden).double() / 2),
        (torch.randn(outputs, hidden, generator=generator).double(), torch.zeros(outputs).double()),
    ]


@pytest.mark.parametrize("name", ["tanh", "g", "softplus"])
def test_more_neurons_than_inputs_are_recovered_from_first_derivatives(name, generator):
    weights = _random(6, 9, 4, generator)
    result = recover_network(network(weights, name), 6, name, config=WITHOUT_STUDENTS)
    assert result.verified, result.reason
    assert score(result, weights)["recover/max_cosine_distance"] < 1e-15
    assert result.metrics["recover/students"] == 0


def test_of_one_output_second_derivatives_are_taken():
    weights = synthetic_teacher(5, 8, "tanh", seed=2)
    result = recover_network(network(weights, "tanh"), 5, "tanh", config=WITHOUT_STUDENTS)
    assert result.verified, result.reason
    assert score(result, weights)["recover/max_cosine_distance"] < 1e-15
    assert result.metrics["recover/students"] == 0


def test_of_one_output_more_neurons_than_second_derivatives_hold_are_found_by_third_ones():
    weights = synthetic_teacher(4, 9, "tanh", seed=2)  # 6 at most by second ones
    result = recover_network(network(weights, "tanh"), 4, "tanh", config=WITHOUT_STUDENTS)
    assert result.verified, result.reason
    assert score(result, weights)["recover/max_cosine_distance"] < 1e-15
    assert result.metrics["recover/students"] == 0


@pytest.mark.parametrize("sizes", [(16, 8), (10, 30)], ids=["as many as directions", "three times as many"])
def test_noise_of_symmetric_derivatives_is_no_rank(sizes):
    # second derivatives of one output are symmetric to the last digit, so that their noise ends in a gap as well
    weights = synthetic_problem(*sizes, "softplus", 3)
    result = recover_network(network(weights, "softplus"), sizes[0], "softplus", config=WITHOUT_STUDENTS)
    assert result.verified, result.reason
    assert score(result, weights)["recover/max_cosine_distance"] < 1e-15
    assert result.metrics["recover/students"] == 0


def test_without_derivatives_students_are_trained(generator):
    weights = _random(6, 3, 4, generator)
    config = configuration.replace(WITHOUT_STUDENTS, {"probes.derivatives": False, "warm_start.steps": 20})
    result = recover_network(network(weights, "tanh"), 6, "tanh", config=config)
    assert result.metrics["recover/students"] > 0


def test_two_hidden_layers_and_other_functions_are_not_taken_for_one(generator):
    shallow, last = _random(5, 4, 3, generator), _random(3, 4, 3, generator)
    deep = [shallow[0], (torch.randn(3, 4, generator=generator).double(), torch.zeros(3).double()), *last[1:]]
    deep[-1] = (torch.randn(3, 3, generator=generator).double(), torch.zeros(3).double())
    config = configuration.replace(WITHOUT_STUDENTS, {"warm_start.steps": 20})
    result = recover_network(network(deep, "tanh"), 5, "tanh", config=config)
    assert not result.verified
