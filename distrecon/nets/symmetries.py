"""Symmetries of a network as data: reordering hidden units is one gather over theta, scaling them is one multiply.

A hidden layer's units may come in any order as long as the next layer reads them in that order; with convolutions and
flattening, the units are channels and the next linear layer reads `positions` numbers of each. Alignment is the weight
matching of Git Re-Basin (Ainsworth et al., ICLR 2023, algorithm 1): coordinate descent over layers, each an assignment.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.activations import activation
from distrecon.nets.architectures import Architecture
from distrecon.nets.layers import Layer

SWEEPS = 10  # over the layers, at most, of `align`: it ends when no assignment improves


def random_permutation(arch: Architecture, generator: torch.Generator | None = None, count: int = 1) -> list[Tensor]:
    """Per hidden layer, `count` uniformly random orders of its units: [count, units]."""
    device = generator.device if generator is not None else None
    return [
        torch.rand(count, layer.out_features, generator=generator, device=device).argsort(1)
        for layer in arch.layers[:-1]
    ]


def _permutation_index(arch: Architecture, permutation: list[Tensor]) -> Tensor:
    """The gather [B, P] that applies a permutation: `permuted_BP = theta_BP.gather(1, index_BP)`."""
    if len(permutation) != len(arch.layers) - 1:
        raise UserError(f"{arch.name} has {len(arch.layers) - 1} hidden layers, the permutation has {len(permutation)}")
    count, device = len(permutation[0]), permutation[0].device
    parts = []
    inputs_BI: Tensor | None = None  # order in which the layer's inputs come
    for i, (layer, start) in enumerate(zip(arch.layers, arch.offsets, strict=False)):
        if i < len(permutation):
            rows_BO = permutation[i]
        else:
            rows_BO = torch.arange(layer.out_features, device=device).expand(count, -1)
        columns_BF = _input_columns(layer, inputs_BI, count, device)
        parts.append((start + rows_BO[:, :, None] * layer.fan_in + columns_BF[:, None, :]).flatten(1))
        parts.append(start + layer.out_features * layer.fan_in + rows_BO)
        inputs_BI = rows_BO
    return torch.cat(parts, dim=1)


def _input_columns(layer: Layer, inputs_BI: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Per model the order in which a layer's fan-in is read, given the order of the units below: [B, fan_in]."""
    if inputs_BI is None:
        return torch.arange(layer.fan_in, device=device).expand(count, -1)
    block = layer.fan_in // inputs_BI.shape[1]  # numbers read from each unit below: a kernel, or positions
    return (inputs_BI[:, :, None] * block + torch.arange(block, device=device)).flatten(1)


def _gathered_index(arch: Architecture, permutation: list[Tensor]) -> Tensor:
    """`_permutation_index` in few kernels, for GPUs: it is linear in the order of all hidden units and a zero."""
    start_P, own_P, step_P, read_P, block_P = _coefficients(arch, permutation[0].device)
    order_BU = torch.cat([*permutation, permutation[0].new_zeros(len(permutation[0]), 1)], dim=1)
    index_BP = torch.addcmul(start_P, order_BU[:, own_P], step_P)
    return index_BP.addcmul_(order_BU[:, read_P], block_P)


@lru_cache(maxsize=16)
def _coefficients(arch: Architecture, device: torch.device) -> tuple[Tensor, ...]:
    """start_P, and of the unit that a parameter belongs to, then of the one that it reads: its place, times what."""
    hidden = [layer.out_features for layer in arch.layers[:-1]]
    firsts, none = [sum(hidden[:i]) for i in range(len(hidden))], sum(hidden)
    parts: list[list[Tensor]] = [[], [], [], []]
    for i, layer in enumerate(arch.layers):
        out, fan_in = layer.out_features, layer.fan_in
        block = fan_in // hidden[i - 1] if i else 0
        read_F = firsts[i - 1] + torch.arange(fan_in) // block if i else torch.full((fan_in,), none)
        own_O = firsts[i] + torch.arange(out) if i < len(hidden) else torch.full((out,), none)
        moves = int(i < len(hidden))
        own = own_O[:, None].expand(out, fan_in)
        rows = (own, torch.full_like(own, fan_in * moves), read_F.expand(out, fan_in), torch.full_like(own, block))
        biases = (own_O, torch.full_like(own_O, moves), torch.full_like(own_O, none), torch.zeros_like(own_O))
        for part, weights, bias in zip(parts, rows, biases, strict=True):
            part += [weights.flatten(), bias]
    own_P, step_P, read_P, block_P = map(torch.cat, parts)
    identity_U = torch.cat([*map(torch.arange, hidden), torch.zeros(1, dtype=torch.long)])
    identity_P = torch.arange(arch.num_parameters)  # what the identity reads
    start_P = identity_P - identity_U[own_P] * step_P - identity_U[read_P] * block_P
    packed = torch.stack([start_P, own_P, step_P, read_P, block_P])
    return packed.to(device, non_blocking=True).unbind()


