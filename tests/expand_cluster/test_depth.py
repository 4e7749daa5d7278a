"""Kinks followed along their hyperplanes: those of one hidden layer run straight through, those of more do not."""

import itertools

import pytest
import torch

from distrecon.expand_cluster import network, recover_network
from distrecon.expand_cluster.depth import course
from distrecon.expand_cluster.examination import examine
from distrecon.expand_cluster.surroundings import Surroundings, unbounded
from distrecon.expand_cluster.symptoms import Kink, Sample


def sampled(function, inputs: int, low: float | None = None) -> Sample:
    limits = unbounded(inputs) if low is None else (torch.full((inputs,), low).double(), unbounded(inputs)[1])
    around = Surroundings(torch.zeros(inputs).double(), torch.ones(inputs).double(), *limits)
    return Sample.draw(function, around, torch.Generator().manual_seed(0))


def kink(at, direction, step=1e-4) -> Kink:
    at_I, direction_I = (torch.tensor(v, dtype=torch.float64) for v in (at, direction))
    return Kink(at_I + 0.3 * step * direction_I, direction_I, step * direction_I)


def plain(x):
    """Bends at x0 = .5 and at x1 = -1, everywhere."""
    return torch.stack([(x[:, 0] - 0.5).relu() + x[:, 1], 2 * (x[:, 1] + 1).relu()], dim=1)


def turning(x):
    """Bends at x1 = 0 where |x0| < .2, at x1 = 5 (|x0| - .2) elsewhere: a hyperplane that turns twice."""
    return (x[:, 1:2] - 5 * (x[:, :1].abs() - 0.2).relu()).relu() + 0.1 * x[:, 2:]


def gated(x):
    """Bends at x0 = 0 by 1 where x1 > x0, by nothing elsewhere."""
    return ((x[:, :1].relu() + x[:, 1:2] - x[:, :1]).relu() - (x[:, 1:2] - x[:, :1]).relu()).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "at", "direction", "found"),
    [
        (plain, [0.5, 2.0, 0.0], [1.0, 0.2, -0.4], "straight"),
        (plain, [3.0, -1.0, 1.0], [0.3, -1.0, 0.5], "straight"),
        (plain, [0.5, 2.0, 0.0], [0.002, 1.0, -0.4], "unclear"),  # at too flat an angle to be foretold
        (turning, [0.05, 0.0, 0.0], [0.0, 1.0, 0.3], "turns"),
        (turning, [0.3, 0.5, 1.0], [-1.0, 0.2, 0.1], "turns"),
        (turning, [0.4, -0.9, 1.0], [-1.0, 0.2, 0.1], "unclear"),  # nothing bends there
    ],
)
def test_courses_known_by_hand(function, at, direction, found):
    assert course(sampled(function, 3), kink(at, direction)) == found


def test_a_change_of_slope_that_does_not_stay_the_same_is_a_turn():
    assert course(sampled(gated, 2), kink([0.0, 0.8], [1.0, 0.1])) == "turns"


def test_what_leaves_the_domain_is_unclear():
    assert course(sampled(plain, 3, low=-0.9), kink([0.5, 2.0, 0.0], [1.0, 0.2, -0.4])) == "straight"
    outside = sampled(plain, 3, low=5.0)
    assert course(outside, kink([0.5, 2.0, 0.0], [1.0, 0.2, -0.4])) == "unclear"


def drawn(sizes, seed, activation="relu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [(1.5 * draw(out, cols) / cols**0.5, 0.5 * draw(out)) for cols, out in itertools.pairwise(sizes)]
    answer = network(pairs, activation)
    return lambda x: answer(x.to(dtype).double()).to(dtype)


def names(box, inputs: int, hidden_layers: int | None, outputs: str = "values") -> list[str]:
    generator = torch.Generator().manual_seed(0)
    examined = examine(box, inputs, None, None, outputs, None, 0, None, 0, generator, hidden_layers)
    return [found.name for found in examined.findings]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["float64", "float32", "softmax"])
def test_layers_of_random_networks(kind, seed):
    missed = []
    outputs, dtype = (
        "probabilities" if kind == "softmax" else "values",
        torch.float32 if kind == "float32" else torch.float64,
    )
    for sizes in ([8, 6, 6, 3], [30, 12, 12, 5], [12, 6, 6, 6, 3]):
        deep = drawn(sizes, seed, dtype=dtype)
        box = (lambda x, deep=deep: deep(x).softmax(1)) if kind == "softmax" else deep
        missed += [] if "several hidden layers" in names(box, sizes[0], 1, outputs) else [sizes]
        assert "several hidden layers" not in names(box, sizes[0], 2, outputs)
        assert "several hidden layers" not in names(box, sizes[0], None, outputs)
    assert len(missed) <= (kind == "float32"), missed  # whose noise hides some
    for sizes in ([8, 5, 3], [30, 100, 5], [6, 40, 2]):
        shallow = drawn(sizes, seed, ("relu", "leaky_relu")[seed % 2], dtype)
        box = (lambda x, shallow=shallow: shallow(x).softmax(1)) if kind == "softmax" else shallow
        assert "several hidden layers" not in names(box, sizes[0], 1, outputs)


def test_one_layer_in_float32_is_no_deeper_one():
    """Noise that is larger here and there than it was measured, and kinks that lie near each other, are no turns."""
    for seed in range(40):
        assert "several hidden layers" not in names(drawn([6, 20, 2], seed, dtype=torch.float32), 6, 1)


def test_a_network_of_one_layer_told_two():
    assert "perhaps one hidden layer" in names(drawn([8, 30, 3], 0), 8, 2)


def test_the_recovery_stops_and_says_what_to_do():
    result = recover_network(drawn([10, 8, 8, 3], 1), 10, "relu")
    assert not result.verified
    assert result.reason.startswith("several hidden layers: ")
    assert result.reason.endswith("hidden_layers=2, or more")
    assert recover_network(drawn([10, 8, 8, 3], 1), 10, "relu", hidden_layers=2).layer_sizes == [8, 8]


@pytest.mark.parametrize("sizes", [[64, 100, 10], [64, 100, 100, 10]])
def test_dense_kinks_in_float32_are_no_curves(sizes):
    """So many kinks within the shortest steps that this noise allows that hardly a place is seen to be straight."""
    for seed in range(3):
        assert "kinks between curves" not in names(drawn(sizes, seed, dtype=torch.float32), 64, len(sizes) - 2)
