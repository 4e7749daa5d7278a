"""What a network is fitted to, what makes a fit exact, and what was found.

Legend: N students, Q queries, I inputs, R relevant input directions, O outputs, P parameters.
"""

import time
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.least_squares import Solution, levenberg_marquardt
from distrecon.expand_cluster.matrix_free import NO_DAMPING, matrix_free
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.neurons import LayerClustering
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.thresholds import CONVERGED
from distrecon.nets.activations import Activation

SHORT = 0.1  # x the loss before: a step without matrices that leaves more is short, where matrices are affordable
LAST_STEPS = 3  # without matrices, and with them, at most, of what is exact already


@dataclass(frozen=True)
class TrainingData:
    """Queries, their relevant coordinates, and answers standardised by one mean per output and one common scale."""

    x_QI: Tensor
    z_QR: Tensor
    y_QO: Tensor
    mean_O: Tensor
    scale: float

    @staticmethod
    def of(x_QI: Tensor, z_QR: Tensor, answers_QO: Tensor) -> "TrainingData":
        """Standardise the answers."""
        mean_O = answers_QO.mean(0)
        scale = float((answers_QO - mean_O).square().mean().sqrt())
        return TrainingData(x_QI, z_QR, (answers_QO - mean_O) / (scale or 1.0), mean_O, scale)


@dataclass(frozen=True)
class NetworkFit:
    """The least-squares problem of a group of dense networks on shared queries (see least_squares.LeastSquares)."""

    net: DenseNet
    x_QI: Tensor
    y_QO: Tensor

    def loss(self, theta_NP: Tensor) -> Tensor:
        return self.net.loss(theta_NP, self.x_QI, self.y_QO)

    def normal_equations(self, theta_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.net.normal_equations(theta_NP, self.x_QI, self.y_QO)


@dataclass(frozen=True)
class Problem:
    """Networks of one activation to be fitted to training data, in the coordinates in which its probes were drawn.

    A fit in the relevant directions is exact when its relative loss is at most `floor`; after a polish in all inputs,
    which frees it from the directions' own error, when it is at most `polished_floor`. `deadline` is a
    `time.monotonic` value.
    """

    data: TrainingData
    activation: Activation
    config: RecoveryConfig
    probes: Probes
    floor: float
    polished_floor: float
    deadline: float | None

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def net(self, hidden: int, skip: bool = False) -> DenseNet:
        """Networks of one hidden layer from the training data's coordinates to its answers."""
        return DenseNet((self.data.z_QR.shape[1], hidden, self.data.y_QO.shape[1]), self.activation, skip)

    def rows(self, net: DenseNet) -> int:
        """Queries for one fit: at least three equations for every unknown. The queries are in random order."""
        return max(self.config.solver.rows, 3 * net.num_parameters // net.sizes[-1] + 1)

    def fit(
        self,
        net: DenseNet,
        theta_NP: Tensor,
        inputs_QI: Tensor | None = None,
        tolerance: float = CONVERGED,
        iterations: int | None = None,
    ) -> Solution:
        """Levenberg-Marquardt on every network of the group, from theta[N, P]; the inputs are z unless given.

        At most `solver.iterations` steps unless given. Without matrices where there is one network of more than
        `solver.dense_parameters`.
        """
        rows, inputs = self.rows(net), self.data.z_QR if inputs_QI is None else inputs_QI
        target = NetworkFit(net, inputs[:rows], self.data.y_QO[:rows])
        iterations = iterations or self.config.solver.iterations
        if len(theta_NP) == 1 and net.num_parameters > self.config.solver.dense_parameters:
            return matrix_free(net, theta_NP, target.x_QI, target.y_QO, iterations, tolerance, self.deadline)
        return levenberg_marquardt(target, theta_NP, iterations, tolerance, deadline=self.deadline)

    def refine(self, net: DenseNet, theta_1P: Tensor) -> Solution:
        """The last digits of a nearly exact network, in all inputs.

        Without matrices first where there are more parameters than small students have, as that is far cheaper, until
        its steps are short, and, below the floor, a few more while anything is gained. Where matrices are affordable
        they do the rest, with the damping of a start that is all but right: one step of theirs gains what dozens of the
        others do in directions that hardly act.
        """
        if net.num_parameters <= self.config.solver.student_parameters:
            return self.fit(net, theta_1P, self.data.x_QI)
        rows, steps, dense = self.rows(net), self.config.solver.iterations, self.config.solver.dense_parameters
        x_QI, y_QO = self.data.x_QI[:rows], self.data.y_QO[:rows]
        further = partial(matrix_free, net, x_QI=x_QI, y_QO=y_QO, tolerance=CONVERGED, deadline=self.deadline)
        if net.num_parameters > dense:
            return further(theta_1P, max_iterations=steps)
        solution = further(theta_1P, max_iterations=steps, falls=SHORT)
        if float(solution.loss_N) <= self.polished_floor:
            solution, steps = further(solution.theta_NP, max_iterations=LAST_STEPS), LAST_STEPS
            if solution.status != ["iterations"]:
                return solution
        fit = NetworkFit(net, x_QI, y_QO)
        return levenberg_marquardt(fit, solution.theta_NP, steps, CONVERGED, NO_DAMPING, deadline=self.deadline)


@dataclass(frozen=True)
class Found:
    """A network without skip in the relevant coordinates, its relative loss, and the clusterings that led to it.

    `objection`: why it is not the black box's own network even if all answers agree; `note`: what else is to be said.
    """

    net: DenseNet
    theta_1P: Tensor
    loss: float
    linkage: list[LayerClustering]
    objection: str = ""
    note: str = ""
