"""The verdict, by networks that are nearly right: each is refused for its own reason, and the right one is not."""

import dataclasses
import itertools

import pytest
import torch

from distrecon import config as configuration
from distrecon.expand_cluster import (
    BlackBox,
    Recovery,
    RecoveryConfig,
    network,
    recover_network,
    score,
    synthetic_teacher,
)
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.surroundings import Surroundings, unbounded
from distrecon.expand_cluster.symptoms import Sample
from distrecon.expand_cluster.verdict import _undetermined, beyond, confirm, judge
from distrecon.nets.activations import activation


def coordinates(inputs, scale=1.0):
    eye_II = torch.eye(inputs, dtype=torch.float64)
    return Coordinates(eye_II / scale, eye_II * scale, torch.zeros_like(eye_II), scale, 0.0)


def teacher(sizes=(3, 4, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(o, i, generator=generator).double(), torch.randn(o, generator=generator).double())
        for i, o in itertools.pairwise(sizes)
    ]


def copied(weights):
    return [(w.clone(), b.clone()) for w, b in weights]


def verdict(weights, black_box=None, name="tanh", earlier_QI=None, explored=(), data_QI=None):
    """Judges the network as if it had been found, beside a black box that was asked `earlier` too."""
    inputs = weights[0][0].shape[1]
    function, draws = black_box or network(weights, name), torch.Generator().manual_seed(1)
    around = Surroundings(torch.zeros(inputs), torch.ones(inputs), *unbounded(inputs))
    box = BlackBox(function, inputs, noise_O=Sample.draw(function, around, draws).noise_O)
    if earlier_QI is not None:
        box(earlier_QI)
    generator = torch.Generator().manual_seed(0)
    run = Run(box, activation(name), len(weights) - 1, RecoveryConfig(), generator, data_QI, None, print, None)
    problem = run.problem(Probes(coordinates(inputs)), 20)
    run.explored.extend(explored)
    return run, judge(run, problem, weights, True, 0.0)


@pytest.mark.parametrize("name", ["tanh", "relu", "softplus"])
def test_nothing_is_held_against_the_right_network(name):
    run, found = verdict(teacher(), name=name)
    assert not found.objection
    assert found.certificate.fresh == 1250
    assert found.certificate.given == run.box.queries - 1250
    assert found.contradictions_QI is None


def test_an_output_is_judged_by_its_own_scale():
    right = teacher()
    right[1][0][0] *= 1e14
    right[1][1][0] *= 1e14
    assert not verdict(right)[1].objection
    wrong = copied(right)
    wrong[1][0][1, 0] += 1e-3
    assert "output 1" in verdict(wrong, network(right, "tanh"))[1].objection


@pytest.mark.parametrize(("shift", "refused"), [(1e-12, False), (1e-9, True)])
def test_the_tolerance_lies_between(shift, refused):
    right, wrong = teacher(), teacher()
    wrong[1][1][1] += shift
    found = verdict(wrong, network(right, "tanh"))[1]
    assert ("output 1" in found.objection) == refused


def test_each_output_has_the_tolerance_of_its_own_noise():
    right = network(teacher(), "tanh")

    def rounded(x_QI, columns=(0, 1)):
        return torch.stack(
            [right(x_QI)[:, c].float() if c in columns else right(x_QI)[:, c] for c in (0, 1)], 1
        ).double()

    shifted = teacher()
    shifted[1][1][1] += 3e-8
    assert not verdict(shifted, rounded)[1].objection
    assert "output 1" in verdict(shifted, lambda x_QI: rounded(x_QI, (0,)))[1].objection


