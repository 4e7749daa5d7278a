"""Recovery of relu and leaky_relu networks from their bends, without students: one or two hidden layers.

Lines are scanned until the layers found in their bends explain the answers exactly (see kinks.py). A last hidden layer
is a shallow problem on what it sees, so it is collapsed, freed of its sign flips and of false neurons like students'
clusters. Deeper networks, and those whose first layer is wider than its relevant directions, are left to students.

Legend: R relevant input directions, H hidden, K = R + 1 coordinates of a neuron.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.deep import Peeled, assemble
from distrecon.expand_cluster.fitting import Probed
from distrecon.expand_cluster.kinks import GRID, Lines, first_layer, random_lines, scan, second_layer
from distrecon.expand_cluster.probes import Coordinates
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.shallow import Collapsed, exact_network
from distrecon.expand_cluster.verdict import conclude

REACHES = (1.0, 4.0, 16.0, 64.0, 256.0)  # half lengths of the first lines, in units of sqrt(R) of the probes
PILOTS = 2  # lines of each reach before the best is chosen
AROUND = (0.25, 1.0, 4.0)  # half lengths of the other lines, in units of the best
ROUNDS = (4, 8, 16, 32)  # lines of each of those in one round
AIMED = 3  # times as many lines towards what does not fit yet
NEAREST = 4  # bends of each neuron round which probes are placed
SPARE = 4  # a scan is made only while the query budget has this many times its grid left
LAYERS = 2  # hidden layers that bends can tell


def recover_from_bends(run: Run) -> Recovery | None:
    """The network that explains the bends of more and more lines, until one is verified; None when none is found.

    Leaves the probes' coordinates at the scale at which the network bends, and places round its bends. Scans no further
    when the query budget has not several times the need of a scan left.
    """
    if run.activation.symmetry != "scaled" or run.hidden_layers > LAYERS:
        return None
    original, rank = run.coordinates, run.coordinates.rank
    best: Recovery | None = None
    parts: list[Lines] = []

    def ask(z: Tensor) -> Tensor:
        return run.box(z.reshape(-1, rank) @ original.back_IR.T).reshape(*z.shape[:-1], run.box.outputs)

    def look(from_LR: Tensor, to_LR: Tensor) -> None:
        if run.box.left() > SPARE * len(from_LR) * GRID:
            parts.append(scan(ask, from_LR, to_LR, run.box.noise))

    for reach in REACHES:
        look(*random_lines(rank, reach * rank**0.5, PILOTS, run.generator))
    if not any(len(part.line_S) for part in parts):
        return None
    fullest = REACHES[max(range(len(parts)), key=lambda i: len(parts[i].line_S))]
    for lines in ROUNDS:
        for factor in AROUND:
            look(*random_lines(rank, fullest * factor * rank**0.5, lines, run.generator))
        found = _explain(run, original, Lines.join(parts))
        if found is None:
            continue
        if best is None or _loss(found.recovery) < _loss(best) or found.recovery.verified:
            best = found.recovery
        if found.recovery.verified or run.late():
            break
        look(*_towards_misfits(found, original, AIMED * lines, run.generator))
        if run.hidden_layers > 1:
            look(*_from_corners(found.first_HK, fullest * rank**0.5, run.generator))
    return best


@dataclass(frozen=True)
class _Explained:
    """A recovery, the data it was fitted to, and its first layer [H, K] in the coordinates of the lines."""

    recovery: Recovery
    data: Probed
    first_HK: Tensor


def _loss(recovery: Recovery) -> float:
    return float(recovery.metrics["recover/train_loss"])


def _towards_misfits(
    found: _Explained, original: Coordinates, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lines from probes that are fitted well to those fitted worst: what is missing bends in between."""
    data = found.data
    answers_QO = data.y_QO * data.scale + data.mean_O
    order_Q = (found.recovery(data.x_QI) - answers_QO).square().sum(1).argsort()
    z_QR = data.x_QI @ original.to_RI.T
    good = torch.randint(len(order_Q) // 2, (count,), generator=generator)
    return z_QR[order_Q[good]], z_QR[order_Q[-count:]]


def _from_corners(first_HK: Tensor, reach: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """2 H lines from where the first layer is all off, or all on, to where one of its neurons is not.

    At normal probes about half of the layer is on, and a neuron that most of it holds down never bends there.
    """
    weights_HR, bias_H = first_HK[:, :-1], first_HK[:, -1]
    hidden = len(first_HK)
    sign_LH = torch.cat([-torch.ones(hidden, hidden), torch.ones(hidden, hidden)]).double()
    other_LH = sign_LH * torch.where(torch.eye(hidden).repeat(2, 1) > 0, -1.0, 1.0)
    size_LH = torch.randn(sign_LH.shape, generator=generator, dtype=torch.float64).abs() * weights_HR.norm(dim=1)

    def at(u_LH: Tensor) -> Tensor:
        return (reach * u_LH - bias_H) @ torch.linalg.pinv(weights_HR).T

    return at(sign_LH * size_LH), at(other_LH * size_LH)


def _explain(run: Run, original: Coordinates, lines: Lines) -> _Explained | None:
    """The network whose layers the bends show, fitted and verified; None when they do not show every layer."""
    if len(lines.line_S) < 2:
        return None
    first_HK, clustering = first_layer(lines)
    deep = run.hidden_layers > 1
    if not len(first_HK) or (deep and len(first_HK) > original.rank):
        return None
    farthest = float((first_HK[:, -1] / first_HK[:, :-1].norm(dim=1)).abs().max())
    if deep:
        first_HK, rows = second_layer(lines, first_HK, run.activation)
        several = [row for row in rows if len(row.points_SR) > 1]
        if not several:
            return None
        nearest = [row.points_SR[row.points_SR.norm(dim=1).argsort()[:NEAREST]] for row in several]
        farthest = max(farthest, *(float(points_SR[0].norm()) / original.rank**0.5 for points_SR in nearest))
        run.places_SI = torch.cat(nearest) @ original.back_IR.T
        second_HK = torch.stack([row.vector_K for row in several])
        others_HK = torch.stack([row.vector_K for row in rows if len(row.points_SR) > 1 or row.complete])[
            len(several) :
        ]
    factor = max(1.0, farthest)  # probes must reach every bend
    run.coordinates = original.rescaled(factor)
    as_found_HK = first_HK
    first_HK = torch.cat([first_HK[:, :-1] * factor, first_HK[:, -1:]], dim=1)
    layers = [first_HK, second_HK] if deep else [first_HK]
    data = run.probe(sum(m.numel() for m in layers) + run.box.outputs * (len(layers[-1]) + 1))
    _, floor = run.floors(data)
    settings = (run.activation, run.config, floor, run.deadline)
    found: Collapsed | Peeled
    if deep:
        hidden_QH = run.activation(data.z_QR @ first_HK[:, :-1].T + first_HK[:, -1])
        inner = dataclasses.replace(data, z_QR=hidden_QH)
        last = exact_network(second_HK, others_HK, floor, inner, *settings, clustering)
        found = assemble([first_HK[None], *last.net.matrices(last.theta_1P)], data, *settings, [clustering])
    else:
        found = exact_network(first_HK, first_HK[:0], floor, data, *settings, clustering)
    metrics = {"recover/students": 0, "recover/lines": len(lines.start_LR)}
    return _Explained(conclude(run, found, data, metrics), data, as_found_HK)
