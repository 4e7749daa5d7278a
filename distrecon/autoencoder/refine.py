"""Refinement: a few Adam steps on the latents alone, so that the decoded networks' outputs approach given targets.

It is distillation inside the latent space: no label and no weight of the original is used, only outputs on the
autoencoder's own query inputs. Steps are taken in the behavioural scale of the coder, where equal steps change the
outputs about equally, and in units of each latent's own root mean square, so that one learning rate serves every coder.

Legend: B models, P parameters, Q queries, C classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distrecon.autoencoder.losses import behavioral
from distrecon.nets import Architecture

LEARNING_RATE = 0.07
BETAS = (0.5, 0.9)  # short memories: at 10 steps, Adam's usual ones still push where the first gradients pointed
QUERIES = 128  # drawn anew from the autoencoder's at each step


def refine(
    arch: Architecture,
    decode: Callable[[Tensor], Tensor],
    z: Tensor,
    scale: Tensor,
    queries: Tensor,
    targets_BQC: Tensor,
    steps: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Latents [B, ...] after `steps` Adam steps on KL(targets || decoded).

    `decode` maps latents to weights [B, P], differentiably; `scale` is the coder's behavioural scale of the latents;
    targets are probabilities on the queries.
    """
    z, scale = z.detach(), scale.detach()
    rms = (z * scale).flatten(1).square().mean(1).sqrt().clamp_min(1e-12).view(-1, *[1] * (z.ndim - 1))
    unit, moved = rms / scale, torch.zeros_like(z)
    draw = torch.Generator().manual_seed(seed)
    log_targets_BQC = targets_BQC.clamp_min(1e-8).log()
    optimizer = torch.optim.Adam([moved.requires_grad_(True)], lr=learning_rate, betas=BETAS)
    with torch.enable_grad():
        for step in range(steps):
            chosen_Q = torch.randperm(len(queries), generator=draw)[:QUERIES].to(queries.device)
            theta_BP = decode(z + unit * moved)
            logits_BQC = arch.forward(theta_BP, queries[chosen_Q])
            loss = behavioral("distillation", logits_BQC, log_targets_BQC[:, chosen_Q], 1.0).sum()
            (moved.grad,) = torch.autograd.grad(loss, moved)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
    return z + unit * moved.detach()
