"""What is random in a step of the training: drawn for the global batch from (seed, epoch, step), then sliced.

Legend: B models of this worker, G of the global batch, P parameters, U hidden units.
"""

import numpy as np
import torch
from torch import Tensor

from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.nets import Architecture, permute, random_permutation
from distrecon.zoos.models import Batch


def generator(seed: int, epoch: int, step: int, stream: int) -> torch.Generator:
    """The random numbers of one purpose (`stream`) in one step, the same on every worker."""
    state = np.random.SeedSequence([seed, epoch, step, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def random_orders(config: AutoencoderConfig, arch: Architecture, batch: Batch) -> Tensor:
    """The orders of units of two views of this worker's models, [2, b, U], layer after layer; empty for other views."""
    if config.data.views != "permutation":
        return torch.empty(2, len(batch.row_b), 0, dtype=torch.long)
    draw = generator(config.seed, batch.epoch, batch.step, 0)
    orders = random_permutation(arch, draw, 2 * batch.global_size)
    order_2GU = torch.cat(orders, dim=1).unflatten(0, (2, batch.global_size))
    return order_2GU[:, batch.offset : batch.offset + len(batch.row_b)]


def views(
    config: AutoencoderConfig, arch: Architecture, theta_BP: Tensor, batch: Batch, std_P: Tensor, order_2BU: Tensor
) -> Tensor:
    """Two views of the same models, [2, B, P]; with `align` the first is they themselves; of `none`, [1, B, P]."""
    kind, b = config.data.views, slice(batch.offset, batch.offset + len(theta_BP))
    if kind == "none":
        return theta_BP[None]
    if kind == "noise":
        draw = generator(config.seed, batch.epoch, batch.step, 0)
        noise_GP = torch.randn(batch.global_size, arch.num_parameters, generator=draw)
        step_BP = config.data.noise * std_P * noise_GP[b].to(theta_BP, non_blocking=True)
        return torch.stack([theta_BP, arch.from_logarithms(arch.to_logarithms(theta_BP) + step_BP)])
    units = [group.units for group in arch.groups]
    if config.data.align:
        return torch.stack([theta_BP, permute(arch, theta_BP, list(order_2BU[1].split(units, dim=1)))])
    both_BP = permute(arch, torch.cat([theta_BP, theta_BP]), list(order_2BU.flatten(0, 1).split(units, dim=1)))
    return both_BP.view(2, *theta_BP.shape)
