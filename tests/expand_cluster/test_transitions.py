"""Transitions on long lines: places, hyperplanes, widths, and the point nearest to all."""

import pytest
import torch

from distrecon.expand_cluster.transitions import Hyperplanes, Transitions
from tests.expand_cluster.test_diagnosis import net, weights

VISIBLE = 1e-10


def looked(activation, sizes, generator, move=0.0):
    inner = net(sizes, activation, seed=1)

    def ask(x):
        return inner(x - move)

    return ask, Transitions.look(ask, [1e3], 18, sizes[0], generator, VISIBLE)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu", "relu"])
def test_hyperplanes_are_those_of_the_first_layer(activation, generator):
    """Nearly all: where two transitions meet there is none of one neuron alone."""
    sizes, move = [4, 6, 2], 30.0
    ask, found = looked(activation, sizes, generator, move)
    planes = found.hyperplanes(ask, VISIBLE)
    w_HI, b_H = weights(sizes, 1)[0]
    size_H = w_HI.norm(dim=1)
    cosine_KH = planes.normal_KI @ (w_HI / size_H[:, None]).T
    nearest_K = cosine_KH.abs().argmax(1)
    sign_K = cosine_KH.gather(1, nearest_K[:, None])[:, 0].sign()
    right_K = cosine_KH.abs().amax(1) > 1 - 1e-8
    assert right_K.double().mean() > 0.8
    assert len(nearest_K[right_K].unique()) >= 4
    miss_K = sign_K * planes.offset_K - ((w_HI.sum(1) * move - b_H) / size_H)[nearest_K]
    assert miss_K[right_K].abs().max() < (0.01 if activation == "relu" else 3 / float(size_H.min()))
    assert planes.kinks == (activation == "relu")
    if not planes.kinks:
        ratio_K = (planes.width_K * size_H[nearest_K])[right_K]
        assert ratio_K.max() / ratio_K.min() < 20
        assert 0.05 < ratio_K.median() < 5


def test_a_transition_is_met_where_it_is():
    """One relu, kinked where x0 = 7: the zoom ends there, to its last step."""
    generator = torch.Generator().manual_seed(0)
    found = Transitions.look(lambda x: torch.relu(x[:, :1] - 7.0), [100.0], 6, 3, generator, VISIBLE)
    assert len(found.at_KI)
    assert ((found.at_KI[:, 0] - 7).abs() <= found.step_KI[:, 0].abs() + 1e-9).all()
    assert (found.step_KI.norm(dim=1) < 1e-2).all()


def test_no_transition_is_met_where_nothing_bends(generator):
    found = Transitions.look(lambda x: x @ torch.ones(3, 2).double(), [100.0], 6, 3, generator, 1e-8)
    assert not len(found.at_KI)
    assert [len(part) for part in found.heights(None, generator, 1e-8, 1e-16)] == [0, 0]
    assert found.input_scales(None) is None


def test_hyperplanes_pass_as_near_as_they_do(generator):
    """Kinks 5 away from 0 along the first of 16 inputs, met far from that place."""
    at_KI = torch.randn(8, 16, generator=generator, dtype=torch.float64) * 20
    at_KI[:, 0] = 5.0
    found = Transitions(at_KI, 1e-3 * torch.eye(16, dtype=torch.float64)[:1].expand(8, -1))
    height_K, clear_K = found.heights(lambda x: torch.relu(x[:, :1] - 5.0), generator, VISIBLE, 1e-16)
    assert (height_K > 2).all()  # the slope is that of a few random directions
    assert (height_K < 12).all()
    assert clear_K.all()
    for rounding, step in (
        (1e-5, 1e-3),
        (1e-16, 20.0),
    ):  # of inputs of 20 it is as large as the steps; a wide transition
        wide = Transitions(at_KI, step * torch.eye(16, dtype=torch.float64)[:1].expand(8, -1))
        assert not wide.heights(lambda x: torch.relu(x[:, :1] - 5.0), generator, VISIBLE, rounding)[1].any()


