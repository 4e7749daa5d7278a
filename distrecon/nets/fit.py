"""Fits theta[B, P] to targets: B models at once, each with its own hyper-parameters, in one batched program.

The gradients of different models never mix, so the sum of their losses is differentiated once. All models of a call see
the same batches in the same order; their initial weights and hyper-parameters differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.errors import UserError, nearest
from distrecon.nets.architectures import Architecture


def cross_entropy(logits_BQC: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each model [B]; labels [Q] of classes, or class probabilities [Q, C] or [B, Q, C]."""
    log_probabilities_BCQ = F.log_softmax(logits_BQC.transpose(1, 2), dim=1)  # as the forward pass lays them out
    if labels.dtype == torch.long:
        labels = labels.expand(len(logits_BQC), -1)
        return -log_probabilities_BCQ.gather(1, labels[:, None]).mean((1, 2))
    return -(labels.transpose(-1, -2) * log_probabilities_BCQ).sum(1).mean(1)


class Adam:
    """torch.optim.Adam over rows, with a learning rate and a (coupled) weight decay per model [B]."""

    def __init__(self, theta_BP: Tensor, lr_B: Tensor, weight_decay_B: Tensor) -> None:
        self.lr_B1, self.weight_decay_B1 = lr_B[:, None], weight_decay_B[:, None]
        self.mean_BP, self.square_BP, self.steps = torch.zeros_like(theta_BP), torch.zeros_like(theta_BP), 0
        # written anew at every step: fresh memory of this size would cost more than the arithmetic
        self.gradient_BP, self.root_BP = torch.empty_like(theta_BP), torch.empty_like(theta_BP)

    def step(self, theta_BP: Tensor, grad_BP: Tensor) -> None:
        """Updates theta in place."""
        self.steps += 1
        grad_BP = torch.addcmul(grad_BP, self.weight_decay_B1, theta_BP, out=self.gradient_BP)
        self.mean_BP.lerp_(grad_BP, 0.1)
        self.square_BP.mul_(0.999).addcmul_(grad_BP, grad_BP, value=0.001)
        corrected_BP = torch.sqrt(self.square_BP, out=self.root_BP).mul_((1 - 0.999**self.steps) ** -0.5).add_(1e-8)
        update_BP = torch.mul(self.mean_BP, -self.lr_B1 / (1 - 0.9**self.steps), out=self.gradient_BP)
        theta_BP.addcdiv_(update_BP, corrected_BP)


class SGD:
    """Gradient descent with momentum .9 over rows, with a learning rate and a weight decay per model [B]."""

    def __init__(self, theta_BP: Tensor, lr_B: Tensor, weight_decay_B: Tensor) -> None:
        self.lr_B1, self.weight_decay_B1 = lr_B[:, None], weight_decay_B[:, None]
        self.velocity_BP = torch.zeros_like(theta_BP)

    def step(self, theta_BP: Tensor, grad_BP: Tensor) -> None:
        """Updates theta in place."""
        self.velocity_BP.mul_(0.9).add_(grad_BP + self.weight_decay_B1 * theta_BP)
        theta_BP.sub_(self.lr_B1 * self.velocity_BP)


OPTIMIZERS: dict[str, Callable[[Tensor, Tensor, Tensor], Adam | SGD]] = {"adam": Adam, "sgd": SGD}


@dataclass(frozen=True)
class Epoch:
    """What `fit` yields after each pass over the data; `theta_BP` is the live tensor, clone it to keep it."""

    epoch: int
    theta_BP: Tensor
    loss_B: Tensor  # mean training loss over the pass, before each update


def fit(
    arch: Architecture,
    theta_BP: Tensor,
    inputs: Tensor,
    labels_Q: Tensor,
    *,
    epochs: int,
    lr_B: Tensor,
    weight_decay_B: Tensor | None = None,
    batch_size: int = 32,
    optimizer: str = "adam",
    seed: int = 0,
) -> Iterator[Epoch]:
    """Trains B models on labelled inputs [Q, ...] by cross-entropy and yields after every epoch.

    A model that diverges keeps its non-finite weights; the caller sees them and decides.
    """
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}{nearest(optimizer, OPTIMIZERS)}")
    theta_BP = theta_BP.clone()
    if weight_decay_B is None:
        weight_decay_B = torch.zeros(len(theta_BP))
    update = OPTIMIZERS[optimizer](theta_BP, lr_B.to(theta_BP), weight_decay_B.to(theta_BP))
    order = torch.Generator().manual_seed(seed)
    statistics = arch.table.places(("mean", "variance"))
    if arch.has_statistics:
        statistics = statistics.to(theta_BP.device)
    for epoch in range(1, epochs + 1):
        total_B = theta_BP.new_zeros(len(theta_BP))
        for batch in torch.randperm(len(inputs), generator=order).to(inputs.device).split(batch_size):
            theta_BP.requires_grad_(True)
            logits_BQC, after_BP = arch.train_step(theta_BP, inputs[batch])
            loss_B = cross_entropy(logits_BQC, labels_Q[batch])
            (grad_BP,) = torch.autograd.grad(loss_B.sum(), theta_BP)
            theta_BP.requires_grad_(False)
            total_B += loss_B.detach() * len(batch)
            update.step(theta_BP, grad_BP)
            if after_BP is not None:  # statistics follow the batches, not gradients
                theta_BP[:, statistics] = after_BP[:, statistics]
        yield Epoch(epoch, theta_BP, total_B / len(inputs))
