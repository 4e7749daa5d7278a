"""Centre, scale and domain of a black box's inputs."""

import pytest
import torch

from distrecon.errors import UserError
from distrecon.expand_cluster import network, recover_network
from distrecon.expand_cluster.surroundings import (
    Surroundings,
    _reach,
    by_asking,
    from_data,
    from_domain,
    read_domain,
    unbounded,
)
from tests.expand_cluster.test_diagnosis import look, net, weights


def test_data_set_centre_and_scale_and_constant_inputs_get_the_usual_scale(generator):
    data_QI = torch.randn(500, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 100.0, 10.0, 0.0]) + 7
    found = from_data(data_QI, *unbounded(4))
    torch.testing.assert_close(found.centre_I, data_QI.mean(0))
    torch.testing.assert_close(found.scale_I[:3], data_QI.std(0, correction=0)[:3])
    assert found.scale_I[3] == found.scale_I[2]  # the median of those that vary
    assert not found.bounded
    torch.testing.assert_close(found.inputs(found.standard(data_QI)), data_QI)


def test_domains_are_read_or_refused():
    low_I, high_I = read_domain((0, [1, 2, 3]), 3)
    assert low_I.tolist() == [0, 0, 0]
    assert high_I.tolist() == [1, 2, 3]
    for wrong in ((0, 0), (1, [2, 2, 0]), (float("nan"), 1)):
        with pytest.raises(UserError, match="every low must be below its high"):
            read_domain(wrong, 3)
    for wrong in ((0, [1, 2]), 5, (0, 1, 2), ("a", "b")):
        with pytest.raises(UserError, match=r"domain is \(low, high\)"):
            read_domain(wrong, 3)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.0, torch.inf), (-torch.inf, 2.0)])
def test_queries_are_brought_inside_the_domain(bounds, generator):
    around = from_domain(*read_domain(bounds, 3))
    u_QI = 50 * torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    for moved_QI in (around.inside(u_QI), around.pulled(u_QI)):
        x_QI = around.centre_I + around.scale_I * moved_QI
        assert (x_QI >= bounds[0] - 1e-9).all()
        assert (x_QI <= bounds[1] + 1e-9).all()
    near_QI = 1e-3 * u_QI
    torch.testing.assert_close(around.inside(near_QI), near_QI)
    torch.testing.assert_close(around.pulled(near_QI), near_QI)
    share_Q = (around.pulled(u_QI) / u_QI)[:, 0]
    torch.testing.assert_close(around.pulled(u_QI), share_Q[:, None] * u_QI)  # on the way to the centre
    inner_QI = around.inputs(around.inside(u_QI, 0.1))
    room = 0.1 * float(around.scale_I[0]) - 1e-9
    assert (inner_QI >= bounds[0] + room).all()
    assert (inner_QI <= bounds[1] - room).all()


def test_reflected_queries_cover_a_domain_evenly(generator):
    around = from_domain(*read_domain((0.0, 1.0), 2))
    x_QI = around.inputs(around.inside(20 * torch.randn(20_000, 2, generator=generator, dtype=torch.float64)))
    share_B = torch.histc(x_QI[:, 0], 10, 0, 1) / len(x_QI)
    assert (share_B - 0.1).abs().max() < 0.02


def examine(box, inputs, seed=0):
    standard = Surroundings(torch.zeros(inputs).double(), torch.ones(inputs).double(), *unbounded(inputs))
    return by_asking(box, standard, torch.Generator().manual_seed(seed), 1e-10)


@pytest.mark.parametrize("activation", ["tanh", "softplus", "g"])
@pytest.mark.parametrize("sizes", [[4, 6, 2], [8, 5, 3], [16, 20, 3]], ids=str)
@pytest.mark.parametrize("kind", ["large", "small", "mixed"])
def test_scales_of_the_inputs_are_found_by_asking(activation, sizes, kind):
    scales = {"large": (3, 3), "small": (-3, -3), "mixed": (-3, 3)}[kind]
    scale_I = torch.logspace(*scales, sizes[0], dtype=torch.float64)
    inner = net(sizes, activation, seed=3)
    found = examine(lambda x: inner(x / scale_I), sizes[0])
    relative_I = found.scale_I / scale_I
    assert relative_I.max() / relative_I.min() < 100  # of 1e6 in the mixed case
    gain_H = (weights(sizes, 3)[0][0] * relative_I).norm(dim=1)
    assert 0.02 < gain_H.median() < 50


@pytest.mark.parametrize("activation", ["tanh", "softplus", "g", "relu"])
@pytest.mark.parametrize("seed", range(3))
def test_a_centre_far_off_is_found_by_asking(activation, seed):
    """All hyperplanes of the first layer then pass near it, in units of the scale that was found."""
    inner, (w_HI, b_H) = net([4, 6, 2], activation, seed=seed), weights([4, 6, 2], seed)[0]
    found = examine(lambda x: inner(x - 50.0), 4, seed)
    distance_H = (w_HI @ (found.centre_I - 50.0) + b_H).abs() / (w_HI * found.scale_I).norm(dim=1)
    assert distance_H.median() < 2
    assert distance_H.max() < 10
    assert (found.centre_I - 50.0).norm() < 20


