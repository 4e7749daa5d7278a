"""Refinement: a few Adam steps on the latents alone, so that the decoded networks' outputs approach given targets.

It is distillation inside the latent space: no label and no weight of the original is used, only outputs on the
autoencoder's own query inputs. Steps are taken in the behavioural scale of the coder, where equal steps change the
outputs about equally, and in units of each latent's own root mean square, so that one learning rate serves every coder.

Legend: B models, Q queries, C classes.
"""

import math

import torch
from torch import Tensor

from distrecon.autoencoder.losses import behavioral
from distrecon.autoencoder.model import Autoencoder
from distrecon.nets import outputs

LEARNING_RATE = 0.07
BETAS = (0.5, 0.9)  # short memories: at 10 steps, Adam's usual ones still push where the first gradients pointed
QUERIES = 128  # drawn anew from the autoencoder's at each step
CHUNK = 128  # models refined at once


def refine_to_originals(autoencoder: Autoencoder, z: Tensor, theta_BP: Tensor, steps: int, zoo: int) -> Tensor:
    """Latents after `steps` steps towards the outputs of the models theta[B, P]."""
    arch, queries = autoencoder.architectures[zoo], autoencoder.fitted(zoo, "queries")
    chunks = [
        refine(autoencoder, z_part, outputs(arch, theta_part, queries).softmax(2), steps, zoo)
        for z_part, theta_part in zip(z.split(CHUNK), theta_BP.split(CHUNK), strict=True)
    ]
    return torch.cat(chunks) if chunks else z


def refine(
    autoencoder: Autoencoder,
    z: Tensor,
    targets_BQC: Tensor,
    steps: int,
    zoo: int,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Latents after `steps` Adam steps on KL(targets || decoded); targets are probabilities on the stored queries."""
    arch, queries = autoencoder.architectures[zoo], autoencoder.fitted(zoo, "queries")
    z = z.detach()
    scale = autoencoder.coder.behavioral_scale(zoo).detach()  # type: ignore[operator]
    rms = (z * scale).flatten(1).square().mean(1).sqrt().clamp_min(1e-12).view(-1, *[1] * (z.ndim - 1))
    unit, moved = rms / scale, torch.zeros_like(z)
    draw = torch.Generator().manual_seed(seed)
    log_targets_BQC = targets_BQC.clamp_min(1e-8).log()
    optimizer = torch.optim.Adam([moved.requires_grad_(True)], lr=learning_rate, betas=BETAS)
    with torch.enable_grad():
        for step in range(steps):
            chosen_Q = torch.randperm(len(queries), generator=draw)[:QUERIES].to(queries.device)
            theta_BP = autoencoder.decode(z + unit * moved, zoo=zoo)
            logits_BQC = arch.forward(theta_BP, queries[chosen_Q])
            loss = behavioral("distillation", logits_BQC, log_targets_BQC[:, chosen_Q], 1.0).sum()
            (moved.grad,) = torch.autograd.grad(loss, moved)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
    return z + unit * moved.detach()
