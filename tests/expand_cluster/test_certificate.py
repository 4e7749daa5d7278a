"""The comparison of a network with answers, and the certificate: by hand, by what it bounds, and as plain numbers."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from distrecon import config as configuration
from distrecon.expand_cluster import BlackBox, RecoveryConfig, network, recover_network, synthetic_teacher
from distrecon.expand_cluster.certificate import (
    Dense,
    Tolerance,
    certify,
    compare,
    contradicted_probabilities,
    outputs_and_terms,
)
from distrecon.expand_cluster.odds import Odds
from distrecon.expand_cluster.standard import Standard
from distrecon.expand_cluster.surroundings import Surroundings
from distrecon.expand_cluster.thresholds import AGREEMENT, AGREEMENT_WORST
from distrecon.nets.activations import ACTIVATIONS


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_terms_by_hand():
    weights = [(tensor([1.0, -2.0]), tensor(1.0)), (tensor([-3.0]), tensor(2.0))]
    # before = 1 - 6 + 1 = -4, off; its size: |1| (1 + 1) + |-2| (3 + 3) + 1 = 15; the output's: 3 (0 + 15) + 2
    outputs_QO, terms_QO = outputs_and_terms(weights, "relu", tensor([1.0, 3.0]))
    assert float(outputs_QO) == 2.0
    assert float(terms_QO) == 47.0
    slope, hidden = 1 - math.tanh(-4.0) ** 2, math.tanh(-4.0)
    outputs_QO, terms_QO = outputs_and_terms(weights, "tanh", tensor([1.0, 3.0]))
    assert float(outputs_QO) == pytest.approx(-3 * hidden + 2)
    assert float(terms_QO) == pytest.approx(3 * (-hidden + slope * 15 - hidden) + 2)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_terms_bound_what_relative_changes_of_all_numbers_do(name, generator):
    sizes, change = [5, 7, 4, 3], 1e-7
    weights = [
        (torch.randn(o, i, generator=generator).double(), torch.randn(o, generator=generator).double())
        for i, o in itertools.pairwise(sizes)
    ]
    x_QI = 3 * torch.randn(200, 5, generator=generator).double()

    def moved(values):
        return values * (1 + change * (2 * torch.rand(values.shape, generator=generator, dtype=torch.float64) - 1))

    outputs_QO, terms_QO = outputs_and_terms(weights, name, x_QI)
    for _ in range(5):
        other_QO, _ = outputs_and_terms([(moved(w), moved(b)) for w, b in weights], name, moved(x_QI))
        assert ((other_QO - outputs_QO).abs() <= 1.01 * change * terms_QO).all()


def test_a_comparison_counts_in_units_of_what_is_due(monkeypatch):
    monkeypatch.setattr("distrecon.expand_cluster.certificate.NUMBERS_AT_ONCE", 2)  # several parts
    weights = [(tensor([1.0]), tensor(0.0)), (tensor([1.0], [10.0]), tensor(0.0, 0.0))]
    x_QI = tensor([1.0], [2.0], [4.0])  # outputs x and 10 x; sizes of their terms 4 x and 40 x, relu is exact
    assert torch.equal(outputs_and_terms(weights, "relu", x_QI)[1], tensor([4.0, 40.0], [8.0, 80.0], [16.0, 160.0]))
    tolerance = Tolerance(unit_O=tensor(0.1, 1.0), terms_O=tensor(8.0, 80.0))
    y_QO = torch.cat([x_QI, 10 * x_QI], dim=1) + tensor([0.2, 0.0], [0.0, -3.0], [0.6, 0.0])
    found = compare(Dense(weights, "relu"), x_QI, y_QO, tolerance)
    torch.testing.assert_close(found.largest_O, tensor(0.6, 3.0))
    torch.testing.assert_close(found.ratio_Q, tensor(2.0, 3.0, 3.0))  # the last: due is twice as much
    torch.testing.assert_close(found.ratio_O, tensor(3.0, 3.0))
    torch.testing.assert_close(found.mean_ratio_O, (tensor(4.0 + 9.0, 9.0) / 3).sqrt())
    assert found.count == 3


def test_what_is_not_finite_never_agrees():
    weights = synthetic_teacher(2, 3, "tanh")
    x_QI = torch.ones(2, 2, dtype=torch.float64)
    y_QO = network(weights, "tanh")(x_QI)
    tolerance = Tolerance(tensor(1e-12), tensor(1.0))
    assert compare(Dense(weights, "tanh"), x_QI, y_QO, tolerance).agrees_O.all()
    weights[1][1][0] = math.nan
    found = compare(Dense(weights, "tanh"), x_QI, y_QO, tolerance)
    assert not found.agrees_O.any()
    assert found.contradicted_Q.all()
    assert found.largest_O.isinf().all()


@pytest.mark.parametrize(("errors", "agrees"), [((9.0, 9.0), True), ((11.0, 11.0), False)])
def test_agreement_on_the_whole(errors, agrees):
    weights = [(tensor([1.0]), tensor(0.0)), (tensor([1.0]), tensor(0.0))]
    x_QI = tensor([1.0], [1.0])
    found = compare(Dense(weights, "relu"), x_QI, x_QI + 1e-3 * tensor(errors).T, Tolerance(tensor(1e-3), tensor(4.0)))
    assert bool(found.agrees_O.all()) == agrees
    assert not found.contradicted_Q.any()


@pytest.mark.parametrize(("error", "agrees"), [(99.0, True), (101.0, False)])
def test_one_bad_answer_among_many_good_ones_is_enough(error, agrees):
    weights = [(tensor([1.0]), tensor(0.0)), (tensor([1.0]), tensor(0.0))]
    y_QO = torch.ones(1000, 1, dtype=torch.float64)
    y_QO[500] += 1e-3 * error
    found = compare(Dense(weights, "relu"), torch.ones(1000, 1).double(), y_QO, Tolerance(tensor(1e-3), tensor(4.0)))
    assert float(found.mean_ratio_O) < AGREEMENT < AGREEMENT_WORST
    assert bool(found.agrees_O.all()) == agrees


def test_an_error_may_grow_beyond_the_reach_of_the_probes_in_proportion_to_the_distance():
    """Off by 1 in 1,000 of what is due at 10 and at 30 alike; probes went to 3."""
    weights = [(tensor([0.0, 0.0]), tensor(0.0))]
    x_QI, y_QO = tensor([6.0, 8.0], [18.0, 24.0]), tensor([0.03], [0.03])
    tolerance = Tolerance(tensor(1e-3), tensor(1.0))
    assert compare(Dense(weights, "relu"), x_QI, y_QO, tolerance).ratio_Q.tolist() == pytest.approx([30.0, 30.0])
    assert compare(Dense(weights, "relu"), x_QI, y_QO, tolerance, 3.0).ratio_Q.tolist() == pytest.approx([9.0, 3.0])


def test_a_certificate_is_plain_numbers():
    weights = [(tensor([1.0, 0.0]), tensor(0.0)), (tensor([1.0], [1.0]), tensor(0.0, 0.0))]
    x_QI = tensor([3.0, -4.0], [1.0, 2.0], [0.5, 0.0])
    y_QO = x_QI[:, :1] + tensor([0.0, 0.0], [0.0, 0.02], [0.0, 0.0])
    tolerance = Tolerance(tensor(1e-3, 1e-3), tensor(100.0, 100.0))
    found = certify(
        compare(Dense(weights, "relu"), x_QI, y_QO, tolerance),
        tolerance,
        x_QI,
        1,
        tensor(0.0, 1e-5),
        tensor(1.0, 4.0),
        7,
    )
    assert (found.lowest, found.highest, found.farthest) == ([0.5, -4.0], [3.0, 2.0], 5.0)
    assert (found.given, found.fresh, found.hidden_share) == (2, 1, 1.0)
    assert found.not_compared == 7
    assert found.worst == pytest.approx([0.0, 0.02])
    assert found.worst_share == pytest.approx([0.0, 20 / AGREEMENT_WORST])
    assert found.mean_share == pytest.approx([0.0, 20 / 3**0.5 / AGREEMENT])
    assert found.allowed == pytest.approx([1e-3 * AGREEMENT_WORST] * 2)
    assert found.smallest_seen == pytest.approx([1e-3 * AGREEMENT] * 2)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)
    metrics = found.metrics()
    assert metrics["recover/answers_compared"] == 3
    assert metrics["recover/answers_not_compared"] == 7
    assert metrics["recover/worst_disagreement"] == pytest.approx(0.02 / 4)
    assert metrics["recover/smallest_seen"] == pytest.approx(1e-3 * AGREEMENT)  # of the output that hides most
    text = "\n".join(found.lines())
    for words in (
        "2 answers of the run and 1 fresh",
        "from -4 to 3 (norm at most 5); 7 others tell no scores",
        "2.0e-02, 20 %",
        "100 % of the inputs",
    ):
        assert words in text


def test_answers_that_tell_no_score_are_counted():
    """A sigmoid of x: p is 1 to the last digit from x = 37 on, and loses more than half of its digits from about 17."""
    around = Surroundings(tensor(0.0), tensor(1.0), tensor(-30.0), tensor(50.0))
    standard = Standard(around, Odds(1, None, 0, torch.float64, 0.0), tensor(0.0), tensor(1.0))
    box = BlackBox(torch.sigmoid, 1, standard=standard, noise_O=tensor(1e-15))
    before = len(box.asked()[0])  # the noise's lines
    assert box.untold == 0
    asked = tensor([-29.0], [-1.0], [0.5], [3.0], [25.0], [40.0], [49.0])
    box(asked)
    box.memory(tensor([-31.0], [60.0]))  # outside the domain, before it was known
    assert box.untold == 5
    assert torch.equal(box.asked()[0][before:], asked[:4])


def test_answers_from_beyond_the_probes_count_where_they_are_the_networks():
    """Probes stay in (-3, 3), as further out most probabilities are 0 or 1; the box's own limits are -5 and 100."""
    around, limits = (
        Surroundings(tensor(0.0), tensor(2.0), tensor(a), tensor(b)) for a, b in ((-3.0, 3.0), (-5.0, 100.0))
    )
    standard = Standard(around, Odds(1, None, 0, torch.float64, 0.0), tensor(0.0), tensor(1.0), limits)
    box = BlackBox(torch.sigmoid, 1, standard=standard, noise_O=tensor(1e-15))
    before = len(box.asked()[0])
    box.memory(tensor([-6.0], [-4.0], [2.0], [8.0], [40.0], [101.0]))
    u_QI, y_QO = box.asked()
    assert u_QI[before:, 0].tolist() == [-2.0, 1.0, 4.0]  # standard inputs are half of the box's own
    assert y_QO[before:, 0].tolist() == pytest.approx([-4.0, 2.0, 8.0])
    u_QI, p_QC = box.saturated()
    assert (u_QI.tolist(), p_QC.tolist()) == ([[20.0]], [[1.0]])
    assert box.untold == 3
    assert box.reach == 1.5
    assert BlackBox(torch.sigmoid, 1).reach == math.inf


