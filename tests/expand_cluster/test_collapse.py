"""Dropping neurons of an exact network: which are tried at all."""

import pytest
import torch

from distrecon.expand_cluster import collapse
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.coordinates import isotropic
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.teachers import synthetic_teacher
from distrecon.expand_cluster.weights import network
from distrecon.nets.activations import activation


@pytest.mark.parametrize(("share", "tried"), [(1e-2, 0), (1e-5, 1)])
def test_only_neurons_that_hardly_count_are_tried_without(share, tried, monkeypatch):
    """One whose outgoing weights are 1e-2 of the others' costs about 1e-4 of the mean square, 1e-5: 1e-10."""
    (w_HI, b_H), (v_OH, c_O) = synthetic_teacher(3, 4, "tanh", seed=0)
    v_OH[:, 0] *= share
    box = BlackBox(network([(w_HI, b_H), (v_OH, c_O)], "tanh"), 3)
    generator = torch.Generator().manual_seed(0)
    run = Run(box, activation("tanh"), 1, RecoveryConfig(), generator, None, None, lambda *_: None, None)
    coordinates = isotropic(box, generator)
    problem = run.problem(Probes(coordinates), 20)
    neurons_HK = torch.cat([w_HI @ coordinates.back_IR, b_H[:, None]], dim=1)
    refits, refit = [], collapse._refit
    monkeypatch.setattr(collapse, "_refit", lambda *given: refits.append(given) or refit(*given))
    kept_HK, loss = collapse._eliminate(problem, neurons_HK, problem.floor, False)
    assert len(refits) == tried
    assert len(kept_HK) == 4
    assert loss == problem.floor
