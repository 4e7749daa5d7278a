"""Channels of a convolutional network: dropped, and what each is worth.

Legend: Q queries, O outputs, C channels, K numbers that a channel reads, F features, N rows of a design, P parameters.
"""

from dataclasses import replace

import torch
from torch import Tensor

from distrecon.expand_cluster.convolution.network import ConvNet, Passed

ROWS = 6000  # of a design, at most: every place of a map at every query is one
SINGULAR = 1e-15  # of the largest singular value: smaller ones are rounding, so that coinciding channels cost nothing


def without(net: ConvNet, theta_P: Tensor, layer: int, channel: int) -> tuple[ConvNet, Tensor]:
    """The network without a channel of one of its hidden layers, and its parameters."""
    matrices = net.matrices(theta_P)
    kept_C = torch.arange(net.widths[layer]) != channel
    matrices[layer] = matrices[layer][kept_C]
    if layer + 1 < len(matrices):
        m = matrices[layer + 1]
        weights = m[:, :-1].unflatten(1, (net.widths[layer], -1))[:, kept_C].flatten(1)
        matrices[layer + 1] = torch.cat([weights, m[:, -1:]], dim=1)
    widths = tuple(len(m) for m in matrices)
    return replace(net, widths=widths), net.flatten(matrices)


def read_by_next(net: ConvNet, passed: list[Passed], layer: int) -> Tensor:
    """What the next layer reads of a hidden layer, one row for every place of its map: [N, K], channel by channel."""
    if layer + 1 == len(passed):
        return passed[layer].after.flatten(1)
    return rows_of(passed[layer + 1].read_QKL)


def rows_of(values_QKL: Tensor) -> Tensor:
    """[Q, K, L] as rows [N, K], some of them where there are many."""
    rows_NK = values_QKL.transpose(1, 2).flatten(0, 1)
    return rows_NK[:: max(1, len(rows_NK) // ROWS)]


def drop_costs(read_NK: Tensor, coefficients_KO: Tensor, channels: int, each: int) -> Tensor:
    """Rise of the mean squared error [C] when the `each` columns of one channel are dropped and the rest solved again.

    read_NK may have further columns after the channels', such as one for a bias; the coefficients are those of all.
    """
    scale_K = read_NK.norm(dim=0).clamp(min=1e-300)
    _, values_K, right_KK = torch.linalg.svd(read_NK / scale_K, full_matrices=False)
    root_KK = right_KK / values_K.clamp(min=SINGULAR * float(values_K[0]))[:, None]
    scaled_KO = coefficients_KO * scale_K[:, None]
    costs = []
    for start in range(0, channels * each, each):
        block_KB, part_BO = root_KK[:, start : start + each], scaled_KO[start : start + each]
        inverse_BB = block_KB.T @ block_KB
        costs.append((part_BO * torch.linalg.lstsq(inverse_BB, part_BO, driver="gelsd").solution).sum())
    return torch.stack(costs) / (len(read_NK) * coefficients_KO.shape[1])