def test_probabilities_that_tell_no_scores_contradict_a_network_all_the_same():
    """A sigmoid of x is 1 to the last digit at 40 and 1 - 1e-8 at 18.4; a network of half the slope is not at 18.4."""
    around = Surroundings(tensor(0.0), tensor(1.0), tensor(-100.0), tensor(100.0))
    standard = Standard(around, Odds(1, None, 0, torch.float64, 0.0), tensor(0.0), tensor(1.0))
    tolerance = Tolerance(tensor(1e-9), tensor(10.0))
    x_QI = tensor([40.0], [18.4], [90.0])
    contradicted = [
        contradicted_probabilities(
            Dense([(tensor([slope]), tensor(0.0))], "relu"), standard, x_QI, torch.sigmoid(x_QI), tolerance
        ).tolist()
        for slope in (1.0, 0.5, -1.0)
    ]
    assert contradicted == [[False] * 3, [True, True, False], [True] * 3]


def test_a_network_that_answers_of_the_run_contradict_beyond_its_probes_is_not_verified():
    """Two neurons bend where probes are not drawn, as most probabilities are 1 there; the examination has met them."""
    draw = torch.Generator().manual_seed(6)
    w, b, a = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((16, 6), (16,), (1, 16)))
    net = network([(w / 6**0.5, b / 2), (15 * a / 4, torch.zeros(1).double())], "relu")
    config = configuration.replace(RecoveryConfig(), {"budget.attempts": 1, "students.count": 4})
    result = recover_network(lambda x: torch.sigmoid(net(x)), 6, "relu", outputs="probabilities", config=config)
    assert result.verified == (result.layer_sizes == [16])