def permute(arch: Architecture, theta_BP: Tensor, permutation: list[Tensor]) -> Tensor:
    """Reorders the hidden units of every model; one permutation may serve all models. The functions stay the same."""
    arch.check(theta_BP)
    if not permutation:
        return theta_BP
    on_cpu = theta_BP.device.type == "cpu"
    index_BP = (_permutation_index if on_cpu else _gathered_index)(arch, [p.to(theta_BP.device) for p in permutation])
    return theta_BP.gather(1, index_BP.expand(len(theta_BP), -1))


def rescale(arch: Architecture, theta_BP: Tensor, scales: list[Tensor]) -> Tensor:
    """Multiplies each hidden unit's incoming weights and bias by its scale and divides what reads it: [B, units] each.

    Function preserving for positive scales where the activation is positively homogeneous (relu, leaky_relu) and for
    signs where it is odd (tanh) and nothing is max-pooled; UserError otherwise.
    """
    kind = activation(arch.activation).symmetry
    for layer, scale_BH in zip(arch.layers, scales, strict=False):
        if layer.pool > 1 and bool((scale_BH < 0).any()):
            raise UserError(f"{layer.name}: a sign does not pass through max pooling")
        positive = kind == "scaled" and bool((scale_BH > 0).all())
        signs = kind == "odd" and bool((scale_BH.abs() == 1).all())
        if not (positive or signs):
            raise UserError(f"{arch.activation} allows {_ALLOWED[kind]}")
    factors = []
    below_BF: Tensor | None = None
    for i, layer in enumerate(arch.layers):
        ones = theta_BP.new_ones(len(theta_BP), layer.out_features)
        own_BO = scales[i].to(theta_BP).expand_as(ones) if i < len(scales) else ones
        factor_BOF = own_BO[:, :, None].expand(-1, -1, layer.fan_in)
        if below_BF is not None:
            factor_BOF = factor_BOF / below_BF.repeat_interleave(layer.fan_in // below_BF.shape[1], 1)[:, None, :]
        factors += [factor_BOF.flatten(1), own_BO]
        below_BF = own_BO
    return theta_BP * torch.cat(factors, dim=1)


_ALLOWED = {
    "scaled": "positive scales only",
    "odd": "signs (+1, -1) only",
    "odd_constant": "no rescaling without moving a constant",
    "even_linear": "no rescaling without a linear skip",
    "none": "no rescaling",
}


def align(arch: Architecture, theta_BP: Tensor, reference_P: Tensor) -> Tensor:
    """Each model's hidden units reordered towards the reference; a fixed point of layer-wise assignment.

    The aligned squared distance to the reference never exceeds the given one.
    """
    arch.check(theta_BP)
    aligned_BP = theta_BP.clone()
    hidden = len(arch.layers) - 1
    active = torch.arange(len(theta_BP))
    reference = [(w[0], b[0]) for w, b in arch.weights_and_biases(reference_P[None].to(theta_BP))]
    for _ in range(SWEEPS):
        changed = torch.zeros(len(active), dtype=torch.bool)
        for i in range(hidden):
            gains_BHH = _match_gains(arch, aligned_BP[active], reference, i).double().cpu().numpy()
            orders = torch.stack([torch.from_numpy(linear_sum_assignment(g, maximize=True)[1]) for g in gains_BHH])
            identity = torch.arange(orders.shape[1])
            improved = _improves(gains_BHH, orders)
            orders[~improved] = identity
            changed |= improved
            permutation = [
                orders if j == i else torch.arange(layer.out_features).expand(len(active), -1)
                for j, layer in enumerate(arch.layers[:-1])
            ]
            aligned_BP[active] = permute(arch, aligned_BP[active], permutation)
        active = active[changed]
        if not len(active):
            break
    return aligned_BP


def _match_gains(arch: Architecture, theta_BP: Tensor, reference: list[tuple[Tensor, Tensor]], index: int) -> Tensor:
    """gain[B, h, k]: inner product won by putting each model's unit k where the reference has unit h."""
    weights = arch.weights_and_biases(theta_BP)
    (w_BOI, b_BO), (w_OI, b_O) = weights[index], reference[index]
    incoming = torch.einsum("hi,bki->bhk", w_OI.flatten(1), w_BOI.flatten(2)) + b_O[None, :, None] * b_BO[:, None, :]
    units = arch.layers[index].out_features
    above_BOHX = weights[index + 1][0].flatten(2).unflatten(2, (units, -1))
    above_OHX = reference[index + 1][0].flatten(1).unflatten(1, (units, -1))
    return incoming + torch.einsum("ohx,bokx->bhk", above_OHX, above_BOHX)


def _improves(gains_BHH: np.ndarray, orders_BH: Tensor) -> Tensor:
    """Which assignments beat leaving the units where they are, by more than rounding."""
    gains = torch.from_numpy(gains_BHH)
    matched = gains.gather(2, orders_BH[:, :, None]).sum((1, 2))
    stay = gains.diagonal(dim1=1, dim2=2).sum(1)
    return matched > stay + 1e-9 * gains.abs().amax((1, 2))
