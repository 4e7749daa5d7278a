"""Bends of piecewise linear black boxes: hyperplanes, rows, directions that hide, and whole recoveries."""

import itertools

import pytest
import torch

from distrecon import config as configuration
from distrecon.expand_cluster import BlackBox, Recovery, RecoveryConfig, hyperplanes, network, recover_network, score
from distrecon.expand_cluster.bends import Lines, random_lines, scan
from distrecon.expand_cluster.between import neurons_signs, rows_behind
from distrecon.expand_cluster.coordinates import Coordinates, find_coordinates
from distrecon.expand_cluster.from_bends import recover_from_bends
from distrecon.expand_cluster.hyperplanes import first_layer, join_rows, second_layer
from distrecon.expand_cluster.teachers import synthetic_teacher
from distrecon.nets.activations import activation

ONE_ROUND = configuration.replace(RecoveryConfig(), {"budget.attempts": 4})


def deep_weights(sizes, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(1.5 * draw(out, size) / size**0.5, 0.5 * draw(out)) for size, out in itertools.pairwise(sizes)]


def scanned(weights, name, lines=30):
    answer, size, outputs = network(weights, name), weights[0][0].shape[1], len(weights[-1][1])

    def answers(z):
        return answer(z.reshape(-1, size)).reshape(*z.shape[:-1], outputs)

    return scan(answers, *random_lines(size, 6.0, lines, torch.Generator().manual_seed(0)), 1e-16)


def distance(found_HK, true_TK):
    """Of every true row to the nearest found one, up to sign and scale."""
    found, true = (torch.nn.functional.normalize(v, dim=1) for v in (found_HK, true_TK))
    return torch.minimum(torch.cdist(true, found), torch.cdist(true, -found)).min(1).values


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_only_so_many_bends_are_clustered(name, monkeypatch):
    weights = deep_weights((5, 5, 4, 3), seed=1)
    lines = scanned(weights, name)
    monkeypatch.setattr(hyperplanes, "MOST_BENDS", len(lines.line_S) // 2 - 1)
    first_HK, clustering = first_layer(lines)
    assert len(clustering.vectors_VK) <= hyperplanes.MOST_BENDS
    assert distance(first_HK, torch.cat([weights[0][0], weights[0][1][:, None]], dim=1)).max() < 1e-7


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_lines_show_the_first_layer_and_then_the_second(name):
    weights = deep_weights((5, 5, 4, 3), seed=1)
    lines = scanned(weights, name)
    first_HK, clustering = first_layer(lines)
    truth_TK = torch.cat([weights[0][0], weights[0][1][:, None]], dim=1)
    assert len(first_HK) == len(clustering.clusters) == 5
    assert distance(first_HK, truth_TK).max() < 1e-7
    signed_HK, rows = second_layer(lines, first_HK, activation(name))
    matches_TH = torch.nn.functional.normalize(truth_TK, dim=1) @ signed_HK.T
    order_T = matches_TH.argmax(1)
    assert matches_TH.amax(1).min() > 1 - 1e-9  # with the right sign, not only up to it
    w, b = weights[1]
    norms_T = truth_TK.norm(dim=1)
    true_TK = torch.cat([w * norms_T, b[:, None]], dim=1)
    several = torch.stack([row.vector_K for row in rows if len(row.points_SR) > 2])
    found_HK = torch.cat([several[:, :-1][:, order_T], several[:, -1:]], dim=1)
    assert (distance(found_HK, true_TK) < 1e-5).sum() >= 3


def test_scans_of_a_smooth_function_find_nothing():
    lines = scanned(deep_weights((4, 4, 2), seed=0), "tanh", lines=6)
    assert len(lines.line_S) == 0
    assert lines.turns_LT.double().mean() > 0.1


def test_joined_scans_keep_each_bend_on_its_line():
    weights = deep_weights((3, 3, 2), seed=2)
    one, both = scanned(weights, "relu", 4), Lines.join([scanned(weights, "relu", 4)] * 2)
    assert len(both.start_LR) == 8
    assert both.line_S.tolist() == one.line_S.tolist() + [i + 4 for i in one.line_S.tolist()]
    along_SR = both.points_SR - both.start_LR[both.line_S]
    direction_SR = both.direction_LR[both.line_S]
    across = along_SR - (along_SR * direction_SR).sum(1, keepdim=True) * direction_SR
    assert across.abs().max() < 1e-9
    for plane_K in first_layer(both)[0]:
        assert both.bent_share(plane_K) == 1.0
    assert both.bent_share(torch.tensor([0.6, 0.7, -0.2, 0.1], dtype=torch.float64)) < 0.5


def test_partial_rows_are_joined_over_what_they_share():
    generator = torch.Generator().manual_seed(3)
    truth_HK = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    masks = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    scale_S = torch.tensor([2.0, -0.3, 1.0, 5.0, -1.0, 0.1], dtype=torch.float64)
    seen_SK = masks.repeat(2, 1)
    rows_SK = truth_HK.repeat_interleave(3, dim=0) * seen_SK * scale_S[:, None]
    joined = join_rows(rows_SK, seen_SK)
    assert sorted(sorted(group) for _, group in joined) == [[0, 1, 2], [3, 4, 5]]
    assert distance(torch.stack([vector for vector, _ in joined]), truth_HK).max() < 1e-12
    apart = join_rows(rows_SK[[0, 2]], seen_SK[[0, 2]])  # two coordinates in common are not enough
    assert len(apart) == 2
    masks = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 1, 1, 1, 0, 1]]).bool()  # bias and one weight in common
    rows_SK = torch.stack([truth_HK[0] * masks[0], truth_HK[0] * masks[1]])
    assert len(join_rows(rows_SK, masks)) == 1
    rows_SK[1, 1] *= 1 + 1e-6
    assert len(join_rows(rows_SK, masks)) == 2


