"""Scans of lines for bends: found where they are by hand, given up where the function bends everywhere."""

import pytest
import torch

from distrecon.expand_cluster.segments import OPEN, BendsEverywhere, scan

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
