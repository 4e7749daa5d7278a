"""Models' units brought into the order of a reference's: the weight matching of Git Re-Basin, for any table.

Coordinate descent over the groups (Ainsworth et al., ICLR 2023, algorithm 1), each an assignment; a group and those
that lie within it are assigned together: the best order within each pair of heads, then of the heads. The descent
starts from the given order and, where a network is more than a chain, also from orders found from the inputs upwards,
each by what is matched already: the better of the two is taken.

Where all symmetries are to be undone, weights are first brought to a scale of their own, units may change their signs,
and the descent of every chain starts from the inputs upwards, so that whichever of the weights with one function it is
given, it ends at the same.

Legend: B models, P parameters, X the numbers that belong to a unit, H outer units, D units within each.
"""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distrecon.nets.architectures import Architecture, ChainArchitecture
from distrecon.nets.symmetries import balanced, centred, sign_flips
from distrecon.nets.table import Axis, Entry, Table

SWEEPS = 10  # over the groups, at most: it ends when no assignment improves
SYMMETRIES = ("order", "all")  # that `align` undoes


def align(arch: Architecture, theta_BP: Tensor, reference_P: Tensor, symmetries: str = "order") -> Tensor:
    """Each model's units reordered towards the reference; a fixed point of group-wise assignment.

    The aligned squared distance to the reference never exceeds the given one. With `symmetries` "all", what else the
    activation of a chain of layers allows is undone too: signs of tanh and sigmoid, positive scales of relu and
    leaky_relu. All weights of one function that these symmetries make of each other are then aligned to the same.
    """
    arch.check(theta_BP)
    if not arch.groups or not len(theta_BP):
        return theta_BP.clone()
    reference_P = reference_P.to(theta_BP)
    if symmetries == "all" and isinstance(arch, ChainArchitecture):
        return _representative(arch, theta_BP, reference_P)
    swept_BP = _swept(arch.table, theta_BP, reference_P)
    if isinstance(arch, ChainArchitecture):
        return swept_BP
    other_BP = _swept(arch.table, _from_below(arch.table, theta_BP, reference_P), reference_P)
    nearer_B = (other_BP - reference_P).norm(dim=1) < (swept_BP - reference_P).norm(dim=1)
    return torch.where(nearer_B[:, None], other_BP, swept_BP)


def _representative(arch: ChainArchitecture, theta_BP: Tensor, reference_P: Tensor) -> Tensor:
    """Of the weights with each model's function those that the descent from the inputs upwards finds."""
    theta_BP, reference_P = centred(arch, balanced(arch, theta_BP)), centred(arch, reference_P[None])[0]
    flips = sign_flips(arch)
    started_BP = _from_below(arch.table, theta_BP, reference_P, flips)
    return centred(arch, _swept(arch.table, started_BP, reference_P, flips), back=True)


def _swept(table: Table, theta_BP: Tensor, reference_P: Tensor, flips: Sequence[bool] = ()) -> Tensor:
    """Coordinate descent from the models as they are; `flips` are the groups whose units may change their signs.

    A family is assigned again only where what it is assigned by has changed: an order of groups that share a tensor.
    """
    tensors = [tensor.clone() for tensor in table.tensors(theta_BP)]
    reference, squares_B = table.tensors(reference_P[None]), theta_BP.square().sum(1)
    families, everything = _families(table), set(range(len(table.groups)))
    touched = [sorted({e for group in members for e in table.entries_of(group)}) for members in families]
    twice = [_squared(table, members) for members in families]
    shares_FF = torch.tensor([[not {*a}.isdisjoint(b) for b in touched] for a in touched])
    shares_FF.diagonal().copy_(torch.tensor(twice))  # an order found is the best, unless it moved what found it
    stale_BF = torch.ones(len(theta_BP), len(families), dtype=torch.bool)
    for _ in range(SWEEPS):
        for f, members in enumerate(families):
            rows_b = stale_BF[:, f].nonzero()[:, 0]
            if not len(rows_b):
                continue
            stale_BF[rows_b, f] = False
            given = {e: _rows(tensors[e], rows_b) for e in touched[f]}
            orders, signs_bH, improved_b = _assigned(table, given, reference, members, everything, flips)
            if not improved_b.any():
                continue
            moved = {e: _reordered(table, e, given[e], orders) for e in touched[f]}
            if signs_bH is not None:
                moved = {e: _signed(table, e, moved[e], members[0], signs_bH) for e in touched[f]}
            if twice[f]:  # the assignment took the other axis of the same tensor as it was
                gain_b = sum(((moved[e] - given[e]) * reference[e]).flatten(1).sum(1) for e in touched[f])
                improved_b &= (gain_b > 1e-9 * squares_B[rows_b]).cpu()
            rows_b = rows_b[improved_b]
            for e in touched[f]:
                tensors[e][rows_b] = _rows(moved[e], improved_b.nonzero()[:, 0])
            stale_BF[rows_b] |= shares_FF[f]
        if not stale_BF.any():
            break
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


