"""Outputs, accuracies and losses of many models on one labelled set, in chunks of bounded memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.nets.architectures import Architecture
from distrecon.nets.fit import cross_entropy

CHUNK_NUMBERS = 60_000_000  # intermediate numbers held at once by `forward.plain`: 240 MB in float32; fewer elsewhere


def _models_per_chunk(arch: Architecture, queries: int) -> int:
    """How many models' widest intermediate fits CHUNK_NUMBERS: bounded by positions x fan-in of any layer."""
    positions = 1
    for size in arch.input_shape[1:]:
        positions *= size
    widest = max(positions * layer.fan_in if layer.kernel else layer.fan_in for layer in arch.layers)
    return max(1, CHUNK_NUMBERS // (queries * widest))


@torch.no_grad()
def outputs(arch: Architecture, theta_BP: Tensor, inputs: Tensor) -> Tensor:
    """logits[B, Q, C], without gradients."""
    chunks = theta_BP.split(_models_per_chunk(arch, len(inputs)))
    return torch.cat([arch.forward(chunk, inputs) for chunk in chunks])


@dataclass(frozen=True)
class Scores:
    """Per-model results on a labelled set."""

    accuracy_B: Tensor
    loss_B: Tensor
    predictions_BQ: Tensor


@torch.no_grad()
def evaluate(arch: Architecture, theta_BP: Tensor, inputs: Tensor, labels_Q: Tensor) -> Scores:
    """Accuracy (share of inputs) and mean cross-entropy (nats) of each model."""
    accuracy, loss, predictions = [], [], []
    for chunk in theta_BP.split(_models_per_chunk(arch, len(inputs))):
        logits_BQC = arch.forward(chunk, inputs)
        predictions.append(logits_BQC.transpose(1, 2).max(1).indices)  # as laid out: argmax(2) takes four times as long
        accuracy.append((predictions[-1] == labels_Q).float().mean(1))
        loss.append(cross_entropy(logits_BQC, labels_Q))
    return Scores(torch.cat(accuracy), torch.cat(loss), torch.cat(predictions))