def test_answers_far_out_may_differ_by_the_rounding_of_their_terms():
    right, turned = teacher((3, 6, 1)), torch.tensor([5, 3, 1, 0, 2, 4])
    (w, b), (a, c) = right
    same = [(2.1 * w[turned], 2.1 * b[turned]), (a[:, turned] / 2.1, c)]
    far_QI = 1e9 * torch.randn(500, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert (network(same, "relu")(far_QI) - network(right, "relu")(far_QI)).abs().max() > 1e-8
    assert not verdict(same, network(right, "relu"), "relu", far_QI)[1].objection


def test_an_earlier_answer_refutes_what_fresh_ones_do_not():
    weights, place_I = teacher(), torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)

    def black_box(x_QI):
        near_Q1 = ((x_QI - place_I).norm(dim=1, keepdim=True) < 1e-3).double()
        return network(weights, "tanh")(x_QI) + 1e-9 * near_Q1 * torch.tensor([0.0, 1.0], dtype=torch.float64)

    assert not verdict(weights, black_box)[1].objection
    earlier_QI = torch.cat([torch.zeros(1, 3).double(), place_I[None]])
    found = verdict(weights, black_box, earlier_QI=earlier_QI)[1]
    assert "output 1: 1 of " in found.objection
    assert "of the run's answers contradict it" in found.objection
    assert found.contradictions_QI is not None
    assert torch.equal(found.contradictions_QI[-1], place_I)


def test_fresh_queries_go_beyond_every_earlier_one():
    weights = teacher()

    def black_box(x_QI):
        return network(weights, "tanh")(x_QI) + torch.relu(x_QI[:, :1] - 500.0)

    assert not verdict(weights, black_box)[1].objection  # nobody asked so far out
    earlier_QI = torch.tensor([[499.0, 0.0, 0.0]], dtype=torch.float64)
    assert "fresh answers contradict it" in verdict(weights, black_box, earlier_QI=earlier_QI)[1].objection


def test_fresh_queries_are_drawn_in_all_coordinates_of_the_run():
    weights = teacher()

    def black_box(x_QI):
        return network(weights, "tanh")(x_QI) + torch.relu(x_QI.norm(dim=1, keepdim=True) - 1000.0)

    assert not verdict(weights, black_box)[1].objection
    assert verdict(weights, black_box, explored=[coordinates(3, 100.0)])[1].objection


def test_the_users_data_are_asked():
    weights, place_QI = teacher(), torch.full((1, 3), 0.123, dtype=torch.float64)

    def black_box(x_QI):
        return network(weights, "tanh")(x_QI) + (x_QI == place_QI).all(1, keepdim=True)

    assert not verdict(weights, black_box)[1].objection
    assert verdict(weights, black_box, data_QI=place_QI)[1].objection


def test_queries_beyond_reach_farther_in_each_coordinate_and_in_norm(generator):
    for middle in (0.0, 50.0, -7.0):
        asked_QI = middle + torch.randn(100, 4, generator=generator, dtype=torch.float64)
        found_QI = beyond(asked_QI, 20, generator)
        assert found_QI.shape == (20, 4)
        assert (found_QI.amin(0) < asked_QI.amin(0)).all()
        assert (found_QI.amax(0) > asked_QI.amax(0)).all()
        assert found_QI.norm(dim=1).max() > asked_QI.norm(dim=1).max()


def split(weights, apart=0.0):
    """The same function with its first neuron as two, `apart` from each other."""
    (w, b), (a, c) = weights
    twice = torch.tensor([0, *range(len(b))])
    w, b, a = w[twice], b[twice], a[:, twice].clone()
    a[:, :2] /= 2
    b[0], b[1] = b[0] - apart, b[1] + apart
    return [(w, b), (a, c)]


def test_a_superfluous_neuron_is_refused():
    weights = teacher()
    assert "can be dropped: that costs" in verdict(split(weights), network(weights, "tanh"))[1].objection


def test_two_neurons_that_do_the_work_of_one_only_together_are_refused():
    """As answers rounded to float32 allow: dropping one costs a lot as long as the other stays where it is."""
    weights = teacher((3, 2, 1))
    rounded = network([(w.float(), b.float()) for w, b in weights], "tanh")
    found = verdict(split(weights, 1e-4), lambda x_QI: rounded(x_QI.float()))[1]
    assert "fitted again, do without it" in found.objection


def test_a_neuron_that_never_bends_is_refused():
    weights = teacher((2, 3, 1))
    weights[0][1][1] = 2000.0  # on at all queries
    weights[1][1][0] -= 2000.0 * weights[1][0][0, 1]
    assert "one side of their kink" in verdict(weights, name="relu")[1].objection


