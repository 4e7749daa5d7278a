"""First-order warm starts for a group of students: SOAP, and Adam for comparison.

SOAP (Vyas et al., arXiv 2409.11321) is Adam in the eigenbasis of Shampoo's two matrices, G G^T and G^T G; here for a
batch of students at once, one pair of matrices per student and layer, refreshed by one QR every few steps.

Legend: N students, P parameters, Q queries, I inputs, O outputs; G is a layer's gradient [N, out, columns].
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distrecon.expand_cluster.networks import DenseNet

EPSILON = 1e-12


class Adam:
    """Adam on a list of matrices [N, out, columns] (Kingma and Ba, arXiv 1412.6980)."""

    def __init__(self, matrices: list[Tensor], beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2, self.steps = beta1, beta2, 0
        self.first = [torch.zeros_like(m) for m in matrices]
        self.second = [torch.zeros_like(m) for m in matrices]

    def updates(self, gradients: list[Tensor]) -> list[Tensor]:
        """The directions to subtract, of unit size, for this step's gradients."""
        self.steps += 1
        fix1, fix2 = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        found = []
        for g, m, v in zip(gradients, self.first, self.second, strict=True):
            m.lerp_(g, 1 - self.beta1)
            v.lerp_(g.square(), 1 - self.beta2)
            found.append((m / fix1) / ((v / fix2).sqrt() + EPSILON))
        return found


class Soap:
    """SOAP on a list of matrices [N, out, columns]; `every` steps between two refreshes of the bases."""

    def __init__(self, matrices: list[Tensor], beta: float = 0.95, every: int = 10) -> None:
        self.beta, self.every, self.steps = beta, every, 0
        self.first = [torch.zeros_like(m) for m in matrices]
        self.second = [torch.zeros_like(m) for m in matrices]
        self.left = [m.new_zeros(m.shape[0], m.shape[1], m.shape[1]) for m in matrices]
        self.right = [m.new_zeros(m.shape[0], m.shape[2], m.shape[2]) for m in matrices]
        self.left_basis: list[Tensor] = []
        self.right_basis: list[Tensor] = []

    def updates(self, gradients: list[Tensor]) -> list[Tensor]:
        """The directions to subtract, of unit size in the eigenbasis, for this step's gradients."""
        self.steps += 1
        for i, g in enumerate(gradients):
            self.left[i].lerp_(g @ g.transpose(1, 2), 1 - self.beta)
            self.right[i].lerp_(g.transpose(1, 2) @ g, 1 - self.beta)
        self._refresh()
        fix = 1 - self.beta**self.steps
        found = []
        for i, g in enumerate(gradients):
            q_left, q_right = self.left_basis[i], self.right_basis[i]
            rotated = q_left.transpose(1, 2) @ g @ q_right
            self.second[i].lerp_(rotated.square(), 1 - self.beta)
            self.first[i].lerp_(g, 1 - self.beta)
            momentum = q_left.transpose(1, 2) @ self.first[i] @ q_right
            step = (momentum / fix) / ((self.second[i] / fix).sqrt() + EPSILON)
            found.append(q_left @ step @ q_right.transpose(1, 2))
        return found

    def _refresh(self) -> None:
        """Eigenvectors at the first step, then one step of orthogonal iteration every `every` steps."""
        if self.steps == 1:
            self.left_basis = [_eigenvectors(m) for m in self.left]
            self.right_basis = [_eigenvectors(m) for m in self.right]
        elif self.steps % self.every == 0:
            self.left_basis = [torch.linalg.qr(m @ q)[0] for m, q in zip(self.left, self.left_basis, strict=True)]
            self.right_basis = [torch.linalg.qr(m @ q)[0] for m, q in zip(self.right, self.right_basis, strict=True)]


def _eigenvectors(m_NKK: Tensor) -> Tensor:
    """Of each matrix; of one that is not finite, for which the solver would fail for all, those of the identity.

    The student of such a one is not finite either, and stays so. In float64, as float32's solver fails, or returns
    NaN, for one in five matrices of low rank in which whole rows are zero, as those of neurons that are off.
    """
    eye_KK = torch.eye(m_NKK.shape[1], dtype=m_NKK.dtype, device=m_NKK.device)
    usable_NKK = torch.where(m_NKK.isfinite().all(2).all(1)[:, None, None], m_NKK, eye_KK)
    return torch.linalg.eigh(usable_NKK.double())[1].to(m_NKK.dtype)


OPTIMISERS: dict[str, Callable[[list[Tensor]], Adam | Soap]] = {"adam": Adam, "soap": Soap}


def warm_start(
    net: DenseNet,
    theta_NP: Tensor,
    x_QI: Tensor,
    y_QO: Tensor,
    generator: torch.Generator,
    optimiser: str = "soap",
    steps: int = 2000,
    learning_rate: float = 1e-2,
    batch: int = 256,
    deadline: float | None = None,
    history: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """theta[N, P] after `steps` minibatch steps in float32 from theta[N, P]; all students share the minibatches.

    The learning rate rises over 50 steps and then falls along a cosine to zero. `history(step, loss_N)` sees the
    minibatch losses every 100 steps. Stops early at `deadline` (`time.monotonic`).
    """
    matrices = [m.float().clone() for m in net.matrices(theta_NP)]
    rule = OPTIMISERS[optimiser](matrices)
    x, y = x_QI.float(), y_QO.float()
    for step in range(steps):
        rows = torch.randint(x.shape[0], (min(batch, x.shape[0]),), generator=generator)
        loss, gradients = net.loss_gradients(net.flatten(matrices), x[rows], y[rows])
        rate = learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for m, update in zip(matrices, rule.updates(gradients), strict=True):
            m.sub_(rate * update)
        if history is not None and (step % 100 == 0 or step == steps - 1):
            history(step, loss.double())
        if deadline is not None and time.monotonic() > deadline:
            break
    return net.flatten(matrices).double()
