"""Probabilities as scores."""

import math

import pytest
import torch

from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.odds import Odds, are_probabilities
from distrecon.expand_cluster.standard import Standard
from distrecon.expand_cluster.surroundings import Surroundings, unbounded


def scores(columns: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(200, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("columns", [2, 3, 10])
def test_softmax_gives_the_scores_relative_to_one_class(columns):
    z_QC = scores(columns, 20.0)
    p_QC = torch.softmax(z_QC, dim=1)
    odds = Odds.of(p_QC, torch.float64)
    ref = odds.reference
    assert ref == int(p_QC.min(0).values.argmax())
    expected_QC = z_QC - z_QC[:, ref, None]
    torch.testing.assert_close(odds.all_classes(odds(p_QC)), expected_QC, rtol=1e-13, atol=1e-13)
    assert odds.known(p_QC).all()
    error_QO = (odds.all_classes(odds(p_QC)) - expected_QC).abs()
    assert (error_QO <= 4 * odds.all_classes(odds.error(p_QC)) + 1e-14).all()
    torch.testing.assert_close(odds.of_classes(odds.all_classes(odds(p_QC))), p_QC, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["p", "1 - p, p", "p, 1 - p"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sigmoid_has_one_score_that_fades_towards_one(layout, dtype):
    z_Q1 = scores(1, 12.0)
    p_Q1 = torch.sigmoid(z_Q1).to(dtype)
    parts = {"p": [p_Q1], "1 - p, p": [1 - p_Q1, p_Q1], "p, 1 - p": [p_Q1, 1 - p_Q1]}[layout]
    p_QC = torch.cat(parts, dim=1).double()
    odds = Odds.of(p_QC, torch.float64)  # a float32 box may well answer in float64
    assert odds.reference is None
    assert odds.dtype == dtype
    known_Q = odds.known(p_QC)
    off_Q = (odds(p_QC) - z_Q1).abs()[known_Q, 0]
    assert off_Q.max() < (1e-8 if dtype == torch.float64 else 1e-3)
    assert (off_Q <= 4 * odds.error(p_QC)[known_Q, 0] + 1e-14).all()
    limit = 16 if dtype == torch.float64 else 6
    assert known_Q[(z_Q1[:, 0] < limit) & (z_Q1[:, 0] > -80)].all()
    assert not known_Q[z_Q1[:, 0] > 19].any()
    torch.testing.assert_close(odds.of_classes(odds.all_classes(odds(p_QC)))[known_Q], p_QC[known_Q], rtol=0, atol=1e-6)


def test_zero_one_and_underflow_are_not_known():
    sure = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 - 1e-310, 1e-310, 0.0]], dtype=torch.float64)
    odds = Odds(3, 0, 0, torch.float64, 0.0)
    assert odds.known(sure).tolist() == [False, True, False]
    single = Odds(1, None, 0, torch.float64, 0.0)
    assert single.known(torch.tensor([[0.0], [1.0], [0.5], [1e-200]], dtype=torch.float64)).tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_rounded_probabilities_are_known_where_they_are_large():
    p_QC = (torch.softmax(scores(3), dim=1) * 1e4).round() / 1e4
    odds = Odds.of(p_QC, torch.float64, quantum=1e-4)
    known_Q = odds.known(p_QC)
    assert known_Q.any()
    assert not known_Q[p_QC.amin(1) < 1e-3].any()
    off_QO = (
        odds(p_QC) - (scores(3) - scores(3)[:, odds.reference, None])[:, [c for c in range(3) if c != odds.reference]]
    )
    assert (off_QO.abs() <= 2 * odds.error(p_QC))[known_Q].all()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[0.2, 0.3], [0.4, 0.6]], "do not add up to 1: one adds up to 0.5"),
        ([[1.2, -0.2], [0.4, 0.6]], "1 of 2 answers are not between 0 and 1"),
        ([[3.0], [0.4]], "1 of 2 answers are not between 0 and 1"),
    ],
)
def test_what_is_no_probability_is_refused(answers, message):
    with pytest.raises(UserError, match=message):
        Odds.of(torch.tensor(answers, dtype=torch.float64), torch.float64)


def test_probabilities_are_told_from_scores():
    assert are_probabilities(torch.softmax(scores(3), dim=1))
    assert not are_probabilities(scores(3))
    assert not are_probabilities(torch.sigmoid(scores(1)))