def test_opposite_neurons_that_only_carry_a_linear_term_are_refused():
    w, b = torch.tensor([[1.0, 0.5], [-2.0, -1.0], [0.3, -1.0]]).double(), torch.tensor([0.2, -0.4, 0.1]).double()
    for last, refused in ((-0.5, True), (-0.4, False)):  # f(u) - f(-u) = u; else they bend
        out = torch.tensor([[1.0, last, 0.7]]).double()
        objection = verdict([(w, b), (out, torch.zeros(1).double())], name="relu")[1].objection
        assert ("opposites" in objection) == refused, objection


def test_a_weight_that_no_answer_shows_is_refused():
    weights = [
        (torch.tensor([[1.0], [-1.0]]).double(), torch.zeros(2).double()),
        (torch.tensor([[1.0, -100.0]]).double(), torch.tensor([-0.1]).double()),
        (torch.ones(1, 1).double(), torch.zeros(1).double()),
    ]
    assert "respond to an input at none" in verdict(weights, name="relu")[1].objection


def test_a_weight_that_only_answers_of_the_run_show_is_determined_by_these():
    weights = [
        (torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([0.0, 0.001]).double()),  # both on for x below .001
        (torch.tensor([[1.0, -1.0], [0.5, 1.0]]).double(), torch.tensor([-0.0001, -0.1]).double()),
        (torch.tensor([[1.0, 1.0]]).double(), torch.zeros(1).double()),
    ]
    assert "1 neurons respond to an input at none" in verdict(weights, name="relu")[1].objection
    earlier_QI = torch.linspace(0.0005, 0.0011, 50, dtype=torch.float64)[:, None]
    assert not verdict(weights, name="relu", earlier_QI=earlier_QI)[1].objection
    assert "at none" in verdict(weights, name="relu", earlier_QI=earlier_QI + 1)[1].objection


def test_an_inexact_fit_is_called_that():
    right, wrong = teacher(), teacher()
    wrong[1][0][0, 0] += 1e-3
    run, _ = verdict(right)
    problem = run.problem(Probes(coordinates(3)), 20)
    found = judge(run, problem, wrong, True, 1e-6)
    assert "the best fit leaves a relative error of 1.0e-03" in found.objection
    assert found.certificate.given == 0
    assert found.contradictions_QI is None


def test_answers_given_after_a_verdict_count_too():
    weights, broken = teacher(), False

    def black_box(x_QI):
        return network(weights, "tanh")(x_QI) + float(broken)

    run, found = verdict(weights, black_box)
    recovery = Recovery(weights, "tanh", True, "", certificate=found.certificate)
    run.box(torch.full((1, 3), 0.5, dtype=torch.float64))
    again = confirm(run.box, recovery)
    assert again.verified
    assert again.certificate.given == found.certificate.given + 1
    assert again.metrics["recover/answers_compared"] == run.box.queries
    broken = True
    run.box(torch.full((1, 3), 0.6, dtype=torch.float64))
    again = confirm(run.box, recovery)
    assert not again.verified
    assert "1 of " in again.reason
    assert not confirm(run.box, dataclasses.replace(recovery, verified=False)).verified


def test_a_recovery_ends_with_all_answers():
    """The last rows of the user's data are asked after the verdict; one of them contradicts."""
    weights, data_QI = synthetic_teacher(3, 2, "tanh", seed=1), torch.zeros(20, 3, dtype=torch.float64)
    data_QI[:, 0] = torch.arange(20) / 10

    def black_box(x_QI):
        return network(weights, "tanh")(x_QI) + (x_QI == data_QI[19]).all(1, keepdim=True)

    config = settings(probes__fresh=10, students__count=3, budget__attempts=1)
    result = recover_network(black_box, 3, "tanh", data=data_QI, config=config)
    assert result.layer_sizes == [2]
    assert not result.verified
    assert "1 of " in result.reason
    assert result.certificate.given + result.certificate.fresh == result.metrics["recover/queries"]


def settings(**values):
    return configuration.replace(RecoveryConfig(), {k.replace("__", "."): v for k, v in values.items()})


