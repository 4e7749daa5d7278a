"""What a layer reads and how its sums change the outputs: the two sides of its Kronecker-factored Gauss-Newton matrix.

A layer's weights and biases are one matrix W [O, F] (`Table.matrices`), the bias its last column, which reads a
constant one. With a what the layer reads at one position of one input, and g the gradient of an output with respect to
the layer's sums there, the layer's block of the Gauss-Newton matrix is about the Kronecker product of (Martens and
Grosse 2015, K-FAC; Grosse and Martens 2016 for convolutions)

    A = mean of a a^T over inputs and positions   [F, F]
    S = mean over inputs of the sum of g g^T over positions and outputs   [O, O]

Legend: B models, P parameters, Q inputs, C classes, O a layer's outputs, F its fan-in and one, N places (inputs and
positions) at which it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrecon.nets import plain
from distrecon.nets.layers import Chain

PLACES = 4096  # at which a layer's second moment is taken: a sample of them, the same for all models
READ_NUMBERS = 60_000_000  # of all that the widest layer reads, held at once: 240 MB in float32


def models_at_once(chain: Chain, inputs: int) -> int:
    """So many that what the widest layer reads on so many inputs fits READ_NUMBERS."""
    positions = 1
    for size in chain.input_shape[1:]:
        positions *= size
    widest = max(layer.fan_in * (positions if layer.kernel else 1) for layer in chain.layers)
    return max(1, READ_NUMBERS // (inputs * widest))


def second_moment(columns: Tensor) -> Tensor:
    """A of what a layer reads, [B or 1, F - 1, N] -> [B or 1, F, F] in float64; at most PLACES places, seeded."""
    if columns.shape[2] > PLACES:
        order = torch.randperm(columns.shape[2], generator=torch.Generator().manual_seed(0))
        columns = columns[:, :, order[:PLACES].to(columns.device)]
    columns = F.pad(columns, (0, 0, 0, 1), value=1.0)
    return (columns @ columns.transpose(1, 2)).double() / columns.shape[2]


@torch.no_grad()
def layer_by_layer(chain: Chain, inputs: Tensor, choose: Callable[[int, Tensor], Tensor]) -> None:
    """Runs networks whose weights are chosen layer by layer, knowing what each layer reads below them.

    `choose(index, moment)` gets A [B or 1, F, F] of layer `index` on the inputs [Q, ...] and gives its matrix
    [B, O, F], the bias last.
    """
    hidden = plain.first_hidden(inputs)
    for i, layer in enumerate(chain.layers):
        columns, spatial = plain.read(layer, hidden)
        matrix_BOF = choose(i, second_moment(columns)).to(inputs.dtype)
        if i + 1 < len(chain.layers):
            sums = plain.weighted_sums(matrix_BOF[:, :, :-1], matrix_BOF[:, :, -1], columns)
            hidden = plain.pass_on(chain, i, sums.unflatten(2, (len(inputs), *spatial)))


@dataclass(frozen=True)
class Factors:
    """Of one layer, for each model: `inputs` A [B, F, F] and `outputs` S [B, O, O], float64; [B, D] where diagonal."""

    inputs: Tensor
    outputs: Tensor


def factors(chain: Chain, theta_BP: Tensor, inputs: Tensor, temperature: float = 1.0) -> list[Factors]:
    """Both factors of each layer, in the metric of a softmax at this temperature (up to 1 / temperature^2).

    The sum over outputs is exact: with p the softmax, over the columns of a factor of diag(p) - p p^T.
    """
    parts = [_factors(chain, part, inputs, temperature) for part in theta_BP.split(models_at_once(chain, len(inputs)))]
    return [
        Factors(torch.cat([a for a, _ in layer]), torch.cat([s for _, s in layer]))
        for layer in zip(*parts, strict=True)
    ]


@torch.enable_grad()
def _factors(chain: Chain, theta_BP: Tensor, inputs: Tensor, temperature: float) -> list[tuple[Tensor, Tensor]]:
    hidden, every_sums, moments = plain.first_hidden(inputs.to(theta_BP.dtype)), [], []
    for i, (weight, bias_BO) in enumerate(chain.weights_and_biases(theta_BP.detach())):
        columns, spatial = plain.read(chain.layers[i], hidden)
        moments.append(second_moment(columns.detach()).expand(len(theta_BP), -1, -1))
        sums = plain.weighted_sums(weight.flatten(2), bias_BO, columns)
        if i == 0:
            sums.requires_grad_(True)
        every_sums.append(sums)
        hidden = plain.pass_on(chain, i, sums.unflatten(2, (len(inputs), *spatial)))
    logits_BQC = hidden.transpose(1, 2)
    p_BQC = (logits_BQC.detach() / temperature).softmax(2)
    factor_BQC = p_BQC.sqrt() * (logits_BQC - (p_BQC * logits_BQC).sum(2, keepdim=True))
    squares = [theta_BP.new_zeros(len(s), s.shape[1], s.shape[1], dtype=torch.float64) for s in every_sums]
    for c in range(chain.num_outputs):
        last = c + 1 == chain.num_outputs
        grads = torch.autograd.grad(factor_BQC[:, :, c].sum(), every_sums, retain_graph=not last)
        for square_BOO, grad in zip(squares, grads, strict=True):
            square_BOO += (grad @ grad.transpose(1, 2)).double() / len(inputs)
    return list(zip(moments, squares, strict=True))