def test_a_box_tells_scores_inside_the_domain_only_and_how_far_they_are_rounded():
    """Errors of eps / (1 - p): at 9 about e^9 / 2 times those at 0; 40 tells nothing, and 200 is not asked."""
    asked = []

    def box(x_QI):
        asked.append(x_QI)
        return torch.sigmoid(x_QI)

    around = Surroundings(*(torch.tensor([v], dtype=torch.float64) for v in (0.0, 1.0, -100.0, 100.0)))
    one = torch.ones(1, dtype=torch.float64)
    odds = Odds.of(torch.sigmoid(torch.randn(50, 1, dtype=torch.float64)), torch.float64)
    black_box = BlackBox(box, 1, 0, Standard(around, odds, 0 * one, one), noise_O=one * 1e-16)
    asked.clear()
    told = black_box.told(torch.tensor([[0.0], [9.0], [40.0], [200.0]], dtype=torch.float64))
    torch.testing.assert_close(told[:2, 0], torch.tensor([0.0, 9.0], dtype=torch.float64))
    assert told[2:].isnan().all()
    assert float(torch.cat(asked).max()) == 40.0
    near, far = black_box.error(told[:2])[:, 0].tolist()
    assert 0.1 < far / near / (math.exp(9) / 2) < 10


def test_a_black_boxs_own_inputs_are_not_copied(generator):
    """There may be GiB of them."""
    one = torch.ones(1, dtype=torch.float64)
    for centre, same in ((0.0, True), (3.0, False)):
        centre_I = torch.full((2,), centre, dtype=torch.float64)
        around = Surroundings(centre_I, torch.ones_like(centre_I), *unbounded(2))
        box = BlackBox(lambda x_QI: x_QI.sum(1, keepdim=True), 2, 0, Standard(around, None, 0 * one, one))
        box(torch.randn(5, 2, generator=generator, dtype=torch.float64))
        asked_QI, own_QI = box.asked()[0], box.memory.asked()[0]
        torch.testing.assert_close(asked_QI, own_QI - centre, rtol=0, atol=0)
        assert (asked_QI.data_ptr() == own_QI.data_ptr()) is same
        assert box.untold == 0


@pytest.mark.parametrize("columns", [1, 2])
def test_a_probability_made_as_the_rest_to_one_has_steps(columns):
    """1 - p is a multiple of 2^-53: at 1e-10 that leaves six digits, and an error of 1.1e-6 of the score."""
    q_Q1 = torch.tensor([[1 - 1e-10], [1 - 0.3], [1 - 1e-3]], dtype=torch.float64)
    rest_QC = torch.cat([1 - q_Q1, q_Q1], 1)[:, :columns]
    odds = Odds.of(rest_QC, torch.float64)
    assert (odds.column, odds.quantum) == ((0, 2.0**-53) if columns == 1 else (1, 0.0))
    assert Odds.of(1 / (1 + torch.tensor([[30.0], [0.0]]).double().exp()), torch.float64).quantum == 0
    if columns == 1:
        torch.testing.assert_close(float(odds.error(rest_QC)[0]), 2.0**-53 / 1e-10, rtol=1e-2, atol=0)


def test_what_a_verdict_allows_for_rounding_to_multiples_is_a_fifth(generator):
    one = torch.ones(1, dtype=torch.float64)
    around = Surroundings(*(torch.tensor([v], dtype=torch.float64) for v in (0.0, 1.0, -9.0, 9.0)))
    for quantum, share in ((0.0, 1.0), (1e-4, 0.2)):
        odds = Odds(1, None, 0, torch.float64, quantum)
        box = BlackBox(torch.sigmoid, 1, 0, Standard(around, odds, 0 * one, one), noise_O=one * 1e-3)
        score_QO = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        torch.testing.assert_close(box.error_due(score_QO), share * box.error(score_QO), rtol=1e-15, atol=0)
    two = torch.tensor([1e-3, 1e-3], dtype=torch.float64)
    box = BlackBox(lambda x_QI: x_QI, 2, noise_O=two, rounded_O=torch.tensor([True, False]))
    torch.testing.assert_close(box.noise_due_O, torch.tensor([2e-4, 1e-3], dtype=torch.float64))


def test_rounded_to_two_decimals_they_still_add_up():
    """Three classes may add up to .99 or 1.01, ten to .96."""
    assert are_probabilities(torch.tensor([[0.33, 0.33, 0.33], [0.34, 0.34, 0.33]], dtype=torch.float64))
    assert are_probabilities(torch.tensor([[0.15] + 9 * [0.09]], dtype=torch.float64))
    assert not are_probabilities(torch.tensor([[0.30, 0.33, 0.33]], dtype=torch.float64))