def test_a_network_that_saturated_probabilities_contradict_is_not_verified(monkeypatch):
    """As if the black box had said 0 where it said 1."""
    net, saturated = network(synthetic_teacher(3, 2, "tanh", seed=1), "tanh"), BlackBox.saturated
    config = configuration.replace(RecoveryConfig(), {"budget.attempts": 1})

    def turned(box):
        x_QI, p_QC = saturated(box)
        return x_QI, 1 - p_QC

    monkeypatch.setattr(BlackBox, "saturated", turned)
    result = recover_network(lambda x: torch.sigmoid(8 * net(x)), 3, "tanh", outputs="probabilities", config=config)
    assert result.layer_sizes == [2]
    assert not result.verified
    assert "probabilities of the run that are all but 0 or 1 contradict it" in result.reason


def test_a_recovery_counts_what_it_could_not_compare():
    net = network(synthetic_teacher(3, 2, "tanh", seed=1), "tanh")
    result = recover_network(lambda x: torch.sigmoid(8 * net(x)), 3, "tanh", outputs="probabilities")
    assert result.certificate.not_compared > 0
    compared = result.certificate.given + result.certificate.fresh
    assert compared + result.certificate.not_compared == result.metrics["recover/queries"]
    assert result.metrics["recover/answers_not_compared"] == result.certificate.not_compared
    assert f"{result.certificate.not_compared} others tell no scores" in result.report()


