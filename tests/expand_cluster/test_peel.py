"""Deep networks put together layer by layer: what is fitted, what is dropped, and where their probes lie."""

import pytest
import torch
from torch import Tensor

from distrecon import config as configuration
from distrecon.expand_cluster import peel, recovery
from distrecon.expand_cluster.blackbox import BlackBox, OutOfQueries
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.coordinates import SCALES, Coordinates, isotropic
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import NONLINEAR, NONLINEAR_DEEP
from distrecon.expand_cluster.weights import network
from distrecon.nets.activations import activation


def deep_problem(name: str, seed: int, steps: int = 100) -> tuple[Problem, list[Tensor]]:
    """A random network of 4-3-3-2 as a problem, and its matrices [1, out, in + 1] in the probes' coordinates.

    A fit has so many steps.
    """
    generator = torch.Generator().manual_seed(seed)

    def layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
        return w, 0.3 * torch.randn(outputs, generator=generator, dtype=torch.float64)

    weights = [layer(4, 3), layer(3, 3), layer(3, 2)]
    box = BlackBox(network(weights, name), 4)
    coordinates = isotropic(box, generator)
    config = configuration.replace(RecoveryConfig(), {"solver.iterations": steps})
    run = Run(box, activation(name), 2, config, generator, None, None, lambda *_: None, None)
    problem = run.problem(Probes(coordinates), 200)
    (w, b), middle, (last_w, last_b) = weights
    data = problem.data
    last = (last_w / data.scale, (last_b - data.mean_O) / data.scale)
    standard = [(w @ coordinates.back_IR, b), middle, last]
    return problem, [torch.cat([w, b[:, None]], dim=1)[None] for w, b in standard]


def perturbed(matrices: list[Tensor], extra: int, generator: torch.Generator) -> list[Tensor]:
    """Near the given network, with so many random neurons more in every hidden layer that act a little."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for i, m in enumerate(matrices):
        inputs = torch.cat([m[..., :-1], 0.1 * noise(1, m.shape[1], extra), m[..., -1:]], dim=2) if i else m
        more = noise(1, extra, inputs.shape[2]) if i + 1 < len(matrices) else inputs[:, :0]
        found.append(torch.cat([inputs + 0.15 * noise(*inputs.shape), more], dim=1))
    return found


@pytest.mark.parametrize("seed", [2, 3])
def test_neurons_that_keep_a_deep_fit_from_converging_are_dropped_on_the_way(seed):
    """Four neurons too many in each layer: twenty steps, all that there are, leave the fit at 2e-6 or more."""
    problem, true = deep_problem("g", seed, steps=20)
    generator = torch.Generator().manual_seed(seed)
    start = perturbed(true, 4, generator)
    assert peel._fit(problem, start)[1] > 1e-6
    found = peel.assemble(problem, start, [], early=True)
    assert found.net.sizes == (4, 3, 3, 2)
    assert found.loss <= problem.floor


@pytest.mark.parametrize(
    ("left", "kept", "loss"),
    [
        ([1.9e-6, 1.8e-6], 3, 1e-6),  # twice the start is allowed, but leads to nothing
        ([2.1e-6, 0.9e-6, 2.1e-6], 3, 0.9e-6),  # more than twice: no drop, but all steps of the fit, which gain little
        ([1.9e-6, 1e-7, 1e-30], 2, 1e-30),  # all steps gain much, and in the end it is exact
    ],
)
def test_a_drop_that_leads_to_no_exact_fit_is_taken_back(left, kept, loss, monkeypatch):
    """What fits leave after the drop of the one neuron that is cheap enough to be tried, or with all their steps."""
    problem, true = deep_problem("tanh", seed=0)
    losses = iter([*left, *left[-1:] * 3])
    monkeypatch.setattr(peel, "_fit", lambda problem, matrices, steps=None: (matrices, next(losses)))

    def cheapest(problem: Problem, matrices: list[Tensor], layer: int) -> tuple[float, int, int]:
        return (1e-6 if layer == 1 and matrices[1].shape[1] == 3 else 0.1), layer, 0

    monkeypatch.setattr(peel, "_cheapest", cheapest)
    found, found_loss = peel._prune(problem, true, 1e-6)
    assert found[1].shape[1] == kept
    assert found_loss == loss


def test_probes_are_as_large_as_shows_a_share_of_the_nonlinearity():
    """Shares of 0, .1, .2, ... 1 at the scales 1/16, 1/8, ... 64: half of the largest is reached at 2."""
    eye_II = torch.eye(3, dtype=torch.float64)
    shares = tuple(0.1 * i for i in range(len(SCALES)))
    coordinates = Coordinates(eye_II / 4, 4 * eye_II, 0 * eye_II, 4.0, 0.0, shares)
    half = coordinates.excited(0.5)
    assert half.scale == 2.0
    assert torch.equal(half.back_IR, 2 * eye_II)
    assert torch.equal(half.to_RI, eye_II / 2)
    assert coordinates.excited(0.25).scale == 0.5  # .3 is the first share above .25
    assert half.excited(0.5).scale == 2.0
    unmeasured = Coordinates(eye_II / 4, 4 * eye_II, 0 * eye_II, 4.0, 0.0)
    assert unmeasured.excited(0.5) is unmeasured


@pytest.mark.parametrize(("hidden", "share"), [((3,), NONLINEAR), ((3, 3), NONLINEAR_DEEP)])
def test_students_of_several_layers_learn_from_wider_probes(hidden, share, monkeypatch):
    """The first round's probes are at the smallest scale that shows the share."""
    generator = torch.Generator().manual_seed(0)
    sizes = (9, *hidden, 2)
    shapes = zip(sizes[1:], sizes[:-1], strict=True)
    weights = [
        (torch.randn(o, i, generator=generator).double(), torch.randn(o, generator=generator).double())
        for o, i in shapes
    ]
    used: list[Coordinates] = []

    def first_round(run, probes, *_):
        used.append(probes.coordinates)
        raise OutOfQueries(len(used))

    monkeypatch.setattr(recovery, "_round", first_round)
    config = configuration.replace(RecoveryConfig(), {"probes.derivatives": False})
    recovery.recover_network(network(weights, "g"), 9, "g", len(hidden), config=config)
    shown = used[0].nonlinear
    step = SCALES.index(used[0].scale)
    assert shown[step] >= share * max(shown) > shown[step - 1]
