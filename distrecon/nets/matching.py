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
from distrecon.nets.symmetries import balanced, centred, permute, scaled, sign_flips
from distrecon.nets.table import Entry, Table

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
    swept_BP = _swept(arch, theta_BP, reference_P)
    if isinstance(arch, ChainArchitecture):
        return swept_BP
    other_BP = _swept(arch, _from_below(arch, theta_BP, reference_P), reference_P)
    nearer_B = (other_BP - reference_P).norm(dim=1) < (swept_BP - reference_P).norm(dim=1)
    return torch.where(nearer_B[:, None], other_BP, swept_BP)


def _representative(arch: ChainArchitecture, theta_BP: Tensor, reference_P: Tensor) -> Tensor:
    """Of the weights with each model's function those that the descent from the inputs upwards finds."""
    theta_BP, reference_P = centred(arch, balanced(arch, theta_BP)), centred(arch, reference_P[None])[0]
    flips = sign_flips(arch)
    started_BP = _from_below(arch, theta_BP, reference_P, flips)
    return centred(arch, _swept(arch, started_BP, reference_P, flips), back=True)


def _swept(arch: Architecture, theta_BP: Tensor, reference_P: Tensor, flips: Sequence[bool] = ()) -> Tensor:
    """Coordinate descent from the models as they are; `flips` are the groups whose units may change their signs."""
    aligned_BP, active = theta_BP.clone(), torch.arange(len(theta_BP))
    reference = arch.table.tensors(reference_P[None])
    everything = set(range(len(arch.groups)))
    squared = [_squared(arch.table, members) for members in _families(arch.table)]
    for _ in range(SWEEPS):
        changed = torch.zeros(len(active), dtype=torch.bool)
        for members, twice in zip(_families(arch.table), squared, strict=True):
            orders, signs_BH, improved = _assigned(
                arch.table, aligned_BP[active], reference, members, everything, flips
            )
            moved_BP = _moved(arch, aligned_BP[active], members, orders, signs_BH, improved)
            if twice:  # the assignment took the other axis of the same tensor as it was
                gain_B = ((moved_BP - aligned_BP[active]) * reference_P).sum(1)
                improved &= (gain_B > 1e-9 * aligned_BP[active].square().sum(1)).cpu()
                moved_BP = torch.where(improved[:, None].to(moved_BP.device), moved_BP, aligned_BP[active])
            changed |= improved
            aligned_BP[active] = moved_BP
        active = active[changed]
        if not len(active):
            break
    return aligned_BP


def _from_below(arch: Architecture, theta_BP: Tensor, reference_P: Tensor, flips: Sequence[bool] = ()) -> Tensor:
    """Each group ordered by those tensors alone whose other groups are ordered already."""
    reference, known = arch.table.tensors(reference_P[None]), set[int]()
    everyone = torch.ones(len(theta_BP), dtype=torch.bool)
    for members in _families(arch.table):
        orders, signs_BH, _ = _assigned(arch.table, theta_BP, reference, members, known, flips)
        theta_BP = _moved(arch, theta_BP, members, orders, signs_BH, everyone)
        known |= set(members)
    return theta_BP


def _families(table: Table) -> list[list[int]]:
    """Each group that lies in no other, followed by those that lie within it."""
    return [
        [i, *(c for c, child in enumerate(table.groups) if child.within == i)]
        for i, group in enumerate(table.groups)
        if group.within is None
    ]


def _moved(
    arch: Architecture,
    theta_BP: Tensor,
    members: list[int],
    orders: list[Tensor],
    signs_BH: Tensor | None,
    chosen_B: Tensor,
) -> Tensor:
    """The chosen models with these groups in these orders, and the units of the first with these signs."""
    permutation = []
    for i, group in enumerate(arch.groups):
        identity = torch.arange(group.size).repeat(group.blocks).expand(len(theta_BP), -1)
        own = orders[members.index(i)] if i in members else identity
        permutation.append(torch.where(chosen_B[:, None], own, identity))
    moved_BP = permute(arch, theta_BP, permutation)
    if signs_BH is None:
        return moved_BP
    assert isinstance(arch, ChainArchitecture)  # no other's signs may flip
    scales = [moved_BP.new_ones(1, group.size) for group in arch.groups]
    scales[members[0]] = torch.where(chosen_B[:, None], signs_BH, 1.0)
    return scaled(arch, moved_BP, scales)


def _assigned(
    table: Table,
    theta_BP: Tensor,
    reference: list[Tensor],
    members: list[int],
    known: set[int],
    flips: Sequence[bool] = (),
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """The best orders of a group and those within it, others staying; the signs of the reordered units of a group that
    may flip them (one that has none within it); which models they bring nearer."""
    group, *children = members
    tensors = table.tensors(theta_BP)
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
    orders = [torch.from_numpy(order_BH), *(torch.from_numpy(o).flatten(1) for o in inner)]
    return orders, signs_BH, improved_B


def _each_assigned(gain_BHHDD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best order within each pair of outer units [B, H, H, D], and what it gains [B, H, H]."""
    orders = np.empty(gain_BHHDD.shape[:4], np.int64)
    for at in np.ndindex(gain_BHHDD.shape[:3]):
        orders[at] = linear_sum_assignment(gain_BHHDD[at], maximize=True)[1]
    return orders, np.take_along_axis(gain_BHHDD, orders[..., None], 4).sum((3, 4))


def _gains(
    table: Table, tensors: list[Tensor], reference: list[Tensor], groups: list[int], without: list[int], known: set[int]
) -> Tensor:
    """Inner product [B, H, H, D, D] won by putting each model's unit (h', d') where the reference has unit (h, d).

    Of the tensors that have all of `groups` (D is 1 for a single one), none of `without`, and no others but known ones.
    """
    sizes = [table.groups[g].size for g in groups] + [1] * (2 - len(groups))
    gain = torch.zeros(len(tensors[0]), sizes[0], sizes[0], sizes[1], sizes[1], dtype=torch.float64)
    for number in table.entries_of(groups[-1]):
        entry, present = table.entries[number], table.groups_of(number)
        if present & set(without) or not present <= {*known, *groups}:
            continue
        for places in _occurrences(entry, groups):
            a_HDX, b_BHDX = (_units_first(t[number], entry, places, sizes) for t in (reference, tensors))
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
