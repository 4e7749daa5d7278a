"""Recovery of relu and leaky_relu networks from their bends, without students.

One layer, of any width, is the business of one_layer.py. For more, lines are scanned until the layers that their bends
show explain the answers exactly: the first (bends.py, hyperplanes.py), those between it and the last (between.py), and
the last. That is a shallow problem on what it sees, so it is collapsed, freed of its sign flips and of false neurons
like students' clusters. Networks of which a layer but the last is wider than the relevant directions are left to
students.

Legend: L lines, R relevant input directions, H hidden, K = R + 1 coordinates of a neuron.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrecon.expand_cluster.bends import GRID, Lines, random_lines, scan
from distrecon.expand_cluster.between import layer_behind, passed, rows_behind
from distrecon.expand_cluster.collapse import exact_network
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.hyperplanes import first_layer, second_layer
from distrecon.expand_cluster.one_layer import networks_from_bends
from distrecon.expand_cluster.peel import assemble
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.verdict import conclude

REACHES = (1.0, 4.0, 16.0, 64.0, 256.0)  # half lengths of the first lines, in units of sqrt(R) of the probes
PILOTS = 2  # lines of each reach before the best is chosen
AROUND = (0.25, 1.0, 4.0)  # half lengths of the other lines, in units of the best
ROUNDS = (4, 8, 16, 32, 64)  # lines of each of those in one round
MENDING = (16, 16, 16)  # likewise of further rounds, where a fit is exact but for few answers
AIMED = 3  # times as many lines towards what does not fit yet
NEAREST = 4  # bends of each neuron round which probes are drawn
SPARE = 4  # times its grid that a scan may cost
RESERVED = 0.5  # share of the query budget that is left to probes, verification and students


@dataclass(frozen=True)
class FromBends:
    """A recovery, the problem it was fitted to, and its first layer [H, K] in the coordinates of the lines."""

    recovery: Recovery
    problem: Problem
    first_HK: Tensor | None = None

    @property
    def loss(self) -> float:
        return float(self.recovery.metrics["recover/train_loss"])


@dataclass(frozen=True)
class _Scans:
    """Lines scanned in the given coordinates, as long as more than the reserved queries are left."""

    run: Run
    coordinates: Coordinates
    reserved: float
    parts: list[Lines] = field(default_factory=list)

    def add(self, from_LR: Tensor, to_LR: Tensor) -> None:
        if self.run.box.left() - self.reserved > SPARE * len(from_LR) * GRID:
            self.parts.append(scan(self._answer, self._inside(from_LR), self._inside(to_LR), self.run.box.noise))

    def _inside(self, z_LR: Tensor) -> Tensor:
        """Ends of lines pulled inside the domain, where there is one."""
        return self.run.box.pulled(z_LR @ self.coordinates.back_IR.T) @ self.coordinates.to_RI.T

    def _answer(self, z: Tensor) -> Tensor:
        x_QI = z.reshape(-1, self.coordinates.rank) @ self.coordinates.back_IR.T
        return self.run.box(x_QI).reshape(*z.shape[:-1], self.run.box.outputs)


def recover_from_bends(run: Run, coordinates: Coordinates) -> FromBends | None:
    """The network that explains the bends of more and more lines, until one is verified; None when none is found.

    Takes at most half of the queries that are left, and no more rounds than `budget.attempts`.
    """
    if run.activation.symmetry != "scaled":
        return None
    if run.hidden_layers == 1:
        return _one_layer(run, coordinates)
    unit = coordinates.rank**0.5
    scans = _Scans(run, coordinates, RESERVED * run.box.left() if run.box.budget else 0.0)
    for reach in REACHES:
        scans.add(*random_lines(coordinates.rank, reach * unit, PILOTS, run.generator))
    if not any(len(part.line_S) for part in scans.parts):
        return None
    fullest = REACHES[max(range(len(scans.parts)), key=lambda i: len(scans.parts[i].line_S))]
    best: FromBends | None = None
    found: FromBends | None = None
    aimed = 0
    rounds = ROUNDS[: run.config.budget.attempts]
    for number, lines in enumerate((*rounds, *MENDING)):
        if number >= len(rounds) and (best is None or best.recovery.contradictions_QI is None):
            break
        before = len(scans.parts)
        if found is not None:
            scans.add(*_towards_misfits(found, coordinates, aimed, run.generator))
            if found.first_HK is not None:
                scans.add(*_from_corners(found.first_HK, fullest * unit, run.generator))
        for factor in AROUND:
            scans.add(*random_lines(coordinates.rank, fullest * factor * unit, lines, run.generator))
        if len(scans.parts) == before or run.out_of_time():
            break
        last = number + 1 >= len(rounds)
        found, aimed = _explain(run, coordinates, Lines.join(scans.parts), last), AIMED * lines
        if found is None:
            continue
        if best is None or found.loss < best.loss or found.recovery.verified:
            best = found
        if found.recovery.verified:
            break
    return best


def _one_layer(run: Run, coordinates: Coordinates) -> FromBends | None:
    """The first network of one layer that is verified, or the best of those that more and more lines show."""
    best: FromBends | None = None
    networks = networks_from_bends(run, coordinates)
    for problem, network, metrics in networks:
        recovery = conclude(run, problem, network, metrics)
        if best is None or network.loss < best.loss or recovery.verified:
            best = FromBends(recovery, problem)
        if recovery.verified or network.objection:  # further lines find no other signs
            break
    return best


def _towards_misfits(
    found: FromBends, coordinates: Coordinates, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Lines from probes that are fitted well to those fitted worst: what is missing bends in between.

    Where an exact fit is contradicted by answers elsewhere, the lines run to these.
    """
    data = found.problem.data
    answers_QO = data.y_QO * data.scale + data.mean_O
    order_Q = (found.recovery(data.x_QI) - answers_QO).square().sum(1).argsort()
    count = min(count, len(order_Q) // 2)  # so that no line has the same probe at both ends
    z_QR = data.x_QI @ coordinates.to_RI.T
    good = torch.randint(len(order_Q) // 2, (count,), generator=generator)
    if found.recovery.contradictions_QI is not None:
        there_SR = found.recovery.contradictions_QI @ coordinates.to_RI.T
        return z_QR[order_Q[good]], there_SR[torch.randint(len(there_SR), (count,), generator=generator)]
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


def _explain(run: Run, coordinates: Coordinates, lines: Lines, last_round: bool) -> FromBends | None:
    """The network whose layers the bends show, fitted and verified; None when they do not show all.

    Before the last round a linear rest is taken for a neuron that further lines may show.
    """
    if len(lines.line_S) < 2:
        return None
    on_lines_HK, clustering = first_layer(lines)
    if not 0 < len(on_lines_HK) <= coordinates.rank:
        return None
    on_lines_HK, rows = second_layer(lines, on_lines_HK, run.activation)
    between: list[Tensor] = []
    for _ in range(run.hidden_layers - 2):
        next_HK = layer_behind(lines, [on_lines_HK, *between], run.activation, run.generator)
        if next_HK is None:
            return None
        between.append(next_HK)
        rows = rows_behind(lines, [on_lines_HK, *between], run.activation)
    several = [row for row in rows if len(row.points_SR) > 1]
    if not several:
        return None
    nearest = [row.points_SR[row.points_SR.norm(dim=1).argsort()[:NEAREST]] for row in several]
    last_HK = torch.stack([row.vector_K for row in several])
    of_one_bend = [row.vector_K for row in rows if len(row.points_SR) == 1 and row.complete]
    candidates_HK = torch.stack(of_one_bend) if of_one_bend else last_HK[:0]
    planes = (on_lines_HK[:, -1] / on_lines_HK[:, :-1].norm(dim=1)).abs()
    farthest = max(float(planes.max()), *(float(points_SR[0].norm()) / coordinates.rank**0.5 for points_SR in nearest))
    factor = max(1.0, farthest)  # probes must reach every bend
    probes = Probes(coordinates.rescaled(factor), torch.cat(nearest) @ coordinates.back_IR.T)
    first_HK = torch.cat([on_lines_HK[:, :-1] * factor, on_lines_HK[:, -1:]], dim=1)
    known = [first_HK, *between]
    unknowns = sum(m.numel() for m in [*known, last_HK]) + run.box.outputs * (len(last_HK) + 1)
    problem = run.problem(probes, unknowns)
    hidden_QH = run.activation(passed(known, problem.data.z_QR, run.activation)[0])
    inner = dataclasses.replace(problem, data=dataclasses.replace(problem.data, z_QR=hidden_QH))
    last = exact_network(inner, last_HK, candidates_HK, problem.floor, clustering, carry=last_round)
    network = assemble(problem, [*(m[None] for m in known), *last.net.matrices(last.theta_1P)], [clustering])
    metrics = {"recover/students": 0, "recover/lines": len(lines.start_LR)}
    return FromBends(conclude(run, problem, network, metrics), problem, on_lines_HK)