def test_a_direction_that_is_off_where_gradients_are_taken_is_found():
    weights = deep_weights((12, 3, 2), seed=4)
    (w, b), last = weights
    w, b = w / w.norm(dim=1, keepdim=True), torch.tensor([0.1, -0.2, -4.0], dtype=torch.float64)
    box = BlackBox(network([(w, b), last], "relu"), 12)
    found = find_coordinates(box, activation("relu"), True, torch.Generator().manual_seed(0))
    assert found.rank == 3
    assert (w - w @ found.back_IR @ found.to_RI).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_two_hidden_layers_are_recovered_without_students(name):
    weights = deep_weights((12, 6, 5, 4), seed=6)
    result = recover_network(network(weights, name), 12, name, hidden_layers=2)
    metrics = score(result, weights)
    assert result.verified, result.reason
    assert result.layer_sizes == [6, 5]
    assert metrics["recover/max_cosine_distance"] < 1e-12
    assert result.metrics["recover/students"] == 0


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_answers_of_any_size_show_which_neurons_are_needed(size):
    weights = deep_weights((5, 6, 2), seed=0)
    weights[1] = tuple(size * part for part in weights[1])
    result = recover_network(network(weights, "relu"), 5, "relu", config=ONE_ROUND)
    assert result.verified, result.reason
    assert result.layer_sizes == [6]


def test_neurons_behind_a_layer_show_in_their_bends_and_their_signs_in_deeper_ones():
    weights = deep_weights((6, 4, 4, 4, 2), seed=0)
    lines, generator = scanned(weights, "leaky_relu", 150), torch.Generator().manual_seed(0)
    first_HK, second_NK, third_MK, _ = (torch.cat([w, b[:, None]], dim=1) for w, b in weights)
    rows = [row.vector_K for row in rows_behind(lines, [first_HK], activation("leaky_relu")) if len(row.points_SR) > 2]
    assert (distance(torch.stack(rows), second_NK) < 1e-5).sum() >= 3
    rows = [row.vector_K for row in rows_behind(lines, [first_HK, second_NK], activation("leaky_relu")) if row.complete]
    assert (distance(torch.stack(rows), third_MK) < 1e-5).any()
    flips_N = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    signs_N = neurons_signs(lines, [first_HK], second_NK * flips_N[:, None], activation("leaky_relu"), generator)
    assert torch.equal(signs_N, flips_N)


