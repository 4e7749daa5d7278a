"""Levenberg-Marquardt without matrices, for networks whose J^T J is large.

Each step solves min |J step + r|^2 + lambda |R step|^2 by LSMR (Fong and Saunders, SIAM J. Sci. Comput. 2011), which
needs only products with J and J^T; they cost about a forward and a backward pass. R has each neuron's columns made
orthonormal (block Jacobi preconditioning), so that from a start near an exact fit a few hundred products are enough.

Legend: Q queries, I inputs, O outputs, M residuals, P parameters, H neurons of a layer, K columns of its matrix.
"""

import math
import time

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor

from distrecon.expand_cluster.least_squares import Solution
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.thresholds import NEARLY_EXACT

PRODUCTS = 400  # of LSMR in one step, at most
REDUCED = 1e-9  # LSMR stops when its gradient is this share of what it can be
RIDGE = 1e-14  # of a block's trace, so that it can be factored
NEAR = 1e-6  # relative loss: from a start below it the first step is hardly damped
DAMPING, NO_DAMPING = 1e-3, 1e-12  # lambda at first, from far and from near
CHANGE = 10.0  # of the damping after a step that succeeds or fails
FALLS = 0.99  # x the loss before: an undamped step that leaves more than this was the last, unless told otherwise
TRIALS = 6  # steps in a row that may fail


def matrix_free(
    net: DenseNet,
    theta_1P: Tensor,
    x_QI: Tensor,
    y_QO: Tensor,
    max_iterations: int,
    tolerance: float,
    deadline: float | None = None,
    falls: float = FALLS,
) -> Solution:
    """One network from theta[1, P], until its loss is at most `tolerance` or an undamped step leaves more than `falls`
    of it.

    `deadline` is a `time.monotonic` value. The solution is that of least_squares.levenberg_marquardt.
    """
    loss_1, status, failed, iteration = net.loss(theta_1P, x_QI, y_QO), "iterations", 0, 0
    damping = NO_DAMPING if float(loss_1) < NEAR else DAMPING
    while iteration < max_iterations:
        if float(loss_1) <= tolerance:
            status = "converged"
        elif failed > TRIALS:
            status = "stalled"
        elif deadline is not None and time.monotonic() > deadline:
            status = "time"
        if status != "iterations":
            break
        iteration += 1
        new_1P = theta_1P + _step(net, theta_1P, x_QI, y_QO, damping)
        new_1 = net.loss(new_1P, x_QI, y_QO)
        before = float(loss_1)
        if bool(new_1 < loss_1):
            theta_1P, loss_1, failed = new_1P, new_1, 0
            damping = max(damping / CHANGE, NO_DAMPING)
            if float(new_1) > falls * before and damping <= NO_DAMPING:
                status = "stalled"
                break
        else:
            failed, damping = failed + 1, damping * CHANGE
            if before < NEARLY_EXACT:  # rounding is all that is left
                status = "stalled"
                break
    return Solution(theta_1P, loss_1, [status], iteration)


def _step(net: DenseNet, theta_1P: Tensor, x_QI: Tensor, y_QO: Tensor, damping: float) -> Tensor:
    """The damped step [1, P]."""
    matrices, (inputs, pre) = net.matrices(theta_1P), net.trace(theta_1P, x_QI)
    factors = _blocks(net, matrices, inputs, pre)

    def scaled(vector_P: np.ndarray) -> list[Tensor]:
        """R^-1 v, matrix by matrix."""
        return [
            torch.linalg.solve_triangular(r_HKK, m[0, :, :, None], upper=True)[None, :, :, 0]
            for m, r_HKK in zip(net.matrices(torch.from_numpy(vector_P.ravel())[None]), factors, strict=True)
        ]

    def push(vector_P: np.ndarray) -> np.ndarray:
        return net.push_forward(matrices, inputs, pre, scaled(vector_P)).flatten().numpy()

    def pull(vector_M: np.ndarray) -> np.ndarray:
        delta_1QO = torch.from_numpy(vector_M.ravel()).reshape(pre[-1].shape)
        solved = [
            torch.linalg.solve_triangular(r_HKK.mT, m[0, :, :, None], upper=False)[None, :, :, 0]
            for m, r_HKK in zip(net.pull_back(matrices, inputs, pre, delta_1QO), factors, strict=True)
        ]
        return net.flatten(solved)[0].numpy()

    shape = (y_QO.numel(), theta_1P.shape[1])
    operator = LinearOperator(shape, matvec=push, rmatvec=pull, dtype=np.float64)
    rest_M = (y_QO - pre[-1][0]).flatten().numpy()
    found = lsmr(operator, rest_M, math.sqrt(damping), atol=REDUCED, btol=0.0, conlim=0.0, maxiter=PRODUCTS)
    return net.flatten(scaled(found[0]))


def _blocks(net: DenseNet, matrices: list[Tensor], inputs: list[Tensor], pre: list[Tensor]) -> list[Tensor]:
    """Upper factors R[H, K, K] of every neuron's block of J^T J, R^T R, layer by layer."""
    factors = []
    for slope, a in zip(net.sensitivities(matrices, pre), inputs, strict=True):
        power_QH = slope[0].square().sum(1)
        gram_HKK = torch.stack([a[0].T @ (p_Q[:, None] * a[0]) for p_Q in power_QH.T])
        diagonal_HK = gram_HKK.diagonal(dim1=1, dim2=2)
        diagonal_HK += RIDGE * diagonal_HK.sum(1, keepdim=True).clamp(min=1e-300)
        factors.append(torch.linalg.cholesky(gram_HKK).mT.contiguous())
    return factors
