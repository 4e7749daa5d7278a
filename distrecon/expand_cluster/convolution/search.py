"""The last hidden layer of a relu network completed: units and weights that seldom show, read from what is left.

Where something is left of the answers and one unit is the cause, the Jacobian of what is left has rank one,
a (A^T v)^T with the known Jacobian A of what the layer reads: a tells the unit, v its weights, the value its bias. Such
inputs are looked for by ascent through the known layers, round by round.

Legend: Q queries, S points, I inputs, O outputs, C units, K numbers that a unit reads, L positions, N numbers of the
map that the layer reads, U unknown weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.expand_cluster.convolution.kinks import ASCENTS, FAR, along_outputs, known_layers, signed_map
from distrecon.expand_cluster.convolution.residual import SETTLED, Residual
from distrecon.expand_cluster.convolution.rows import read_jacobians, row_at_best
from distrecon.expand_cluster.convolution.units import SAME, Cause
from distrecon.expand_cluster.run import Progress

SEARCHED, EXAMINED = 4000, 80  # inputs of a round, and those of them whose Jacobians are taken, at most
CLIMBS, CLIMB = 25, 0.25  # steps at most, and their size over the distance from the centre
AROUND = 0.25  # share of the inputs drawn round points where something seldom showed
CLIMBED = 0.25  # share of the inputs that lie on climbs along the outputs
LOUD = 3  # numbers of the map that are to be large at one input, at most
USUAL, WITNESSES = 30, 3  # of SETTLED inputs that show a pair often enough; inputs that are kept for the others
ROUNDS, QUIET = 30, 3  # of searches at most, and how many of them in a row must find nothing
STEPS = (1e-3, 1e-4)  # of the Jacobians' differences over the distance from the centre, in turn
STRAIGHT = 1e-12  # of the answers' size: second differences above it show a kink between
ALONE = 1e-5  # ratio of the second singular value to the first, where one unit is the cause
READ = 1e-5  # relative residual of a Jacobian's direction as a unit's weights
DETERMINED = 1e-6  # of the largest singular value: combinations of weights below it are not determined


class Search(Residual):
    """The completion of such a layer."""

    def run(self, progress: Progress, out_of_time: Callable[[], bool]) -> bool:
        """Searches until some in a row find nothing left; whether they did."""
        quiet, refined = 0, False
        for _ in range(ROUNDS):
            self.units = self.units.distinct()
            self.settle(self.natural(SETTLED))
            if not refined and (refined := self.refine()):
                self.forget()
            x_QI = self.draw(SEARCHED)
            open_Q = self.shares(x_QI) > self.limit
            progress("inputs with something left", int(open_Q.sum()))
            quiet = 0 if open_Q.any() else quiet + 1
            if quiet == QUIET or out_of_time():
                break
            refined = not self.explain(self.causes(x_QI[open_Q])) and refined
        return quiet == QUIET

    def witnesses(self) -> Tensor:
        """Inputs [S, I] at which every unit is on together with every number that it reads, as far as such are met:
        elsewhere that weight does not show. Pairs that the usual inputs show are left out."""
        net, theta_P = self.network()
        x_QI = torch.cat([self.natural(SETTLED), *self.points, *(self.draw(SEARCHED) for _ in range(QUIET))])
        passed = net.trace(theta_P, x_QI)
        on_QCL = passed[-1].before_QCL > 0
        padded_QN = F.pad(passed[-2].after.flatten(1) > 0, (1, 0))
        chosen = []
        for unit in range(len(self.units)):
            for position in range(on_QCL.shape[2]):
                both_QK = on_QCL[:, unit, position, None] & padded_QN[:, self.place_KL[:, position]]
                for weight in (both_QK[:SETTLED].sum(0) < USUAL).nonzero()[:, 0].tolist():
                    chosen.append(both_QK[:, weight].nonzero()[:WITNESSES, 0])
        return x_QI[torch.cat(chosen).unique()] if chosen else x_QI[:0]

    def draw(self, count: int) -> Tensor:
        """Inputs of every size, most of them moved to where a few numbers of the map are large and the others small, or
        where one is on whose weight a unit lacks; others climbed along the outputs."""
        generator, x_QI = self.generator, self.natural(count)
        around, climbed = int(AROUND * count), int(CLIMBED * count)
        x_QI[:around] = self.around(around)
        climbed_SI = along_outputs(self.box, self.natural(ASCENTS, FAR), generator)
        x_QI[-climbed:] = climbed_SI[torch.randint(len(climbed_SI), (climbed,), generator=generator)]
        net, theta_P = self.network()
        rate_N = (signed_map(net, net.trace(theta_P, x_QI[:2000])) > 0).double().mean(0)
        numbers, loud = len(rate_N), min(LOUD, len(rate_N))
        chosen_QN = torch.zeros(count, numbers, dtype=torch.float64)
        each = torch.multinomial((1 / (rate_N + 0.02)).expand(count, -1), loud, generator=generator)
        many_Q1 = torch.randint(1, loud + 1, (count, 1), generator=generator)
        chosen_QN.scatter_(1, each, (torch.arange(loud) < many_Q1).double())
        quiet_Q1 = torch.rand(count, 1, generator=generator, dtype=torch.float64)
        unit_Q, position_Q, along_Q = self.aim(chosen_QN)
        if len(self.partial):  # what the partial units lack, near where units showed
            lacking = (~self.partial.seen_CK).nonzero()[:, 1]
            chosen_QN[:around] = 0.0
            if len(lacking):
                weight_Q = lacking[torch.randint(len(lacking), (around,), generator=generator)]
                place_Q = self.place_KL[weight_Q, position_Q[:around]] - 1
                chosen_QN[(place_Q >= 0).nonzero()[:, 0], place_Q[place_Q >= 0]] = 1.0
        steps_Q = torch.randint(CLIMBS + 1, (count,), generator=generator)
        steps_Q[-climbed:] = 0
        length_Q1 = x_QI.norm(dim=1, keepdim=True)
        for step in range(CLIMBS):
            moving = (steps_Q > step).nonzero()[:, 0]
            with torch.enable_grad():
                x_SI = x_QI[moving].requires_grad_()
                passed = net.trace(theta_P, x_SI)
                signed_SN = signed_map(net, passed)
                wanted = (chosen_QN[moving] * signed_SN).sum() - (quiet_Q1[moving] * signed_SN.clamp(min=0)).sum()
                u_S = passed[-1].before_QCL[torch.arange(len(moving)), unit_Q[moving], position_Q[moving]]
                (slope_SI,) = torch.autograd.grad(wanted + (along_Q[moving] * u_S).sum(), x_SI)
            slope_SI = F.normalize(slope_SI, dim=1)
            x_QI = x_QI.index_add(0, moving, CLIMB * length_Q1[moving] * slope_SI)
            x_QI = x_QI * length_Q1 / x_QI.norm(dim=1, keepdim=True)
        return x_QI

    def aim(self, chosen_QN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For half of the inputs a unit [Q], a position [Q] and how it is to move [Q]; `chosen` has what it lacks."""
        count, positions = len(chosen_QN), self.place_KL.shape[1]
        lacking = (~self.units.seen_CK).nonzero()
        unit_Q = torch.randint(len(self.units.matrix_CK), (count,), generator=self.generator)
        position_Q = torch.randint(positions, (count,), generator=self.generator)
        along_Q = 2 * torch.rand(count, generator=self.generator, dtype=torch.float64) - 1
        aimed_Q = torch.rand(count, generator=self.generator) < 0.5
        if len(lacking):
            pair_Q = lacking[torch.randint(len(lacking), (count,), generator=self.generator)]
            unit_Q = torch.where(aimed_Q, pair_Q[:, 0], unit_Q)
            place_Q = self.place_KL[pair_Q[:, 1], position_Q] - 1
            inside = (aimed_Q & (place_Q >= 0)).nonzero()[:, 0]
            chosen_QN[inside] = 0.0
            chosen_QN[inside, place_Q[inside]] = 1.0
        size_C = self.units.matrix_CK[:, :-1].norm(dim=1).clamp(min=1e-300)
        return unit_Q, position_Q, 3 * along_Q * aimed_Q / size_C[unit_Q]

    def causes(self, x_SI: Tensor) -> list[Cause]:
        """Of some of the points where something is left, those at which one unit is the cause."""
        x_SI = x_SI[torch.randperm(len(x_SI), generator=self.generator)][:EXAMINED]
        if not len(x_SI):
            return []
        jacobian_SOI, straight_S = self.jacobians(x_SI)
        x_SI, jacobian_SOI = x_SI[straight_S], jacobian_SOI[straight_S]
        left_SOO, values, right_SOI = torch.linalg.svd(jacobian_SOI, full_matrices=False)
        alone_S = values[:, 1] < ALONE * values[:, 0] if values.shape[1] > 1 else values[:, 0] > 0
        x_SI, outgoing_SO = x_SI[alone_S], left_SOO[alone_S, :, 0]
        normal_SI = values[alone_S, :1] * right_SOI[alone_S, 0]
        if not len(x_SI):
            return []
        amount_S = (self.left(x_SI) * outgoing_SO).sum(1)
        sign_S1 = amount_S.sign()[:, None]
        outgoing_SO, normal_SI, amount_S = sign_S1 * outgoing_SO, sign_S1 * normal_SI, amount_S.abs()
        net, theta_P = known_layers(self.hypothesis, self.known, self.activation)
        read_SKL, jacobian_SIKL = read_jacobians(net, theta_P, self.hypothesis, x_SI)
        found = []
        for number, normal_I in enumerate(normal_SI):
            size = normal_I.norm()
            row_K, told_K, position = row_at_best(jacobian_SIKL[number], normal_I / size, READ)
            if position >= 0:
                row_K = size * row_K
                bias = float(amount_S[number] - row_K @ read_SKL[number, :, position])
                found.append(Cause(x_SI[number], row_K, told_K, bias, position, outgoing_SO[number]))
        return found

    def jacobians(self, x_SI: Tensor) -> tuple[Tensor, Tensor]:
        """Of what is left, [S, O, I], by differences as long as there is no kink between, and where that can be."""
        count, inputs = x_SI.shape
        jacobian_SOI = torch.zeros(count, self.box.outputs, inputs, dtype=torch.float64)
        done_S = torch.zeros(count, dtype=torch.bool)
        size_S = self.box(x_SI).norm(dim=1) + 1e-300
        for share in STEPS:
            open_S = (~done_S).nonzero()[:, 0]
            if not len(open_S):
                break
            here_SI = x_SI[open_S]
            step_S = share * here_SI.norm(dim=1) / inputs**0.5
            moves_SII = step_S[:, None, None] * torch.eye(inputs, dtype=torch.float64)
            up, down = (
                self.left((here_SI[:, None] + sign * moves_SII).flatten(0, 1)).unflatten(0, (-1, inputs))
                for sign in (1, -1)
            )
            bend_S = (up + down - 2 * self.left(here_SI)[:, None]).abs().amax((1, 2))
            straight_S = bend_S <= STRAIGHT * size_S[open_S]
            slopes = ((up - down) / (2 * step_S[:, None, None])).transpose(1, 2)
            jacobian_SOI[open_S[straight_S]] = slopes[straight_S]
            done_S[open_S[straight_S]] = True
        return jacobian_SOI, done_S

    def explain(self, causes: list[Cause]) -> int:
        """Weights and units that the causes show are added; how many."""
        inputs, others = dict[int, list[Cause]](), list[Cause]()
        for cause in causes:
            shown = (cause.row_K.abs() > SAME * cause.row_K.abs().max()).nonzero()[:, 0]
            number = int(self.place_KL[shown[0], cause.position])
            if len(shown) == 1 and not all(bool(self.units.seen_CK[:, k].all()) for k, _ in self.readers(number)):
                inputs.setdefault(number, []).append(cause)
            else:
                others.append(cause)
        changed = sum(self.weights_of(number, found) for number, found in inputs.items())
        net, theta_P = self.network()
        for cause in others:
            on_CL = net.trace(theta_P, cause.x_I[None])[-1].before_QCL[0] > 0
            told = self.units.join(cause, ~on_CL[:, cause.position])
            told = told or self.units.at_other_position(cause)
            if told is None:
                told = self.partial.join(
                    cause, torch.ones(len(self.partial), dtype=torch.bool)
                ) or self.partial.at_other_position(cause)
                if told is None:
                    self.partial, told = self.partial + cause.unit(self.place_KL.shape[1]), (len(self.partial), 1)
            if told[1]:
                self.points.append(cause.x_I[None])
            changed += told[1]
        return changed + self.promote()

    def promote(self) -> int:
        """Units whose weights for all common numbers of the map are known take part from now on, where more answers are
        explained with them than without; how many. Others would be on where the true ones are off."""
        common_K = torch.cat([self.common_N.new_zeros(1), self.common_N])[self.place_KL].any(1)
        x_QI, changed = self.natural(SETTLED), 0
        for number in reversed(range(len(self.partial))):
            if not bool((self.partial.seen_CK[number] | ~common_K).all()):
                continue
            before, unexplained = self.units, self.unexplained(x_QI)
            self.units = before + self.partial[number]
            self.partial = self.partial.without(number)
            if self.unexplained(x_QI) <= unexplained:
                changed += 1
            else:
                self.units = before
        return changed

    def readers(self, number: int) -> list[tuple[int, int]]:
        """By which of their weights, and at which positions, units read a number of the map."""
        return [(int(k), int(position)) for k, position in (self.place_KL == number).nonzero()]

    def weights_of(self, number: int, causes: list[Cause]) -> int:
        """The unknown weights for one number of the map from points where it alone is the cause: there the outputs
        change with it by the sum of these weights times what the units that are on add to the outputs."""
        readers = self.readers(number)
        unknown = [(c, k) for k in dict(readers) for c in (~self.units.seen_CK[:, k]).nonzero()[:, 0].tolist()]
        net, theta_P = self.network()
        on_QCL = (net.trace(theta_P, torch.stack([c.x_I for c in causes]))[-1].before_QCL > 0).double()
        design_QOU = torch.zeros(len(causes), self.box.outputs, len(unknown), dtype=torch.float64)
        for column, (unit, weight) in enumerate(unknown):
            for k, position in readers:
                if k == weight:
                    outgoing_O = self.units.outgoing_CLO[unit, position]
                    design_QOU[:, :, column] += on_QCL[:, unit, position, None] * outgoing_O
        y_QO = torch.stack([cause.row_K.sum() * cause.outgoing_O for cause in causes])
        kept_Q = torch.ones(len(causes), dtype=torch.bool)
        while kept_Q.any():
            design_NU = design_QOU[kept_Q].flatten(0, 1)
            solution_U = torch.linalg.lstsq(design_NU, y_QO[kept_Q].flatten()[:, None], driver="gelsd").solution[:, 0]
            left_Q = ((design_QOU @ solution_U - y_QO).norm(dim=1) / y_QO.norm(dim=1)).where(kept_Q, -torch.inf)
            if left_Q.max() < SAME:
                break
            kept_Q[left_Q.argmax()] = False
        if not kept_Q.any():
            return 0
        _, values, right = torch.linalg.svd(design_NU, full_matrices=True)
        rank = int((values > DETERMINED * values[0]).sum())
        told_U = right[rank:].norm(dim=0) < SAME
        for (unit, weight), value, told in zip(unknown, solution_U, told_U, strict=True):
            if told:
                self.units.matrix_CK[unit, weight] = value
                self.units.seen_CK[unit, weight] = True
        self.points.extend(cause.x_I[None] for cause, kept in zip(causes, kept_Q, strict=True) if kept)
        return int(told_U.sum())
