"""What the network found so far leaves of the answers, and the last hidden layer of relu as far as it is known.

With the layers before it known, nearly every answer is explained but for a linear function of what the layer reads,
which stands for units whose signs are open and for missing ones that are nearly always on. What is left beside that is
zero but where a missing unit is on (or one nearly always on is off), or where a unit responds to an input whose weight
is unknown: `search` looks for such inputs.

Legend: Q queries, S points, I inputs, O outputs, C units, K numbers that a unit reads, L positions, N numbers of the
map that the layer reads, P parameters, F features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.convolution.kinks import known_layers
from distrecon.expand_cluster.convolution.network import ConvNet, Passed
from distrecon.expand_cluster.convolution.projection import Projected
from distrecon.expand_cluster.convolution.rows import Layer, places
from distrecon.expand_cluster.convolution.units import Units
from distrecon.expand_cluster.thresholds import CONVERGED
from distrecon.nets.activations import Activation

SETTLED = 3000  # inputs of a round that determine the linear function
REACHES = (0.5, 100.0)  # of the inputs, in units of their scale
KEPT = 10  # points at which a unit bends, of each
REFINED, REFINED_REACHES = 1200, (0.5, 8.0)  # inputs of the fit of what is known, and theirs
CLEAN, STEPS_OF_REFINEMENT = 1e-4, 4  # of the answers' size: what may be left there, at most; steps of that fit
USUALLY = 30  # times what is left at most inputs: where more is left, it has a cause
NEAR = 0.3  # how far from points where something seldom showed inputs are drawn, over the distance from the centre
COMMON = 0.1  # share of the inputs at which a number of the map must be on to have a place in the linear function
TRIMMED, TRIMS = 0.6, 15  # share of the inputs that the linear function must explain; fits of it
LEFT, ROUNDED = 1e-7, 1e-11  # of the answers' size: what is left above it has a cause, at most and at least
FLIPPED = 0.5  # share of a unit's own linear term in the linear function, above which it is turned round


class Residual:
    """A last hidden layer of which kinks showed `layer`, all layers before it `known`: its units, the linear function
    that stands for the others, and what both leave of the answers."""

    def __init__(
        self,
        box: BlackBox,
        hypothesis: Hypothesis,
        known: list[Tensor],
        layer: Layer,
        activation: Activation,
        unit: float,
        generator: torch.Generator,
    ) -> None:
        self.box, self.hypothesis, self.known, self.activation = box, hypothesis, known, activation
        self.unit, self.generator = unit, generator
        self.units = Units(layer.matrix_CK.clone(), layer.seen_CK.clone(), layer.outgoing_CLO.nan_to_num(0.0))
        self.partial = Units(*(part[:0] for part in vars(self.units).values()))
        before, _ = known_layers(hypothesis, known, activation)
        self.map_shape = (before.widths[-1], *hypothesis.stages[-2].after)
        self.place_KL = places(hypothesis.stages[-1], self.map_shape)
        self.linear_NO = torch.zeros(before.num_features, box.outputs, dtype=torch.float64)
        self.constant_O = torch.zeros(box.outputs, dtype=torch.float64)
        self.common_N = torch.ones(before.num_features, dtype=torch.bool)
        self.limit = LEFT
        self.points = [points_SI[:KEPT] for points_SI in layer.bends_CSI]

    def network(self) -> tuple[ConvNet, Tensor]:
        """The known layers with the units of this one, and their theta [P]."""
        return known_layers(self.hypothesis, [*self.known, self.units.matrix_CK], self.activation)

    def explained(self, passed: list[Passed]) -> Tensor:
        """Answers [Q, O] of the units that are known."""
        on_QCL = self.activation(passed[-1].before_QCL)
        return torch.einsum("qcl,clo->qo", on_QCL, self.units.outgoing_CLO)

    def left(self, x_QI: Tensor) -> Tensor:
        """What is left of the answers [Q, O]."""
        net, theta_P = self.network()
        passed = net.trace(theta_P, x_QI)
        linear_QO = passed[-2].after.flatten(1) @ self.linear_NO + self.constant_O
        return self.box(x_QI) - self.explained(passed) - linear_QO

    def shares(self, x_QI: Tensor) -> Tensor:
        """What is left over the answers' size [Q]."""
        return self.left(x_QI).norm(dim=1) / self.size(x_QI)

    def size(self, x_QI: Tensor) -> Tensor:
        """Of the answers [Q]."""
        size_Q = self.box(x_QI).norm(dim=1)
        return size_Q + size_Q.median()

    def unexplained(self, x_QI: Tensor) -> int:
        """Number of inputs at which something is left."""
        return int((self.shares(x_QI) > self.limit).sum())

    def settle(self, x_QI: Tensor) -> None:
        """The linear function from inputs at which what seldom shows does not; units turned round that it explains."""
        net, theta_P = self.network()
        passed, size_Q1 = net.trace(theta_P, x_QI), self.size(x_QI)[:, None]
        map_QN = passed[-2].after.flatten(1)
        self.common_N = common_N = (map_QN > 0).double().mean(0) > COMMON
        design_QN = torch.cat([map_QN[:, common_N], map_QN.new_ones(len(map_QN), 1)], dim=1) / size_Q1
        solution_NO = _trimmed(design_QN, (self.box(x_QI) - self.explained(passed)) / size_Q1)
        before, usual = (self.linear_NO, self.constant_O), self.shares(x_QI).median()
        self.linear_NO = self.linear_NO.new_zeros(self.linear_NO.shape)
        self.linear_NO[common_N], self.constant_O = solution_NO[:-1], solution_NO[-1]
        if self.shares(x_QI).median() > usual:
            self.linear_NO, self.constant_O = before
        self.turn(common_N)
        self.limit = float((USUALLY * self.shares(x_QI).median()).clamp(ROUNDED, LEFT))

    def refine(self) -> bool:
        """All weights that are known, fitted to answers that they explain nearly: rows read from kinks, and from what
        was left, are too coarse to tell what is left. Not where a linear function stands for units that are missing, or
        too much is not explained; whether it was done."""
        net, theta_P = self.network()
        x_QI = torch.cat([self.natural(REFINED, REFINED_REACHES), self.around(REFINED // 3)])
        left_Q = self.shares(x_QI)
        x_QI = x_QI[left_Q < (USUALLY * left_Q.median()).clamp(max=CLEAN)]
        y_QO = self.box(x_QI)
        if self.linear_NO.norm() > CLEAN * self.units.outgoing_CLO.norm() or len(x_QI) < REFINED / 2:
            return False
        free = [torch.ones_like(m, dtype=torch.bool) for m in self.known]
        free.append(F.pad(self.units.seen_CK, (0, 1), value=True))
        target = Projected(net, x_QI, y_QO / y_QO.std(), free_P=net.flatten(free))
        fitted_P = target.fit(theta_P, STEPS_OF_REFINEMENT, CONVERGED).theta_NP[0]
        count = net.num_features
        readout_FO = y_QO.std() * target.readout(fitted_P).coefficients_FO
        before = self.known, self.units, self.linear_NO, self.constant_O, self.unexplained(x_QI)
        *self.known, matrix_CK = (m.clone() for m in net.matrices(fitted_P))
        outgoing_CLO = readout_FO[:count].unflatten(0, (len(self.units), -1))
        shown_CL1 = outgoing_CLO.abs().amax(2, keepdim=True) > 0  # the others were off at all these inputs
        outgoing_CLO = torch.where(shown_CL1, outgoing_CLO, self.units.outgoing_CLO)
        self.units = Units(matrix_CK, self.units.seen_CK, outgoing_CLO)
        self.linear_NO, self.constant_O = torch.zeros_like(self.linear_NO), readout_FO[-1]
        if self.unexplained(x_QI) > before[-1]:
            self.known, self.units, self.linear_NO, self.constant_O, _ = before
        return True

    def forget(self) -> None:
        """Units are dropped without which no more is left: some were read where too much was not explained yet."""
        net, theta_P = self.network()
        x_QI = torch.cat([self.natural(SETTLED), *self.points])
        on_QCL = self.activation(net.trace(theta_P, x_QI)[-1].before_QCL)
        left_QO, size_Q = self.left(x_QI), self.size(x_QI)
        for number in reversed(range(len(self.units))):
            without_QO = left_QO + on_QCL[:, number] @ self.units.outgoing_CLO[number]
            more = [(part_QO.norm(dim=1) > self.limit * size_Q).sum() for part_QO in (left_QO, without_QO)]
            if more[1] <= more[0]:
                self.units, left_QO = self.units.without(number), without_QO

    def own_linear(self) -> Tensor:
        """The linear term of every unit as a function of the map, [C, N, O]."""
        count = self.units.matrix_CK.new_zeros(len(self.units.matrix_CK), len(self.linear_NO) + 1, self.box.outputs)
        for position in range(self.place_KL.shape[1]):
            place_K = self.place_KL[:, position]
            term = self.units.matrix_CK[:, :-1, None] * self.units.outgoing_CLO[:, position, None]
            count.index_add_(1, place_K, term)
        return count[:, 1:]

    def turn(self, common_N: Tensor) -> None:
        """Units turned round where the linear function makes up for it: relu(u) = relu(-u) + u."""
        own_CNO = self.own_linear()
        design_CE = own_CNO[:, common_N].flatten(1)
        shares_C = torch.linalg.lstsq(design_CE.T, self.linear_NO[common_N].flatten()[:, None], driver="gelsd").solution
        flipped_C = shares_C[:, 0] < -FLIPPED
        self.flip(flipped_C, own_CNO, common_N)
        for number in range(len(own_CNO)):
            self.flip(torch.arange(len(own_CNO)) == number, self.own_linear(), common_N)

    def flip(self, flipped_C: Tensor, own_CNO: Tensor, common_N: Tensor) -> None:
        """These units turned round if the linear function gets smaller by that."""
        linear_NO = self.linear_NO + own_CNO[flipped_C].sum(0)
        if linear_NO[common_N].norm() < FLIPPED * self.linear_NO[common_N].norm() > LEFT:
            self.linear_NO = linear_NO
            biases = torch.einsum("c,clo->o", self.units.matrix_CK[flipped_C, -1], self.units.outgoing_CLO[flipped_C])
            self.constant_O = self.constant_O + biases
            self.units.matrix_CK = torch.where(flipped_C[:, None], -self.units.matrix_CK, self.units.matrix_CK)

    def natural(self, count: int, reaches: tuple[float, float] = REACHES) -> Tensor:
        """Inputs of every size."""
        low, high = (math.log(self.unit * reach) for reach in reaches)
        size_Q1 = (low + (high - low) * torch.rand(count, 1, generator=self.generator, dtype=torch.float64)).exp()
        shape = (count, self.box.inputs)
        return self.box.place(size_Q1 * torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def around(self, count: int) -> Tensor:
        """Inputs round points at which units bend, or at which something showed that seldom does."""
        points_SI = torch.cat(self.points)
        x_QI = points_SI[torch.randint(len(points_SI), (count,), generator=self.generator)]
        noise_QI = torch.randn(x_QI.shape, generator=self.generator, dtype=torch.float64)
        far_Q1 = x_QI.norm(dim=1, keepdim=True) / self.box.inputs**0.5
        return self.box.place(x_QI + NEAR * far_Q1 * noise_QI)


def _trimmed(design_QN: Tensor, y_QO: Tensor) -> Tensor:
    """Least squares of the rows that are explained best, [N, O] (least trimmed squares: Rousseeuw, J. Am. Stat. Assoc.
    1984)."""
    kept_Q = torch.ones(len(y_QO), dtype=torch.bool)
    for _ in range(TRIMS):
        solution_NO = torch.linalg.lstsq(design_QN[kept_Q], y_QO[kept_Q], driver="gelsd").solution
        left_Q = (design_QN @ solution_NO - y_QO).norm(dim=1)
        kept_Q = left_Q <= torch.quantile(left_Q, TRIMMED).clamp(min=LEFT / 10)
    return solution_NO