def test_how_much_of_the_queries_a_search_takes_is_limited():
    asked = []
    inner = net([16, 20, 3], "tanh", seed=0)

    def box(x):
        asked.append(len(x))
        return inner(x - 50.0)

    standard = Surroundings(torch.zeros(16).double(), torch.ones(16).double(), *unbounded(16))
    for left in (5e3, 1e4):
        asked.clear()
        by_asking(box, standard, torch.Generator().manual_seed(0), 1e-10, left)
        assert sum(asked) < 2500 + left / 2


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("seed", range(4))
def test_an_ordinary_box_is_left_as_it_is(activation, seed):
    found = examine(net([8, 5, 3], activation, seed=seed), 8)
    assert found.centre_I.eq(0).all()
    assert found.scale_I.eq(1).all()


@pytest.mark.parametrize("activation", ["tanh", "softplus", "g"])
@pytest.mark.parametrize("sizes", [[12, 9, 2], [30, 10, 3]], ids=str)
def test_an_ordinary_box_in_float32_is_left_as_it_is(activation, sizes):
    """Far out its rounding hides the transitions of activations that grow."""
    inner = network([(w.float(), b.float()) for w, b in weights(sizes, 3)], activation)
    found = look(lambda x: inner(x.float()), sizes[0]).around
    assert found.centre_I.eq(0).all()
    assert found.scale_I.eq(1).all()


def initial(sizes, seed):
    """A relu module of PyTorch's initial weights, in float32."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(*sizes[:2]), torch.nn.ReLU(), torch.nn.Linear(*sizes[1:]))


@pytest.mark.parametrize(("sizes", "seeds"), [([8, 12, 3], (0, 1, 2)), ([8, 24, 3], (0, 6)), ([4, 6, 2], (14, 19))])
def test_an_ordinary_module_of_float32_is_left_as_it_is(sizes, seeds):
    """Its kinks seemed to lie thousands of deviations off; a few near 0 seemed to be its scale."""
    for seed in seeds:
        around = look(initial(sizes, seed), sizes[0]).around
        assert around.centre_I.eq(0).all(), seed
        assert around.scale_I.eq(1).all(), seed


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_the_scale_of_inputs_is_found_in_float32(activation, seed):
    inner = initial([8, 12, 3], seed)
    if activation == "tanh":
        inner = network([(w.float(), b.float()) for w, b in weights([8, 12, 3], seed)], activation)
    examined = look(lambda x: inner((x / 1e3).float()), 8)
    assert examined.stopped is None
    assert examined.around.scale_I.max() / examined.around.scale_I.min() < 10
    assert 30 < examined.around.scale_I.mean() < 3e4


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_steps_of_rounded_answers_near_zero_are_no_bends(activation):
    """A step of .01 within .001 is sharper than any bend, and larger than such answers are."""
    inner = net([3, 9, 1], activation)
    zero = inner(torch.zeros(1, 3, dtype=torch.float64)) - 0.0046  # so that answers within .001 are 0 and .01
    around = look(lambda x: ((inner(x) - zero) * 100).round() / 100, 3).around
    assert around.scale_I.tolist() == [1, 1, 1]
    assert around.centre_I.tolist() == [0, 0, 0]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_no_query_of_a_whole_recovery_leaves_the_domain(activation):
    low_I, high_I = torch.tensor([-1.0, 0.0, 5.0, 100.0]), torch.tensor([2.0, 0.5, 6.0, 900.0])
    asked = []
    (w, b), last = weights([4, 4, 2], 5, 4.0)
    scale_I, middle_I = (high_I - low_I) / 4, (high_I + low_I) / 2
    inner = network([(w, b), last], activation)

    def box(x):
        asked.append(x)
        return inner((x - middle_I) / scale_I)

    result = recover_network(box, 4, activation, domain=(low_I.tolist(), high_I.tolist()))
    asked_QI = torch.cat(asked)
    assert (asked_QI >= low_I).all()
    assert (asked_QI <= high_I).all()
    assert len(asked_QI) > 5000
    if result.verified:
        x_QI = low_I + (high_I - low_I) * torch.rand(500, 4, dtype=torch.float64)
        torch.testing.assert_close(result(x_QI), box(x_QI), rtol=0, atol=1e-6)


def test_data_far_from_zero_and_of_other_scales_are_recovered(generator):
    scale_I = torch.tensor([1e-3, 1.0, 1e3, 10.0]).double()
    centre_I = 50 * scale_I
    inner = net([4, 3, 2], "tanh", seed=2)
    data_QI = centre_I + scale_I * torch.randn(300, 4, generator=generator, dtype=torch.float64)
    result = recover_network(lambda x: inner((x - centre_I) / scale_I), 4, "tanh", data=data_QI.numpy())
    assert result.verified, result.reason
    assert result.layer_sizes == [3]
    torch.testing.assert_close(result(data_QI), inner((data_QI - centre_I) / scale_I), rtol=0, atol=1e-9)
    expected_HI = weights([4, 3, 2], 2)[0][0] / scale_I
    found_HI = result.weights[0][0]
    cosine_HH = (
        torch.nn.functional.normalize(found_HI * scale_I) @ torch.nn.functional.normalize(expected_HI * scale_I).T
    )
    assert (1 - cosine_HH.abs().amax(1)).max() < 1e-12


def test_the_scale_at_which_a_box_bends_is_looked_for_over_eleven_decades():
    """tanh(u / 1000) bends at 1,000; eight triples at each of 10^-5 to 10^5 are 264 queries."""
    asked = []

    def ask(u_QI):
        asked.append(len(u_QI))
        return torch.tanh(u_QI / 1000)

    standard = Surroundings(torch.zeros(1).double(), torch.ones(1).double(), *unbounded(1))
    found = _reach(ask, standard, torch.Generator().manual_seed(0), 1e-12)
    assert found in (100.0, 1000.0)
    assert sum(asked) == 3 * 8 * 11
