"""Outputs, accuracies and losses of many models on one set of images, in chunks of bounded memory.

The images say where: models that lie elsewhere go there chunk by chunk, and what is found comes back to them.

Legend: B models, P parameters, Q images, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.architectures import CHUNK_NUMBERS, Architecture
from distrecon.nets.fit import cross_entropy

GPU_CHUNK_NUMBERS = 1 << 28  # of a GPU's chunk in its widest layer: 1 GiB in float32, and up to three times that in all


def inputs_for(arch: Architecture, images: Tensor, what: str = "images") -> Tensor:
    """Images [Q, ...] in the shape that the architecture reads; an mlp reads them flattened.

    Raises UserError that names both shapes when they do not fit.
    """
    if tuple(images.shape[1:]) == arch.input_shape:
        return images
    if len(arch.input_shape) == 1 and images[0].numel() == arch.input_shape[0]:
        return images.flatten(1)
    raise UserError(f"{what} have shape {tuple(images.shape[1:])}, {arch.name} reads {arch.input_shape}")


@torch.no_grad()
def outputs(arch: Architecture, theta_BP: Tensor, images: Tensor) -> Tensor:
    """logits[B, Q, C] on images as in `inputs_for`, without gradients."""
    chunks = [logits_bQC.to(theta_BP.device) for logits_bQC in _chunks(arch, theta_BP, images)]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


@dataclass(frozen=True)
class Scores:
    """Per-model results on a labelled set."""

    accuracy_B: Tensor
    loss_B: Tensor
    predictions_BQ: Tensor


@torch.no_grad()
def evaluate(arch: Architecture, theta_BP: Tensor, images: Tensor, labels_Q: Tensor) -> Scores:
    """Accuracy (share of images) and mean cross-entropy (nats) of each model, on images as in `inputs_for`."""
    accuracy, loss, predictions = [], [], []
    labels_Q = labels_Q.to(images.device)
    for logits_BQC in _chunks(arch, theta_BP, images):
        predictions.append(logits_BQC.transpose(1, 2).max(1).indices)  # as laid out: argmax(2) takes four times as long
        accuracy.append((predictions[-1] == labels_Q).float().mean(1))
        loss.append(cross_entropy(logits_BQC, labels_Q))
    return Scores(*(torch.cat(parts).to(theta_BP.device) for parts in (accuracy, loss, predictions)))


def _chunks(arch: Architecture, theta_BP: Tensor, images: Tensor) -> Iterator[Tensor]:
    """logits[b, Q, C] of some models after the other."""
    inputs = inputs_for(arch, images)
    if images.device.type == "cpu":
        models, count = models_per_chunk(arch, len(inputs)), len(inputs)
    else:
        models, count = gpu_chunk(arch, len(theta_BP), len(inputs))
    for theta_bP in theta_BP.split(models):
        theta_bP = theta_bP.to(images.device)
        parts = [arch.forward(theta_bP, part) for part in inputs.split(max(1, count))]
        yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def gpu_chunk(arch: Architecture, models: int, inputs: int) -> tuple[int, int]:
    """How many models and how many inputs at once keep logits and the widest layer within GPU_CHUNK_NUMBERS."""
    models = max(1, min(models, GPU_CHUNK_NUMBERS // (8 * max(1, inputs) * arch.num_outputs)))
    return models, max(1, min(inputs, GPU_CHUNK_NUMBERS // (models * arch.widest_outputs)))


def models_per_chunk(arch: Architecture, inputs: int) -> int:
    """How many models' widest intermediate fits CHUNK_NUMBERS."""
    return max(1, CHUNK_NUMBERS // (inputs * arch.widest))
