"""Gauss-Newton steps on latents, matrix-free, with a loss that never rises.

A step minimises the second-order model of KL(targets || decoded) by conjugate gradients (Martens 2010; Schraudolph
2002), never forming a matrix: products with the networks' Jacobian are differences of outputs along a direction, those
with its transpose are ordinary gradients, so a step costs about 2 x `ITERATIONS` passes. Its damping follows Levenberg
and Marquardt. There are often fewer answers than latents, so the latents are held to where the encoder put them, by a
weight of the size of the mean curvature: without it, the networks agree ever better on the queries and worse elsewhere.
The queries are the same at every step; a step that does not lower the loss on them is shortened, and in the end left
out, model by model: whatever the coder, more steps never give a larger loss.

Legend: B models, P parameters, Q queries, C classes; latents z have any shape [B, ...].
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distrecon.autoencoder.goal import Goal

QUERIES = 512  # the first ones of the autoencoder's
ITERATIONS = 8  # of conjugate gradients in a step
ANCHOR = 1.0  # of the mean curvature: what it costs to leave the latents that the encoder gave
DAMPING = 0.03  # at first, of the mean curvature
HARDER, SOFTER = 3.0, 0.3  # what it is multiplied by after a step that had to be shortened, and after one that had not
SHORTER, TRIALS = 0.3, 4  # what a step that did not help is multiplied by, and how often it is tried
DIFFERENCE = 1e-3  # by which outputs are differentiated, relative to the weights' norm
TINY = 1e-30


def gauss_newton(goal: Goal, z: Tensor, steps: int) -> Tensor:
    """Latents [B, ...] after `steps` steps that lower the loss on the goal's first QUERIES queries."""
    goal, z = goal.first(QUERIES), z.detach()
    unit = (1 / goal.scale.detach()).expand(z.shape[1:])  # in the behavioural scale, damping is equal
    start, loss_B = z, goal.loss(z)
    damping_B, mean_curvature_B = torch.full_like(loss_B, DAMPING), torch.empty(0)
    for step in range(steps):
        with sdpa_kernel(SDPBackend.MATH):  # the others' gradients cannot be differentiated
            model = _Model(goal, z, unit)
            if step == 0:
                mean_curvature_B = model.mean_curvature()
            anchor_B = ANCHOR * mean_curvature_B
            change = unit * model.minimum((z - start) / unit, anchor_B, damping_B * mean_curvature_B)
        z, loss_B, length_B = _line_search(goal, z, change, loss_B)
        damping_B = damping_B * torch.where(length_B == 1, SOFTER, HARDER)
    return z


class _Model:
    """The second-order model of the loss at the latents z, in units of the behavioural scale."""

    def __init__(self, goal: Goal, z: Tensor, unit: Tensor) -> None:
        with torch.enable_grad():
            self.moved = torch.zeros_like(z, requires_grad=True)
            self.decoded_BP = goal.decode(z + unit * self.moved)
            self.theta_BP = self.decoded_BP.detach().requires_grad_(True)
            self.logits_BQC = goal.arch.forward(self.theta_BP, goal.queries)
            # a gradient is linear in what it starts from: differentiated by that, it gives the Jacobian itself
            self.cotangent_BP = torch.zeros_like(self.theta_BP, requires_grad=True)
            (self.pulled,) = torch.autograd.grad(
                self.decoded_BP, self.moved, self.cotangent_BP, create_graph=True, materialize_grads=True
            )
        self.goal, self.p_BQC = goal, self.logits_BQC.detach().softmax(2)

    def mean_curvature(self) -> Tensor:
        """[B], an estimate of the mean eigenvalue of the Gauss-Newton matrix from one random direction."""
        draw = torch.Generator().manual_seed(0)
        direction = torch.randn(self.moved.shape[1:], generator=draw).to(self.moved).expand_as(self.moved)
        return _dot(direction, self._curvature(direction)) / _dot(direction, direction)

    def minimum(self, moved: Tensor, anchor_B: Tensor, damping_B: Tensor) -> Tensor:
        """About the best further change after `moved`, with the loss plus anchor / 2 |moved + change|^2, damped."""
        gradient = self._pull((self.p_BQC - self.goal.targets_BQC) / len(self.goal.queries))
        residual = -(gradient + _per_model(anchor_B, moved) * moved)
        direction, found, size_B = residual, torch.zeros_like(residual), _dot(residual, residual)
        for _ in range(ITERATIONS):
            curved = self._curvature(direction) + _per_model(anchor_B + damping_B, direction) * direction
            length = _per_model(size_B / _dot(direction, curved).clamp_min(TINY), direction)
            found, residual = found + length * direction, residual - length * curved
            before_B, size_B = size_B, _dot(residual, residual)
            direction = residual + _per_model(size_B / before_B.clamp_min(TINY), direction) * direction
        return found

    def _curvature(self, direction: Tensor) -> Tensor:
        """The Gauss-Newton matrix J^T (diag(p) - p p^T) J of each model, times a direction."""
        (change_BP,) = torch.autograd.grad(
            self.pulled, self.cotangent_BP, direction, retain_graph=True, materialize_grads=True
        )
        size_B1 = self.theta_BP.detach().norm(dim=1, keepdim=True) * DIFFERENCE
        step_B1 = size_B1 / change_BP.norm(dim=1, keepdim=True).clamp_min(TINY)
        with torch.no_grad():
            beside_BQC = self.goal.arch.forward(self.theta_BP + step_B1 * change_BP, self.goal.queries)
        slope_BQC = (beside_BQC - self.logits_BQC.detach()) / step_B1[:, :, None]
        weighted_BQC = self.p_BQC * (slope_BQC - (self.p_BQC * slope_BQC).sum(2, keepdim=True))
        return self._pull(weighted_BQC / len(self.goal.queries))

    def _pull(self, cotangent_BQC: Tensor) -> Tensor:
        """The transposed Jacobian of the logits with respect to `moved`, times a cotangent."""
        (grad_BP,) = torch.autograd.grad(self.logits_BQC, self.theta_BP, cotangent_BQC, retain_graph=True)
        return torch.autograd.grad(self.decoded_BP, self.moved, grad_BP, retain_graph=True)[0]


@torch.no_grad()
def _line_search(goal: Goal, z: Tensor, change: Tensor, loss_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents after the longest tried part of the change that lowers each model's loss, that loss, and the part."""
    best, best_B, length_B = z, loss_B, torch.zeros_like(loss_B)
    share = 1.0
    for _ in range(TRIALS):
        tried = goal.move(z, share * change)
        tried_B = goal.loss(tried)
        better_B = (length_B == 0) & (tried_B < loss_B)
        best = torch.where(_per_model(better_B, z), tried, best)
        best_B, length_B = torch.where(better_B, tried_B, best_B), torch.where(better_B, share, length_B)
        if bool((length_B > 0).all()):
            break
        share *= SHORTER
    return best, best_B, length_B


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B]."""
    return (a * b).flatten(1).sum(1)


def _per_model(value_B: Tensor, like: Tensor) -> Tensor:
    return value_B.view(-1, *[1] * (like.ndim - 1))