@pytest.mark.parametrize(("name", "seed"), [("relu", 1), ("leaky_relu", 0)])
def test_three_hidden_layers_are_recovered_without_students(name, seed):
    weights = deep_weights((6, 4, 4, 4, 2), seed)
    result = recover_network(network(weights, name), 6, name, hidden_layers=3)
    assert result.verified, result.reason
    assert result.layer_sizes == [4, 4, 4]
    assert score(result, weights)["recover/max_cosine_distance"] < 1e-12
    assert result.metrics["recover/students"] == 0


def test_probes_round_a_bend_reach_behind_it_in_a_corner():
    """What lies behind is only where all of fourteen coordinates stay below 0; they are at -.05, a fifteenth at 10."""
    eye = torch.eye(15, dtype=torch.float64)
    coordinates = Coordinates(eye, eye, 0 * eye, 1.0, 0.0)
    corner_SI = torch.full((1, 15), -0.05, dtype=torch.float64)
    corner_SI[:, 0] = 10.0
    near_QI = coordinates.near(corner_SI, 1000, torch.Generator().manual_seed(0))
    assert 0.1 < float((near_QI[:, 1:] < 0).all(1).double().mean()) < 0.6
    farthest = float((near_QI - corner_SI).norm(dim=1).max())
    assert 0.5 * 0.3 * 10 < farthest < 2 * 0.3 * 10


def test_opposite_neurons_that_carry_a_linear_term_are_not_called_verified():
    weights = deep_weights((6, 4, 4, 4, 2), seed=0)  # a neuron of the last layer is on wherever the others can be
    result = recover_network(network(weights, "relu"), 6, "relu", hidden_layers=3, config=ONE_ROUND)
    assert not result.verified
    assert "opposites" in result.reason


def test_a_neuron_that_never_turns_is_not_called_verified():
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    b = torch.tensor([0.1, -0.2, 0.3, 1e5], dtype=torch.float64)  # the last neuron is on wherever one may ask
    out = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    out[:, 3] *= 1e-3
    config = configuration.replace(RecoveryConfig(), {"students.count": 2, "budget.attempts": 1})
    result = recover_network(network([(w, b), (out, torch.zeros(4).double())], "relu"), 3, "relu", config=config)
    assert not result.verified


def test_smooth_activations_have_no_bends_to_recover_from():
    class Nothing:
        activation, hidden_layers = activation("tanh"), 1

    assert recover_from_bends(Nothing(), None) is None


@pytest.mark.parametrize("budget", [20_000, 24_000])
def test_bends_leave_the_students_their_share_of_the_queries(budget):
    settings = {"budget.queries": budget, "budget.attempts": 2, "students.count": 2}
    config = configuration.replace(RecoveryConfig(), settings)
    result = recover_network(network(synthetic_teacher(8, 6, "relu"), "relu"), 8, "relu", config=config)
    assert result.metrics["recover/queries"] <= budget


def test_a_network_of_another_slope_is_asked_finite_inputs_only():
    """Few probes: the lines towards what does not fit must not begin where they end."""
    settings = {"probes.count": 60, "budget.attempts": 2, "students.count": 2}
    config = configuration.replace(RecoveryConfig(), settings)
    answer = network(deep_weights((3, 2, 1), seed=0), "leaky_relu")

    def teacher(x_QI):
        assert x_QI.isfinite().all()
        return answer(x_QI)

    assert not recover_network(teacher, 3, "relu", config=config).verified


def test_nothing_found_is_far_from_the_teacher_by_a_finite_distance():
    """As when the queries run out at once: one relu neuron a layer, all of whose weights are 0."""
    teacher = synthetic_teacher(4, 3, "relu", seed=0)
    nothing = [
        (torch.zeros(1, 4).double(), torch.zeros(1).double()),
        (torch.zeros(1, 1).double(), torch.zeros(1).double()),
    ]
    metrics = score(Recovery(nothing, "relu", False, "nothing"), teacher)
    assert metrics["recover/max_cosine_distance"] == 0.5
