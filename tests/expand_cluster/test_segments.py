"""Scans of lines for bends: found where they are by hand, given up where the function bends everywhere, explained."""

import pytest
import torch

from benchmarks.black_boxes import estimator
from distrecon import config as configuration
from distrecon.expand_cluster import BlackBox, RecoveryConfig, network, recover_network
from distrecon.expand_cluster.arrangement import Answers, Arrangement, explain
from distrecon.expand_cluster.coordinates import find_coordinates
from distrecon.expand_cluster.one_layer import networks_from_bends
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.segments import OPEN, BendsEverywhere, scan
from distrecon.nets.activations import activation

START_LR = torch.tensor([[0.0, 3.0]]).double()
DIRECTION_LR = torch.tensor([[1.0, 0.0]]).double()
GRID_LT = torch.linspace(-8, 8, 17, dtype=torch.float64)[None]


def rounded(function):
    def answer(z_QR):
        y_QO = function(z_QR)
        return y_QO, 1e-16 * y_QO.abs() + 1e-18

    return answer


def test_bends_by_hand():
    """|x - 1.25| + 2 |x + 2.5| bends at 1.25 by 2 and at -2.5 by 4; a plane that the line never meets does not show."""

    def function(z_QR):
        x_Q, other_Q = z_QR.unbind(1)
        return ((x_Q - 1.25).abs() + 2 * (x_Q + 2.5).abs() + (other_Q - 2).relu())[:, None]

    bends = scan(rounded(function), START_LR, DIRECTION_LR, GRID_LT, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bends.t_S, torch.tensor([-2.5, 1.25]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(bends.jump_SO, torch.tensor([[4.0], [2.0]]).double(), rtol=1e-12, atol=0)


def test_a_function_that_bends_everywhere_is_given_up_at_bounded_cost():
    asked = []

    def function(z_QR):
        asked.append(len(z_QR))
        return z_QR[:, :1].sin()

    with pytest.raises(BendsEverywhere):
        scan(rounded(function), START_LR, DIRECTION_LR, GRID_LT, torch.Generator().manual_seed(0))
    assert sum(asked) <= 4 * OPEN


def test_jumps_slope_and_constant_by_least_squares_on_six_answers_for_each():
    """1.5 |x - 1| + .5 x + 2: the slope jumps by 3."""
    x_Q1 = torch.linspace(-4, 4, 101, dtype=torch.float64)[:, None]
    y_Q1 = 1.5 * (x_Q1 - 1).abs() + 0.5 * x_Q1 + 2
    taken = []

    class Counted(Answers):
        def some(self, count, generator):
            taken.append(count)
            return super().some(count, generator)

    one = torch.ones(1, dtype=torch.float64)
    plane = Arrangement(torch.tensor([[1.0, -1.0]]).double(), one[:, None], one[:, None], one, 1e-12 * one)
    found = explain(plane, Counted(x_Q1, y_Q1, 1e-15 + 0 * y_Q1), torch.Generator().manual_seed(0))
    assert found.coefficients_FO.flatten().tolist() == pytest.approx([3.0, 0.5, 2.0], abs=1e-12)
    assert taken == [18]


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_neurons_are_dropped_by_their_share_of_the_answers(size):
    """Three neurons that all count: none is left out, however large or small the answers are."""
    draw = torch.Generator().manual_seed(0)
    w, b, a = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 2), (3,), (1, 3)))
    black_box = BlackBox(network([(w, b), (size * a, torch.zeros(1).double())], "relu"), 2)
    run = Run(black_box, activation("relu"), 1, RecoveryConfig(), draw, None, None, lambda stage, value: None, None)
    *_, (_, found, _) = networks_from_bends(run, find_coordinates(black_box, run.activation, False, draw))
    assert found.net.sizes == (2, 3, 1)
    assert found.loss < 1e-20


def test_lines_that_see_a_part_of_the_hyperplanes_show_them_together():
    """Most probabilities of this network are 1: two of the first four lines see 19 and 11 of 100 hyperplanes, of which
    none can be crossed precisely where the others are not known."""
    problem = estimator("breast cancer", state=3)
    config = configuration.replace(RecoveryConfig(), {"budget.attempts": 2, "students.count": 1})
    found = recover_network(problem.black_box, problem.inputs, **problem.arguments, config=config)
    assert found.verified, found.reason
    assert found.layer_sizes == [100]
    assert found.metrics["recover/students"] == 0


def test_of_hyperplanes_that_are_one_the_surest_is_kept():
    def planes(offset, error):
        return Arrangement(
            torch.tensor([[1.0, 0.0, offset]], dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.float64),
            torch.tensor([[-offset, 1.0]], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            torch.tensor([error], dtype=torch.float64),
        )

    joined = Arrangement.empty(2, 1).join(planes(-1.001, 1e-2), planes(-1.0, 1e-5))
    assert joined.planes_HK[:, 2].tolist() == [-1.0]
    assert planes(-1.001, 1e-2).join(planes(-1.0, 1e-5)).planes_HK[:, 2].tolist() == [-1.001]  # known ones stay


LARGE = pytest.param((64, 100, 10), 0, marks=pytest.mark.slow)


@pytest.mark.parametrize(("sizes", "seed"), [((8, 64, 3), 0), ((16, 32, 4), 1), LARGE], ids=str)
def test_wide_modules_of_float32_are_found_from_their_bends(sizes, seed):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(*sizes[:2]), torch.nn.ReLU(), torch.nn.Linear(*sizes[1:]))
    found = recover_network(module, sizes[0], "relu")
    assert found.verified, found.reason
    assert found.layer_sizes == [sizes[1]]
    assert found.metrics["recover/students"] == 0
    x_QI = torch.randn(500, sizes[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact_QO = module.double()(x_QI).detach()
    assert (found(x_QI) - exact_QO).abs().max() < 3e-6 * exact_QO.std()
