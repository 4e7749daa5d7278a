"""Refinement: a few steps on the latents alone, so that the decoded networks' outputs approach given targets.

It is distillation inside the latent space: no label and no weight of the original is used, only outputs on the
autoencoder's own query inputs. Two ways, by the name that `tasks.refiner` gives them: Gauss-Newton steps (see
`gauss_newton.py`), few and sure, and Adam's, many and cheap. Whatever the coder, no model is worse off on the queries
than before.

Legend: B models, Q queries, C classes.
"""

import math

import torch
from torch import Tensor

from distrecon.autoencoder.gauss_newton import gauss_newton
from distrecon.autoencoder.goal import Goal
from distrecon.autoencoder.losses import behavioral

REFINERS = ("gauss_newton", "adam")
LEARNING_RATE = 0.07
BETAS = (0.5, 0.9)  # short memories: at 10 steps, Adam's usual ones still push where the first gradients pointed
QUERIES = 128  # drawn anew from the autoencoder's at each step


def refine(
    method: str, goal: Goal, z: Tensor, steps: int, seed: int = 0, learning_rate: float = LEARNING_RATE
) -> Tensor:
    """Latents [B, ...] after `steps` steps towards the goal; seed and learning rate are Adam's."""
    return gauss_newton(goal, z, steps) if method == "gauss_newton" else adam(goal, z, steps, seed, learning_rate)


def adam(goal: Goal, z: Tensor, steps: int, seed: int, learning_rate: float) -> Tensor:
    """Latents after `steps` Adam steps; those of models whose loss over all queries has risen stay as they were.

    Steps are taken in the behavioural scale of the coder, where equal steps change the outputs about equally, and in
    units of each latent's own root mean square, so that one learning rate serves every coder.
    """
    z, scale = z.detach(), goal.scale.detach()
    rms = (z * scale).flatten(1).square().mean(1).sqrt().clamp_min(1e-12).view(-1, *[1] * (z.ndim - 1))
    unit, moved = rms / scale, torch.zeros_like(z)
    draw = torch.Generator().manual_seed(seed)
    log_targets_BQC = goal.targets_BQC.clamp_min(1e-8).log()
    optimizer = torch.optim.Adam([moved.requires_grad_(True)], lr=learning_rate, betas=BETAS)
    with torch.enable_grad():
        for step in range(steps):
            chosen_Q = torch.randperm(len(goal.queries), generator=draw)[:QUERIES].to(goal.queries.device)
            logits_BQC = goal.arch.forward(goal.decode(z + unit * moved), goal.queries[chosen_Q])
            loss = behavioral("distillation", logits_BQC, log_targets_BQC[:, chosen_Q], 1.0).sum()
            (moved.grad,) = torch.autograd.grad(loss, moved)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
    after = z + unit * moved.detach()
    better_B = goal.loss(after) < goal.loss(z)
    return torch.where(better_B.view(-1, *[1] * (z.ndim - 1)), after, z)
