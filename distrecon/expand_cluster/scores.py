"""How near a recovered network is to a known teacher, once the symmetries of both are taken out.

Layer by layer the recovered neurons are matched to the teacher's (assignment of least cosine distance between the
incoming weights) and permuted, sign-flipped and rescaled as the activation allows; the distances are then those of the
incoming [w, b] and of the outgoing weights. Metric names are those of summary.json.

Legend: Q queries, I inputs, H hidden neurons (T the teacher's), O outputs, K incoming coordinates.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.result import Recovery, relative_rmse
from distrecon.expand_cluster.thresholds import FOUND
from distrecon.expand_cluster.weights import Weights, network
from distrecon.nets.activations import activation as find_activation


def cosine_distances(a_NK: Tensor, b_MK: Tensor) -> Tensor:
    """1 - cosine of every pair, [N, M], exact near zero: half the squared distance of the unit vectors."""
    a, b = (torch.nn.functional.normalize(v, dim=1, eps=1e-300) for v in (a_NK, b_MK))
    return torch.stack([(row - b).square().sum(1) / 2 for row in a])


def score(recovery: Recovery, teacher_weights: Weights, inputs_QI: Tensor | None = None) -> dict[str, Any]:
    """Metrics of a recovery against the teacher's true weights [(W, b), ...]; with inputs also RMSE and agreement.

    Channels of convolutions are neurons, whose incoming weights are their kernels. Of convolutional networks RMSE and
    agreement are not computed.

    Raises UserError when the two networks differ in depth, inputs or outputs.
    """
    if len(teacher_weights) != len(recovery.weights):
        raise UserError(f"the teacher has {len(teacher_weights)} layers, the recovered network {len(recovery.weights)}")
    truth = [(w.double().flatten(1), b.double()) for w, b in teacher_weights]
    found = [(w.flatten(1).clone(), b.clone()) for w, b in recovery.weights]
    ends = [(n[0][0].shape[1], len(n[-1][1])) for n in (truth, found)]
    if ends[0] != ends[1]:
        raise UserError(f"the teacher has (inputs, outputs) {ends[0]}, the recovered network {ends[1]}")
    metrics: dict[str, Any] = {"recover/layer_sizes": recovery.layer_sizes}
    distances: list[Tensor] = []
    missing = excess = 0
    for layer in range(len(truth) - 1):
        size, true_size = len(found[layer][1]), len(truth[layer][1])
        pair_distances = _align(found, truth, layer, recovery.activation)
        distances.append(pair_distances)
        good = int((pair_distances < FOUND).sum())
        missing, excess = missing + true_size - good, excess + size - good
        metrics[f"recover/size_layer{layer + 1}"] = size
        metrics[f"recover/size_overhead_layer{layer + 1}"] = size / true_size - 1
    flat = torch.cat(distances)
    metrics |= {
        "recover/size_overhead": sum(recovery.layer_sizes) / sum(len(b) for _, b in truth[:-1]) - 1,
        "recover/max_cosine_distance": float(flat.max()),
        "recover/mean_cosine_distance": float(flat.mean()),
        "recover/missing": missing,
        "recover/excess": excess,
    }
    if inputs_QI is not None and recovery.hypothesis is None:
        metrics |= compare(recovery, network(truth, recovery.activation)(inputs_QI), inputs_QI)
    return metrics


def first_layers(recovery: Recovery, teacher_weights: Weights) -> tuple[Tensor, Tensor]:
    """The first hidden layer's weights [N, I] of the recovery, in the teacher's signs and scales, and the teacher's.

    Neuron by neuron as matched, in the teacher's order; those without a partner are left out.
    """
    truth = [(w.double(), b.double()) for w, b in teacher_weights]
    found = [(w.clone(), b.clone()) for w, b in recovery.weights]
    (w_true, b_true), (w, b) = truth[0], found[0]
    into_TK, into_HK = torch.cat([w_true, b_true[:, None]], 1), torch.cat([w, b[:, None]], 1)
    rows, columns, _, sign = _match(into_TK, into_HK, recovery.activation)
    return (sign[:, None] * into_HK[columns])[:, :-1], w_true[rows]


def compare(recovery: Recovery, answers_QO: Tensor, inputs_QI: Tensor) -> dict[str, Any]:
    """Relative RMSE and argmax agreement with the teacher's answers to the given inputs."""
    outputs_QO = recovery(inputs_QI)
    metrics = {"recover/output_rmse": relative_rmse(answers_QO, outputs_QO)}
    if answers_QO.shape[1] > 1:
        metrics["recover/agreement"] = float((outputs_QO.argmax(1) == answers_QO.argmax(1)).double().mean())
    return metrics


def _align(found: Weights, truth: Weights, layer: int, name: str) -> Tensor:
    """Bring layer `layer` of `found` into the teacher's order, signs and scales (in place: its weights and the next).

    Returns the larger of the two cosine distances, incoming and outgoing, of every matched pair. The layers before are
    aligned already, so incoming weights are compared column by column.
    """
    (w_true, b_true), (next_true, _) = truth[layer], truth[layer + 1]
    (w, b), (w_next, b_next) = found[layer], found[layer + 1]
    next_true, w_next = next_true.unflatten(1, (len(b_true), -1)), w_next.unflatten(1, (len(b), -1))  # [out, H, each]
    into_TK, into_HK = torch.cat([w_true, b_true[:, None]], 1), torch.cat([w, b[:, None]], 1)
    row_T, column_T, flips, sign = _match(into_TK, into_HK, name)
    if find_activation(name).symmetry == "odd_constant":  # f(u) = 1 - f(-u): what the flipped neurons gave at once
        b_next = b_next + w_next.sum(2)[:, column_T] @ flips.double()  # moves to the next bias
    incoming, outgoing = sign[:, None] * into_HK[column_T], w_next[:, column_T] / sign[:, None]
    found[layer] = incoming[:, :-1], incoming[:, -1]
    placed = w_next.new_zeros(len(w_next), len(b_true), w_next.shape[2])  # a missing neuron leaves a zero column
    placed[:, row_T] = outgoing
    if layer + 2 < len(truth):
        found[layer + 1] = placed.flatten(1), b_next
        return cosine_distances(into_TK[row_T], incoming).diagonal()
    into = cosine_distances(into_TK[row_T], incoming).diagonal()
    out = cosine_distances(*(w[:, row_T].transpose(0, 1).flatten(1) for w in (next_true, placed))).diagonal()
    return torch.maximum(into, out)


def _match(into_TK: Tensor, into_HK: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns of the assignment of least cosine distance, and the signs (or scales) of the found neurons;
    `flips` says which signs are negative."""
    symmetry = find_activation(name).symmetry
    plain = cosine_distances(into_TK, into_HK)
    flipped = cosine_distances(into_TK, -into_HK) if symmetry in ("odd", "odd_constant") else torch.full_like(plain, 3)
    rows, columns = linear_sum_assignment(torch.minimum(plain, flipped).numpy())
    row_T, column_T = torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(columns))
    flips = flipped[row_T, column_T] < plain[row_T, column_T]
    sign = torch.where(flips, -1.0, 1.0).double()
    if symmetry == "scaled":
        sign = into_TK[row_T].norm(dim=1) / into_HK[column_T].norm(dim=1).clamp(min=1e-300)  # nothing found: all zeros
    return row_T, column_T, flips, sign