def test_noise_is_measured_output_by_output_and_all_answers_are_kept():
    net = network(synthetic_teacher(3, 4, "tanh"), "tanh")
    calls = []

    def black_box(x_QI):
        calls.append(x_QI)
        return torch.cat([1e9 * net(x_QI), net(x_QI.float().double()).float().double()], dim=1)

    box = BlackBox(black_box, 3)
    coarse, fine = (box.noise_O / tensor(1e9, 1.0)).tolist()
    assert coarse < 1e-15
    assert 1e-9 < fine < 1e-6
    box(torch.randn(3000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    x_QI, y_QO = box.asked()
    assert torch.equal(x_QI, torch.cat(calls))
    assert torch.equal(y_QO, black_box(x_QI))
    assert len(x_QI) == box.queries


def test_rounded_answers_that_differ_by_many_steps_contradict():
    """A network of 5 of these 6 neurons is off by up to 24 steps: less than 100 standard deviations of rounding."""
    draw = torch.Generator().manual_seed(2_000_074)
    for most in (6, 4, 3, 4):  # the network was met with after these draws
        torch.randint(most, (1,), generator=draw)
    w, b, a, c = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((6, 4), (6,), (1, 6), (1,)))
    inner = network([(0.75 * w, 0.5 * b), (1.5 * a / 6**0.5, 0.5 * c)], "sigmoid")

    def box(x_QI):
        return (100 * inner(x_QI)).round() / 100

    settings = configuration.replace(RecoveryConfig(), {"budget.attempts": 2, "students.count": 4})
    recovery = recover_network(box, 4, "sigmoid", seed=0, config=settings)
    assert recovery.certificate is not None
    if recovery.layer_sizes != [6]:
        assert not recovery.verified