def _from_below(table: Table, theta_BP: Tensor, reference_P: Tensor, flips: Sequence[bool] = ()) -> Tensor:
    """Each group ordered by those tensors alone whose other groups are ordered already."""
    reference, known = table.tensors(reference_P[None]), set[int]()
    tensors = dict(enumerate(table.tensors(theta_BP)))
    for members in _families(table):
        orders, signs_BH, _ = _assigned(table, tensors, reference, members, known, flips)
        for e in {e for group in members for e in table.entries_of(group)}:
            tensors[e] = _reordered(table, e, tensors[e], orders)
            if signs_BH is not None:
                tensors[e] = _signed(table, e, tensors[e], members[0], signs_BH)
        known |= set(members)
    return torch.cat([tensors[e].flatten(1) for e in range(len(tensors))], dim=1)


def _rows(tensor: Tensor, rows_b: Tensor) -> Tensor:
    return tensor if len(rows_b) == len(tensor) else tensor[rows_b]


def _reordered(table: Table, number: int, t_BN: Tensor, orders: dict[int, Tensor]) -> Tensor:
    """One entry of every model with these groups in these orders [B, units]."""
    entry = table.entries[number]
    indices = [_along(table, axis, orders) for axis in entry.axes]
    if any(index_Bn is None for index_Bn in indices):
        return _gathered(table, entry, t_BN, orders)
    for a, index_Bn in enumerate(indices):
        if index_Bn is not None and len(index_Bn):
            index_Bn = index_Bn.to(t_BN.device)
            if len(t_BN) == 1:
                t_BN = t_BN.index_select(1 + a, index_Bn[0])
            else:
                shape = [len(t_BN), *[1] * a, -1, *[1] * (t_BN.ndim - a - 2)]
                t_BN = t_BN.gather(1 + a, index_Bn.view(shape).expand_as(t_BN))
    return t_BN


def _along(table: Table, axis: Axis, orders: dict[int, Tensor]) -> Tensor | None:
    """What each place of an axis reads, [B, n]; empty where nothing moves; None where that depends on other axes."""
    if not any(group in orders for segment in axis for group, _ in segment):
        return torch.empty(0)
    count, parts, start = len(next(iter(orders.values()))), [], 0
    for segment in axis:
        size = inner = prod(n for _, n in segment)
        index_Bn, units = torch.full((count, size), start), {}
        for group, n in segment:
            inner //= n
            unit_n = torch.arange(size) // inner % n
            if group is None or group not in orders:
                index_Bn += unit_n * inner
                continue
            units[group], of = unit_n, table.groups[group]
            if of.within is not None and of.within not in units:
                return None
            block_n = units[of.within] if of.within is not None else torch.zeros_like(unit_n)
            index_Bn += orders[group][:, block_n * of.size + unit_n] * inner
        parts.append(index_Bn)
        start += size
    return torch.cat(parts, dim=1)