def test_a_kink_that_only_far_scans_meet_is_recovered():
    """Its neuron is off wherever gradients are taken, so that its direction shows in contradicting answers alone."""
    generator = torch.Generator().manual_seed(2)
    w, b = torch.randn(5, 8, generator=generator).double() / 8**0.5, torch.randn(5, generator=generator).double() / 2
    b[0] = -60 * w[0].norm()
    last = torch.randn(3, 5, generator=generator).double(), torch.randn(3, generator=generator).double()
    result = recover_network(network([(w, b), last], "relu"), 8, "relu", config=settings(budget__attempts=3))
    assert result.verified, result.reason
    assert result.layer_sizes == [5]
    assert score(result, [(w, b), last])["recover/max_cosine_distance"] < 1e-12
    assert result.certificate.farthest > 60


def round_fifty(seed):
    """tanh 4-6-2 in inputs that lie round 50: two neurons show near 0, four are constant there to the last digit."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        w, c = torch.randn(6, 4, generator=generator).double(), torch.randn(6, generator=generator).double() / 2
        b = c - 50 * w.sum(1)
        if int((b.abs() < 6).sum()) == 2 and int((b.abs() > 40).sum()) == 4:
            last = torch.randn(2, 6, generator=generator).double(), torch.randn(2, generator=generator).double()
            return [(w, b), last]


@pytest.mark.parametrize("seed", range(3))
def test_neurons_that_are_constant_near_0_are_met_on_long_lines(seed):
    """Without data: two of six show near 0, but most hyperplanes pass far from it."""
    weights = round_fifty(seed)
    config = settings(budget__attempts=2, students__count=5)
    result = recover_network(network(weights, "tanh"), 4, "tanh", config=config)
    assert result.verified, result.reason
    assert result.layer_sizes == [6]
    assert score(result, weights)["recover/max_cosine_distance"] < 1e-12


def test_two_neurons_of_six_are_not_called_verified():
    """By fresh queries within 30 times the training ones, and by a mean over them, they were."""
    config = settings(budget__attempts=1, students__count=5)
    here_QI = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))  # which says that inputs lie round 0
    result = recover_network(network(round_fifty(1), "tanh"), 4, "tanh", data=here_QI, config=config)
    assert not result.verified
    assert "answers contradict it" in result.reason
    assert result.contradictions_QI is not None


def test_a_neuron_near_the_noise_is_found_or_missed_honestly():
    weights = synthetic_teacher(8, 5, "tanh", seed=1)
    weights[1][0][0, 2] = 3e-6  # some 30 times the noise
    rounded = network([(w.float(), b.float()) for w, b in weights], "tanh")
    config = settings(budget__attempts=1, students__count=5)
    result = recover_network(lambda x_QI: rounded(x_QI.float()), 8, "tanh", config=config)
    assert not result.verified or result.layer_sizes == [5]
    assert 1e-7 < result.certificate.smallest_seen[0] < 3e-6


def test_an_output_that_is_no_network_is_seen_beside_a_much_larger_one():
    net = network(teacher((4, 3, 1)), "tanh")
    result = recover_network(
        lambda x_QI: torch.cat([1e14 * net(x_QI), (20 * x_QI[:, :1]).sin()], dim=1),
        4,
        "tanh",
        config=settings(budget__attempts=1, students__count=3),
    )
    assert not result.verified


@pytest.mark.parametrize(
    ("name", "slopes", "second", "expected"),
    [
        ("relu", [1.0, -1.0], [1.0, -100.0], 1),  # on only where x > .1, where the other neuron, relu(-x), is off
        ("relu", [1.0, -1.0], [1.0, 1.0], 0),
        ("leaky_relu", [1.0, -1.0], [1.0, -100.0], 0),
        ("tanh", [1.0, 0.5], [1.0, -3.0], 0),
    ],
)
def test_a_weight_that_no_query_shows_is_undetermined(name, slopes, second, expected):
    weights = [
        (torch.tensor(slopes)[:, None].double(), torch.zeros(2).double()),
        (torch.tensor([second]).double(), torch.tensor([-0.1]).double()),
        (torch.ones(1, 1).double(), torch.zeros(1).double()),
    ]
    x_QI = torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]
    assert _undetermined(activation(name), weights, x_QI, x_QI) == expected
