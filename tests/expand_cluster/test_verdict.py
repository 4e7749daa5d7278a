"""What a verdict asks besides agreement: that the queries determine every weight."""

import pytest
import torch

from distrecon.expand_cluster.verdict import _undetermined
from distrecon.nets.activations import activation


@pytest.mark.parametrize(
    ("name", "slopes", "second", "expected"),
    [
        ("relu", [1.0, -1.0], [1.0, -100.0], 1),  # on only where x > .1, where the other neuron, relu(-x), is off
        ("relu", [1.0, -1.0], [1.0, 1.0], 0),
        ("leaky_relu", [1.0, -1.0], [1.0, -100.0], 0),
        ("tanh", [1.0, 0.5], [1.0, -3.0], 0),
    ],
)
def test_a_weight_that_no_query_shows_is_undetermined(name, slopes, second, expected):
    weights = [
        (torch.tensor(slopes)[:, None].double(), torch.zeros(2).double()),
        (torch.tensor([second]).double(), torch.tensor([-0.1]).double()),
        (torch.ones(1, 1).double(), torch.zeros(1).double()),
    ]
    x_QI = torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]
    assert _undetermined(activation(name), weights, x_QI, x_QI) == expected
