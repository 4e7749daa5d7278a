"""Symmetries of a network as data: reordering units is one gather over theta, scaling them is one multiply.

The units of a group may come in any order as long as everything that has the group has them in that order: the table of
an architecture says where that is. Aligning models to each other by these symmetries is in `matching.py`.
"""

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.nets.activations import activation
from distrecon.nets.architectures import Architecture, ChainArchitecture
from distrecon.nets.layers import Layer


def random_permutation(arch: Architecture, generator: torch.Generator | None = None, count: int = 1) -> list[Tensor]:
    """Per group, `count` uniformly random orders of its units: [count, units].

    Those of a group within another one are orders in each of its units, one after the other (see `Group`).
    """
    device = generator.device if generator is not None else None
    return [
        torch.rand(count, g.blocks, g.size, generator=generator, device=device).argsort(2).flatten(1)
        for g in arch.groups
    ]


def _permutation_index(arch: ChainArchitecture, permutation: list[Tensor]) -> Tensor:
    """`_gathered_index` of a chain, layer by layer: faster on the CPU."""
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
    """The gather [B, P] that applies a permutation: `permuted_BP = theta_BP.gather(1, index_BP)`.

    It is linear in the orders of all units and a zero, and few kernels on a GPU.
    """
    start_P, *pairs = _coefficients(arch, permutation[0].device)
    order_BU = torch.cat([*permutation, permutation[0].new_zeros(len(permutation[0]), 1)], dim=1)
    index_BP = torch.addcmul(start_P, order_BU[:, pairs[0]], pairs[1])
    for unit_P, step_P in zip(pairs[2::2], pairs[3::2], strict=True):
        index_BP.addcmul_(order_BU[:, unit_P], step_P)
    return index_BP


def _coefficients(arch: Architecture, device: torch.device) -> tuple[Tensor, ...]:
    """The table's `coefficients` on a device, brought there in one copy: start_P, then unit_P, step_P by turns."""
    if device not in arch._permutation_maps:
        start_P, pairs = arch.table.coefficients
        packed = torch.stack([start_P, *(tensor for pair in pairs for tensor in pair)])
        arch._permutation_maps[device] = packed.to(device, non_blocking=True).unbind()
    return arch._permutation_maps[device]


def permute(arch: Architecture, theta_BP: Tensor, permutation: list[Tensor]) -> Tensor:
    """Reorders the units of every model; one permutation may serve all models. The functions stay the same.

    `permutation` has for each of the architecture's groups the orders [B or 1, units] (`random_permutation`).
    """
    arch.check(theta_BP)
    if len(permutation) != len(arch.groups):
        raise UserError(
            f"{arch.name} has units of {len(arch.groups)} hidden layers or groups, the permutation has "
            f"{len(permutation)}"
        )
    if not permutation:
        return theta_BP
    orders = [order.to(theta_BP.device) for order in permutation]
    if isinstance(arch, ChainArchitecture) and theta_BP.device.type == "cpu":
        index_BP = _permutation_index(arch, orders)
    else:
        index_BP = _gathered_index(arch, orders)
    return theta_BP.gather(1, index_BP.expand(len(theta_BP), -1))


def rescale(arch: Architecture, theta_BP: Tensor, scales: list[Tensor]) -> Tensor:
    """Multiplies each hidden unit's incoming weights and bias by its scale and divides what reads it: [B, units] each.

    Function preserving for positive scales where the activation is positively homogeneous (relu, leaky_relu) and for
    signs where it is odd (tanh) and nothing is max-pooled; UserError otherwise, and for networks that are no chains.
    """
    if not isinstance(arch, ChainArchitecture):
        raise UserError(f"{arch.name}: rescaling units is known for chains of layers only")
    kind = activation(arch.activation).symmetry
    for layer, scale_BH in zip(arch.layers, scales, strict=False):
        if layer.pool > 1 and bool((scale_BH < 0).any()):
            raise UserError(f"{layer.name}: a sign does not pass through max pooling")
        positive = kind == "scaled" and bool((scale_BH > 0).all())
        signs = kind == "odd" and bool((scale_BH.abs() == 1).all())
        if not (positive or signs):
            raise UserError(f"{arch.activation} allows {_ALLOWED[kind]}")
    return scaled(arch, theta_BP, scales)


