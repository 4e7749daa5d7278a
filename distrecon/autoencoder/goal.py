"""What refinement is given: a decoder, inputs, and the outputs that the decoded networks should have on them.

Legend: B models, P parameters, Q queries, C classes; latents z have any shape [B, ...].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.autoencoder.losses import behavioral
from distrecon.nets import Architecture


@dataclass(frozen=True)
class Goal:
    """`decode` maps latents to weights [B, P], differentiably; `move(z, change)` are the latents after a small change.

    `scale` is the coder's behavioural scale of the latents; targets are probabilities on the queries.
    """

    arch: Architecture
    decode: Callable[[Tensor], Tensor]
    move: Callable[[Tensor, Tensor], Tensor]
    scale: Tensor
    queries: Tensor
    targets_BQC: Tensor

    def first(self, count: int) -> "Goal":
        """The same with the first queries only."""
        few = self.queries[:count], self.targets_BQC[:, :count]
        return Goal(self.arch, self.decode, self.move, self.scale, *few)

    @torch.no_grad()
    def loss(self, z: Tensor) -> Tensor:
        """KL(targets || decoded) of each model [B], nats a query."""
        log_targets_BQC = self.targets_BQC.clamp_min(1e-8).log()
        return behavioral("distillation", self.arch.forward(self.decode(z), self.queries), log_targets_BQC, 1.0)
