"""Recovery of tanh and sigmoid networks of two hidden layers from far out, without students.

Far out the first layer saturates, and shows itself neuron by neuron (saturation.py). With it the black box is one of
one layer in the first layer's answers h, whose Jacobians show the second layer's neurons as those of a network of one
layer (from_derivatives.py). The number of relevant directions must be the first layer's size, so that all h can be
asked for; where it is not, or the differences are too noisy, students follow.

Legend: S points, R relevant input directions, H first layer's neurons, G second layer's, O outputs.
"""

import torch
from torch import Tensor

from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.from_derivatives import from_samples
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Found
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.saturation import Units, asked, exact_units, first_layer, second_size
from distrecon.expand_cluster.thresholds import NEARLY_EXACT, SPANNED
from distrecon.expand_cluster.verdict import conclude

BOUNDED = ("odd", "odd_constant")  # symmetries of activations that saturate
PRECISE = 1e-11  # of the answers: more noise than this hides how responses end


def recover_from_saturation(run: Run, coordinates: Coordinates) -> Recovery | None:
    """The network of two hidden layers that is seen from far out; None where it is not."""
    if run.hidden_layers != 2 or run.activation.symmetry not in BOUNDED or run.box.outputs < 2 or coordinates.rank < 2:
        return None
    standard = run.box.standard
    if run.box.noise > PRECISE or (standard is not None and standard.around.bounded):
        return None
    with run.timed("saturation"):
        layers = _layers(run, coordinates)
    if layers is None:
        return None
    units, second_GK = layers
    net = DenseNet((coordinates.rank, len(units.slope_H), len(second_GK), run.box.outputs), run.activation)
    problem = run.problem(Probes(coordinates), net.num_parameters)
    data = problem.data
    hidden = data.z_QR
    for neurons_HK in (units.neurons_HK, second_GK):
        hidden = run.activation(hidden @ neurons_HK[:, :-1].T + neurons_HK[:, -1])
    design_QK = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
    outgoing_KO = torch.linalg.lstsq(design_QK, data.y_QO, driver="gelsd").solution
    theta_1P = net.flatten([units.neurons_HK[None], second_GK[None], outgoing_KO.T[None]])
    loss = float(net.loss(theta_1P, data.z_QR, data.y_QO)[0])
    if loss > NEARLY_EXACT:
        with run.timed("collapse"):
            theta_1P = problem.fit(net, theta_1P).theta_NP
        loss = float(net.loss(theta_1P, data.z_QR, data.y_QO)[0])
    return conclude(run, problem, Found(net, theta_1P, loss, []), {"recover/students": 0})


def _layers(run: Run, coordinates: Coordinates) -> tuple[Units, Tensor] | None:
    """The first layer, and the second one's neurons [G, H + 1]."""
    ask, activation, generator = asked(run.box, coordinates), run.activation, run.generator
    units = first_layer(ask, coordinates.rank, activation, generator)
    size = second_size(ask, units, generator) if units is not None else None
    if units is None or size is None:
        return None
    units, sample, outside = exact_units(ask, units, size, activation, generator)
    if not outside < SPANNED:
        return None
    hidden_SH, samples_SOH = sample.hidden(units, activation)
    second_GK = from_samples(hidden_SH, samples_SOH, size, activation, 1, generator)
    return (units, second_GK) if second_GK is not None else None