def scaled(arch: ChainArchitecture, theta_BP: Tensor, scales: list[Tensor]) -> Tensor:
    """`rescale` of every chain, whether or not the function stays the same."""
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


def sign_flips(arch: Architecture) -> list[bool]:
    """For each group of units, whether a unit's sign may flip: all its numbers change sign, the function does not.

    Those of sigmoid are so in the coordinates of `centred` and not before zero padding, which stands for another value
    than the function's middle; none passes through max pooling.
    """
    if not isinstance(arch, ChainArchitecture):
        return [False] * len(arch.groups)
    kind = activation(arch.activation).symmetry
    return [
        layer.pool == 1 and (kind == "odd" or (kind == "odd_constant" and not after.padding))
        for layer, after in zip(arch.layers, arch.layers[1:], strict=False)
    ]


def centred(arch: Architecture, theta_BP: Tensor, back: bool = False) -> Tensor:
    """Weights in which a sigmoid counts from its middle, f - 1/2, an odd function; others as they are.

    Each bias takes up half of the weights that read units whose signs may flip; `back` is the inverse.
    """
    if not isinstance(arch, ChainArchitecture) or activation(arch.activation).symmetry != "odd_constant":
        return theta_BP
    theta_BP = theta_BP.clone()
    flips = sign_flips(arch)
    for i, (weight, bias_BO) in enumerate(arch.weights_and_biases(theta_BP)):
        if i and flips[i - 1]:
            bias_BO += (-0.5 if back else 0.5) * weight.flatten(2).sum(2)
    return theta_BP


BALANCING_SWEEPS, BALANCED = 1000, 1e-13  # at most; largest logarithm of a scale that counts as 1


def balanced(arch: Architecture, theta_BP: Tensor) -> Tensor:
    """Of all positive rescalings that keep the function, the one with the least norm; others as they are.

    There each unit's incoming weights and bias have the norm of the weights that read it. The squared norm is convex in
    the scales' logarithms, so that every rescaling leads to the same weights (Stock et al., Equi-normalization of
    neural networks, ICLR 2019). A unit that nothing reads, or that reads nothing, keeps its scale.
    """
    if not isinstance(arch, ChainArchitecture) or activation(arch.activation).symmetry != "scaled" or not arch.groups:
        return theta_BP
    layers = [(weight.double().flatten(2), bias.double()) for weight, bias in arch.weights_and_biases(theta_BP)]
    into = [weight_BOF.square().sum(2) + bias_BO.square() for weight_BOF, bias_BO in layers[:1]]
    biases = [bias_BO.square() for _, bias_BO in layers]
    below = [layer.out_features for layer in arch.layers[:-1]]
    between = [w.square().unflatten(2, (units, -1)).sum(3) for (w, _), units in zip(layers[1:], below, strict=True)]
    logs = [torch.zeros_like(bias_BO) for bias_BO in biases[:-1]]
    for _ in range(BALANCING_SWEEPS):
        largest = 0.0
        for i in range(len(logs)):
            if i:
                reading = (between[i - 1] * (-2 * logs[i - 1])[:, None, :].exp()).sum(2)
                incoming_BH = reading + biases[i]
            else:
                incoming_BH = into[0]
            after_BO1 = (2 * logs[i + 1])[:, :, None].exp() if i + 1 < len(logs) else 1.0
            outgoing_BH = (between[i] * after_BO1).sum(1)
            found_BH = (outgoing_BH / incoming_BH).log() / 4
            found_BH = torch.where((incoming_BH > 0) & (outgoing_BH > 0), found_BH, logs[i])
            largest = max(largest, float((found_BH - logs[i]).abs().amax()))
            logs[i] = found_BH
        if largest < BALANCED:
            break
    return scaled(arch, theta_BP, [log_BH.exp() for log_BH in logs])


_ALLOWED = {
    "scaled": "positive scales only",
    "odd": "signs (+1, -1) only",
    "odd_constant": "no rescaling without moving a constant",
    "even_linear": "no rescaling without a linear skip",
    "none": "no rescaling",
}
