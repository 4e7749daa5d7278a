"""Deep networks put together layer by layer: what is fitted, what is dropped, and where their probes lie."""

import dataclasses

import pytest
import torch
from torch import Tensor

from distrecon import config as configuration
from distrecon.expand_cluster import peel
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.coordinates import SCALES, Coordinates, isotropic
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.run import Run
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


@pytest.mark.parametrize("seed", range(4))
def test_neurons_that_keep_a_deep_fit_from_converging_are_dropped_on_the_way(seed):
    """Four neurons too many in each layer: thirty steps, all that there are, leave the fit inexact."""
    problem, true = deep_problem("g", seed, steps=30)
    generator = torch.Generator().manual_seed(seed)
    start = perturbed(true, 4, generator)
    assert peel._fit(problem, start)[1] > 10 * problem.floor
    found = peel.assemble(problem, start, [])
    assert found.net.sizes == (4, 3, 3, 2)
    assert found.loss <= problem.floor


def test_a_deep_network_that_lacks_a_neuron_is_left_as_it_fits_best():
    """One of the second layer that hardly acts: the loss is far above the floor, and the others are all needed."""
    problem, true = deep_problem("tanh", seed=0)
    first, second, last = (m.clone() for m in true)
    weak = last[..., 0].clone()
    last[..., 0] = 1e-3 * weak
    answers_QO = problem.data.y_QO + _change(problem, true, [first, second, last])
    problem = dataclasses.replace(problem, data=dataclasses.replace(problem.data, y_QO=answers_QO))
    lacking = [first, second[:, 1:], last[..., 1:]]
    found = peel.assemble(problem, lacking, [])
    assert found.net.sizes == (4, 3, 2, 2)
    assert problem.floor < found.loss <= 1.001 * peel._fit(problem, lacking)[1]


def _change(problem: Problem, before: list[Tensor], after: list[Tensor]) -> Tensor:
    net = peel._net(problem, before)
    return (net(net.flatten(after), problem.data.z_QR) - net(net.flatten(before), problem.data.z_QR))[0]


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