def _gathered(table: Table, entry: Entry, t_BN: Tensor, orders: dict[int, Tensor]) -> Tensor:
    """`_reordered` for any entry, number by number."""
    count = len(t_BN)
    identity = [torch.arange(g.size).repeat(g.blocks).expand(count, -1) for g in table.groups]
    order_BU = torch.cat([orders.get(i, order) for i, order in enumerate(identity)], dim=1)
    index_BN = torch.arange(entry.size).expand(count, -1).clone()
    for group, unit_N, step_N in table.factors_of(entry):
        if group in orders:
            has_N = step_N > 0
            moved_Bn = order_BU[:, unit_N[has_N]] - torch.cat(identity, dim=1)[:, unit_N[has_N]]
            index_BN[:, has_N] += moved_Bn * step_N[has_N]
    return t_BN.flatten(1).gather(1, index_BN.to(t_BN.device)).view(t_BN.shape)


def _families(table: Table) -> list[list[int]]:
    """Each group that lies in no other, followed by those that lie within it."""
    return [
        [i, *(c for c, child in enumerate(table.groups) if child.within == i)]
        for i, group in enumerate(table.groups)
        if group.within is None
    ]


def _signed(table: Table, number: int, t_BN: Tensor, group: int, signs_BH: Tensor) -> Tensor:
    """One entry of every model with the units of a group at these signs, in every axis that has them."""
    for a, axis in enumerate(table.entries[number].axes):
        if not any(g == group for segment in axis for g, _ in segment):
            continue
        parts = []
        for segment in axis:
            size = inner = prod(n for _, n in segment)
            sign_Bn = signs_BH.new_ones(len(signs_BH), size)
            for g, n in segment:
                inner //= n
                if g == group:
                    sign_Bn = sign_Bn * signs_BH[:, torch.arange(size) // inner % n]
            parts.append(sign_Bn)
        sign_Bn = torch.cat(parts, dim=1).to(t_BN)
        t_BN = t_BN * sign_Bn.view(len(sign_Bn), *[1] * a, -1, *[1] * (t_BN.ndim - a - 2))
    return t_BN


def _assigned(
    table: Table,
    tensors: dict[int, Tensor],
    reference: list[Tensor],
    members: list[int],
    known: set[int],
    flips: Sequence[bool] = (),
) -> tuple[dict[int, Tensor], Tensor | None, Tensor]:
    """The best orders of a group and those within it, others staying; the signs of the reordered units of a group that
    may flip them (one that has none within it); which models they bring nearer.

    Of the models' tensors those that have one of these groups are read.
    """
    group, *children = members
    gain_BHH = _gains(table, tensors, reference, [group], children, known)[:, :, :, 0, 0].numpy()
    best: list[np.ndarray] = []
    stay_B = np.einsum("bhh->b", gain_BHH)
    scale_B = np.abs(gain_BHH).max((1, 2))
    for child in children:
        gain_BHHDD = _gains(table, tensors, reference, [group, child], [], known).numpy()
        stay_B = stay_B + np.einsum("bhhdd->b", gain_BHHDD)
        order, won_BHH = _each_assigned(gain_BHHDD)
        best.append(order)
        gain_BHH = gain_BHH + won_BHH
        scale_B = np.maximum(scale_B, np.abs(gain_BHHDD).max((1, 2, 3, 4)))
    signed_BHH = None
    if flips and flips[group]:
        signed_BHH, gain_BHH = gain_BHH, np.abs(gain_BHH)
    order_BH = np.stack([linear_sum_assignment(gain, maximize=True)[1] for gain in gain_BHH])
    matched_B = np.take_along_axis(gain_BHH, order_BH[:, :, None], 2).sum((1, 2))
    inner = [np.take_along_axis(o, order_BH[:, :, None, None], 2)[:, :, 0] for o in best]  # of [B, H, H, D]: [B, H, D]
    improved_B = torch.from_numpy(matched_B > stay_B + 1e-9 * scale_B)
    signs_BH = None
    if signed_BHH is not None:
        signs_BH = torch.from_numpy(
            np.where(np.take_along_axis(signed_BHH, order_BH[:, :, None], 2)[:, :, 0] < 0, -1.0, 1.0)
        )
    found = [order_BH, *(order.reshape(len(order), -1) for order in inner)]
    return {g: torch.from_numpy(order) for g, order in zip(members, found, strict=True)}, signs_BH, improved_B


def _each_assigned(gain_BHHDD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best order within each pair of outer units [B, H, H, D], and what it gains [B, H, H]."""
    orders = np.empty(gain_BHHDD.shape[:4], np.int64)
    for at in np.ndindex(gain_BHHDD.shape[:3]):
        orders[at] = linear_sum_assignment(gain_BHHDD[at], maximize=True)[1]
    return orders, np.take_along_axis(gain_BHHDD, orders[..., None], 4).sum((3, 4))


def _gains(
    table: Table,
    tensors: dict[int, Tensor],
    reference: list[Tensor],
    groups: list[int],
    without: list[int],
    known: set[int],
) -> Tensor:
    """Inner product [B, H, H, D, D] won by putting each model's unit (h', d') where the reference has unit (h, d).

    Of the tensors that have all of `groups` (D is 1 for a single one), none of `without`, and no others but known ones.
    """
    sizes = [table.groups[g].size for g in groups] + [1] * (2 - len(groups))
    count = len(next(iter(tensors.values())))
    gain = torch.zeros(count, sizes[0], sizes[0], sizes[1], sizes[1], dtype=torch.float64)
    for number in table.entries_of(groups[-1]):
        entry, present = table.entries[number], table.groups_of(number)
        if present & set(without) or not present <= {*known, *groups}:
            continue
        for places in _occurrences(entry, groups):
            a_HDX, b_BHDX = (_units_first(t, entry, places, sizes) for t in (reference[number], tensors[number]))
            gain += torch.einsum("hdx,bkex->bhkde", a_HDX[0], b_BHDX).double().cpu()
    return gain


def _occurrences(entry: Entry, groups: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Where an entry has the innermost of the groups, as (axis, segment, factor), each with where the outer one is."""
    found = {
        g: [
            (a, s, f)
            for a, axis in enumerate(entry.axes)
            for s, segment in enumerate(axis)
            for f, (group, _) in enumerate(segment)
            if group == g
        ]
        for g in groups
    }
    for place in found[groups[-1]]:
        if len(groups) == 1:
            yield [place]
        else:  # in the same segment, or the one place in another axis
            outer = [p for p in found[groups[0]] if p[:2] == place[:2]]
            outer = outer or [p for p in found[groups[0]] if p[0] != place[0]]
            yield [outer[0], place]


def _units_first(t_BN: Tensor, entry: Entry, places: list[tuple[int, int, int]], sizes: list[int]) -> Tensor:
    """The segments of these places, as [B, H, D, X] with the groups' units first."""
    segments = {a: entry.axes[a][s] for a, s, _ in places}
    for a, s, _ in places:
        start = sum(prod(n for _, n in segment) for segment in entry.axes[a][:s])
        length = prod(n for _, n in segments[a])
        if t_BN.shape[1 + a] != length:
            t_BN = t_BN.narrow(1 + a, start, length)
    shape: list[int] = [len(t_BN)]
    at: dict[tuple[int, int], int] = {}  # (axis, factor) -> dimension
    for a, n in enumerate(entry.shape):
        factors = [size for _, size in segments[a]] if a in segments else [n]
        at |= {(a, f): len(shape) + f for f in range(len(factors))}
        shape += factors
    dims = [at[a, f] for a, _, f in places]
    moved = t_BN.reshape(shape).movedim(dims, list(range(1, 1 + len(dims))))
    return moved.reshape(len(t_BN), sizes[0], sizes[1], -1)


def _squared(table: Table, members: list[int]) -> bool:
    """Whether a tensor has such groups in two of its axes."""
    return any(
        sum(any(g in members for segment in axis for g, _ in segment) for axis in entry.axes) > 1
        for entry in table.entries
    )