def test_kinks_in_float32_show_their_hyperplanes(generator):
    """Steps stay so long that rounding hides nothing of the change of slope: the last visible ones tell nothing."""
    normal_I = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)

    def box(x_QI):
        x_QI = x_QI.float()
        return torch.cat([torch.relu(x_QI @ normal_I.float() - 2.0)[:, None], x_QI[:, :1]], dim=1).double()

    visible = 20 * torch.finfo(torch.float32).eps
    found = Transitions.look(box, [10.0, 30.0], 36, 3, generator, visible)
    assert found.sharp
    height_K, _ = found.heights(box, generator, visible, torch.finfo(torch.float32).eps)
    assert len(height_K) > 3
    assert ((height_K > 1) & (height_K < 4)).all()
    planes = found.hyperplanes(box, visible)
    assert ((planes.normal_KI @ normal_I).abs() > 0.99).all()
    curved = Transitions.look(lambda x: torch.tanh(x[:, :1]).float().double(), [10.0, 30.0], 12, 3, generator, visible)
    assert len(curved.at_KI)
    assert not curved.sharp


def planes(normal_KI, point_I, misses_K, width=1.0, kinks=False):
    normal_KI = torch.nn.functional.normalize(normal_KI, dim=1)
    offset_K = normal_KI @ point_I + misses_K
    return Hyperplanes(normal_KI, offset_K, torch.full_like(offset_K, width), 100.0, kinks)


def test_the_centre_is_nearest_to_the_hyperplanes_and_a_few_wrong_ones_do_not_matter(generator):
    normal_KI = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    point_I = torch.tensor([50.0, -20.0, 3.0], dtype=torch.float64)
    misses_K = 0.1 * torch.randn(20, generator=generator, dtype=torch.float64)
    misses_K[:3] = torch.tensor([400.0, -300.0, 900.0])
    found = planes(normal_KI, point_I, misses_K)
    assert (found.centre() - point_I).norm() < 0.3
    assert found.size(found.centre()) == 2.0  # WIDTHS: no hyperplane is farther off, but the few


def test_hyperplanes_of_one_neuron_count_once(generator):
    normal_KI = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 0, 0, 0, 1]]
    misses_K = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0], dtype=torch.float64)
    normal_KI = torch.cat([normal_KI, torch.tensor([[1.0, 0.2]]).double()])
    once = planes(normal_KI[5:], torch.zeros(2).double(), torch.cat([misses_K[5:], torch.zeros(1).double()]))
    often = planes(normal_KI, torch.zeros(2).double(), torch.cat([misses_K, torch.zeros(1).double()]))
    torch.testing.assert_close(often.centre(), once.centre())


def test_what_hyperplanes_leave_undetermined_stays_where_it_was():
    found = planes(torch.tensor([[1.0, 0.0, 0.0]]).double(), torch.tensor([5.0, 9.0, 9.0]).double(), torch.zeros(1))
    torch.testing.assert_close(found.centre(), torch.tensor([5.0, 0.0, 0.0]).double(), rtol=1e-3, atol=1e-9)


def test_kinks_give_a_scale_by_their_distances():
    normal_KI = torch.eye(2, dtype=torch.float64)
    found = planes(normal_KI, torch.zeros(2).double(), torch.tensor([4.0, 4.0]).double(), kinks=True)
    assert found.size(torch.zeros(2).double()) == pytest.approx(4.0)
    assert found.size(torch.tensor([4.0, 4.0]).double()) == pytest.approx(0.1)  # LEAST of the distance 100


def test_steps_that_rounding_hides_tell_no_scales():
    """Near 100 float32 hides a step of 1e-7, and beside another witness it says nothing."""

    def ask(x_QI):
        return x_QI.sum(1, keepdim=True).float().double()

    hidden, seen = [[100.0, 1.0], [1e-7, 0.0]], [[0.5, 0.25], [0.1, 0.1]]
    at_1I, step_1I = (torch.tensor([value], dtype=torch.float64) for value in hidden)
    assert Transitions(at_1I, step_1I).input_scales(ask) is None
    alone, both = (
        Transitions(*torch.tensor(rows, dtype=torch.float64).transpose(0, 1)).input_scales(ask)
        for rows in ([seen], [seen, seen])
    )
    torch.testing.assert_close(alone, both)
    assert alone.isfinite().all()
    mixed = Transitions(*torch.tensor([hidden, seen], dtype=torch.float64).transpose(0, 1)).input_scales(ask)
    assert mixed.isfinite().all()
