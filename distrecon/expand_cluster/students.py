"""Students: groups of networks wider than the black box, trained on its answers.

Legend: N students, Q queries, H hidden, O outputs, P parameters.
"""

from torch import Tensor, inf

from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.problem import Problem
from distrecon.expand_cluster.run import Run
from distrecon.expand_cluster.thresholds import TRAINED
from distrecon.expand_cluster.warm_start import warm_start

PASSES = 4  # at most, of deep students, each with twice the steps of the one before


def solved(run: Run, net: DenseNet) -> bool:
    """Whether students are small enough for the least-squares solver, which finds better minima from a random start."""
    return net.num_parameters <= run.config.solver.student_parameters


def train(run: Run, net: DenseNet, count: int, problem: Problem, patience: int, stage: str) -> Tensor:
    """theta[N, P] of `count` students: by the least-squares solver, or by the first-order optimiser."""
    settings, data = run.config.warm_start, problem.data

    def note(step: int, loss_N: Tensor) -> None:
        run.history.append((stage, step, loss_N.tolist()))
        run.progress(stage, float(loss_N.min()))

    with run.timed("students"):
        theta_NP = net.random(count, run.generator)
        if solved(run, net):
            solution = problem.fit(net, theta_NP, tolerance=problem.floor)
            note(solution.iterations, solution.loss_N)
            return solution.theta_NP
        for number in range(PASSES if run.hidden_layers > 1 else 1):
            theta_NP = warm_start(
                net,
                theta_NP,
                data.z_QR,
                data.y_QO,
                run.generator,
                settings.optimiser,
                settings.steps * patience * 2**number,
                settings.learning_rate,
                settings.batch,
                run.deadline,
                note,
            )
            if run.out_of_time():
                break
            if float(net.loss(theta_NP, data.z_QR, data.y_QO).nan_to_num(inf).median()) < TRAINED:
                break
    return theta_NP


def train_on(run: Run, net: DenseNet, theta_NP: Tensor, inputs_QH: Tensor, y_QO: Tensor) -> Tensor:
    """Students of the layers that are left, trained on from where they were carried over to."""
    settings = run.config.warm_start
    return warm_start(
        net,
        theta_NP,
        inputs_QH,
        y_QO,
        run.generator,
        settings.optimiser,
        settings.steps,
        settings.learning_rate / 2,
        settings.batch,
        run.deadline,
    )
