"""Recovery of relu and leaky_relu networks from their bends, without students: one or two hidden layers.

Lines are scanned until the layers found in their bends explain the answers exactly (see kinks.py). A last hidden layer
is a shallow problem on what it sees, so it is collapsed, freed of its sign flips and of false neurons like students'
clusters. Deeper networks, and those whose first layer is wider than its relevant directions, are left to students.

Legend: R relevant input directions, H hidden, K = R + 1 coordinates of a neuron.
"""

import dataclasses

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
SPARE = 4  # a scan is made only while the query budget has this many times its grid left
LAYERS = 2  # hidden layers that bends can tell


def recover_from_bends(run: Run) -> Recovery | None:
    """The network that explains the bends of more and more lines, until one is verified; None when none is found.

    Leaves the probes' coordinates at the scale at which the network bends. Scans no further when the query budget has
    not several times the need of a scan left.
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
        result = _explain(run, original, Lines.join(parts))
        if result is None:
            continue
        recovery, data = result
        if (
            best is None
            or recovery.verified
            or recovery.metrics["recover/train_loss"] < best.metrics["recover/train_loss"]
        ):
            best = recovery
        if recovery.verified or run.late():
            break
        look(*_towards_misfits(recovery, data, original, AIMED * lines, run.generator))
    return best


def _towards_misfits(
    recovery: Recovery, data: Probed, original: Coordinates, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lines from probes that are fitted well to those fitted worst: what is missing bends in between."""
    answers_QO = data.y_QO * data.scale + data.mean_O
    order_Q = (recovery(data.x_QI) - answers_QO).square().sum(1).argsort()
    z_QR = data.x_QI @ original.to_RI.T
    good = torch.randint(len(order_Q) // 2, (count,), generator=generator)
    return z_QR[order_Q[good]], z_QR[order_Q[-count:]]


def _explain(run: Run, original: Coordinates, lines: Lines) -> tuple[Recovery, Probed] | None:
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
        several = [row for row in rows if row.bends > 1]
        if not several:
            return None
        farthest = max(farthest, *(row.away / original.rank**0.5 for row in several))
        second_HK = torch.stack([row.vector_K for row in several])
        others_HK = torch.stack([row.vector_K for row in rows])[len(several) :]
    factor = max(1.0, farthest)  # probes must reach every bend
    run.coordinates = original.rescaled(factor)
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
    return conclude(run, found, data, metrics), data
