"""Axes whose make-up is not yet known, and what makes two of them equal: unification of terms with sizes.

An axis is a row of segments, a segment a product of atoms, the outermost first. An atom is a number of units in any
order, until it is pinned, or bound to a finer term: cut in parts (something was concatenated or sliced) or split into a
product (something was reshaped). An atom may lie `within` another one: each of the other's units then has an order of
its own. Whatever cannot be expressed is pinned, which is always right and gives up symmetry only.

Axes of length one are the empty product. Equal pinned places need no identity: any are the same as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod


class Atom:
    """Units, by their number; `within` is the atom for whose units each they have an order of their own, never if
    `alone`."""

    __slots__ = ("alone", "bound", "pinned", "size", "within")

    def __init__(self, size: int, pinned: bool = False, within: Atom | None = None) -> None:
        self.size, self.pinned, self.within = size, pinned, within
        self.bound: Axis | None = None
        self.alone = False


Segment = tuple[Atom, ...]
Axis = tuple[Segment, ...]


class Piece:
    """An axis of several tensors that lie stacked along another axis, until one of them is taken.

    Asked for as it is, before that, the tensors' axes are made equal.
    """

    def __init__(self, stack: Stack, choices: Sequence[Axis]) -> None:
        self.stack, self.choices = stack, choices


class Stack:
    """The axis along which the tensors of `Piece`s lie."""

    def __init__(self, size: int) -> None:
        self.size = size


Label = Axis | Piece | Stack


def free(size: int, within: Atom | None = None) -> Axis:
    """A new axis of unknown make-up."""
    return ((Atom(size, within=within),),) if size != 1 else ((),)


def fixed(size: int) -> Axis:
    """An axis whose places stay."""
    return ((Atom(size, pinned=True),),) if size != 1 else ((),)


def size_of(segment: Segment) -> int:
    return prod(atom.size for atom in segment)


def length(axis: Label) -> int:
    if isinstance(axis, Stack):
        return axis.size
    if isinstance(axis, Piece):
        return length(axis.choices[0])
    return sum(map(size_of, axis))


def settled(axis: Label) -> Axis:
    """The axis as it is known by now: nothing bound in it, pinned neighbours joined."""
    if isinstance(axis, Stack):
        return fixed(axis.size)
    if isinstance(axis, Piece):
        for other in axis.choices[1:]:
            unify(axis.choices[0], other)
        axis = axis.choices[0]
    segments = [part for segment in axis for part in _expanded(segment)]
    joined: list[Segment] = []
    for segment in map(_compact, segments):
        if joined and _stays(segment) and _stays(joined[-1]):
            segment = (Atom(size_of(joined.pop()) + size_of(segment), pinned=True),)
        joined.append(segment)
    return tuple(joined)


def _stays(segment: Segment) -> bool:
    return all(atom.pinned for atom in segment)


def _compact(segment: Segment) -> Segment:
    """Pinned neighbours of a product as one."""
    result: list[Atom] = []
    for atom in segment:
        if atom.pinned and result and result[-1].pinned:
            atom = Atom(result.pop().size * atom.size, pinned=True)
        result.append(atom)
    return tuple(result)


def _expanded(segment: Segment) -> list[Segment]:
    """A product of atoms as a row of products of unbound ones."""
    result: list[Segment] = [()]
    for atom in segment:
        inner = [(atom,)] if atom.bound is None else [part for bound in atom.bound for part in _expanded(bound)]
        if len(inner) == 1:
            result = [outer + inner[0] for outer in result]
        else:  # a row inside of each unit: expressible only once the outer units stay
            for outer in result:
                _pin_segment(outer)
            result = [part for outer in result for _ in range(size_of(outer)) for part in inner]
    return result


def product(axes: Sequence[Label]) -> Axis:
    """Several axes flattened into one."""
    row: list[Segment] = [()]
    for axis in map(settled, axes):
        if len(axis) == 1:
            row = [outer + axis[0] for outer in row]
        else:
            for outer in row:
                _pin_segment(outer)
            row = [part for outer in row for _ in range(size_of(outer)) for part in axis]
    return settled(tuple(row))


def pin(axis: Label) -> None:
    """Every unit of the axis stays where it is."""
    for segment in settled(axis):
        _pin_segment(segment)


def _pin_segment(segment: Segment) -> None:
    for atom in segment:
        atom.pinned, atom.within = True, None


def parent(atom: Atom) -> Atom | None:
    """The atom that this one lies within, as known by now: None where it is pinned, cut, or lies within a third."""
    if atom.within is None:
        return None
    axis = settled(((atom.within,),))
    if len(axis) != 1:
        return None
    movable = [a for a in axis[0] if not a.pinned]
    return movable[0] if len(movable) == 1 and movable[0].within is None and movable[0] is not atom else None


def unify(a: Label, b: Label) -> None:
    """Makes two axes of the same length equal."""
    a, b = settled(a), settled(b)
    while a:
        s, t = a[0], b[0]
        cut_at = min(size_of(s), size_of(t))
        (s, *rest_a), (t, *rest_b) = _cut(s, cut_at), _cut(t, cut_at)
        a, b = (*rest_a, *a[1:]), (*rest_b, *b[1:])
        _equate(s, t)
        a, b = settled(a), settled(b)


def cut(axis: Label, sizes: Iterable[int]) -> list[Axis]:
    """The axis in consecutive parts."""
    axis, parts = settled(axis), []
    for size in sizes:
        part: list[Segment] = []
        while size:
            head, *rest = _cut(axis[0], min(size, size_of(axis[0])))
            part.append(head)
            size -= size_of(head)
            axis = settled((*rest, *axis[1:]))
        parts.append(settled(tuple(part)))
    return parts


def _cut(segment: Segment, size: int) -> list[Segment]:
    """The first `size` units of a segment, and the rest, if there is any."""
    whole = size_of(segment)
    if size == whole:
        return [segment]
    outer, inner = segment[0], size_of(segment[1:])
    if size % inner:
        _pin_segment(segment)
    if _stays(segment):
        return [settled(fixed(size))[0], settled(fixed(whole - size))[0]]
    sizes = (size // inner, outer.size - size // inner)
    parts = [free(n)[0] for n in sizes] if not outer.pinned else [fixed(n)[0] for n in sizes]
    if not outer.pinned:
        outer.bound = tuple(parts)
    return [part + segment[1:] for part in parts]


def _equate(s: Segment, t: Segment) -> None:
    """Makes two products of the same size equal."""
    while s and t:
        x, y = s[0], t[0]
        if x is y or x.size == y.size:
            if x is not y:
                _join(x, y)
            s, t = s[1:], t[1:]
        else:
            if x.size < y.size:
                s, t, x, y = t, s, y, x
            if x.size % y.size:
                _pin_segment(s)
                _pin_segment(t)
                return
            if x.pinned:
                _pin_segment((y,))
                s, t = (Atom(x.size // y.size, pinned=True), *s[1:]), t[1:]
            else:
                s = _split(x, y.size) + s[1:]
        (s, *more_s), (t, *more_t) = settled((s,)), settled((t,))
        if more_s or more_t:  # an atom of the rest has just been cut
            unify((s, *more_s), (t, *more_t))
            return


def _split(atom: Atom, outer: int) -> Segment:
    """An atom as a product; the inner units of each outer one have an order of their own."""
    inner = atom.size // outer
    first = Atom(outer, within=atom.within)
    atom.bound = ((first, Atom(inner, within=first if atom.within is None else None)),)
    return atom.bound[0]


def _join(x: Atom, y: Atom) -> None:
    """Makes two atoms one."""
    if x.pinned or y.pinned:
        _pin_segment((x, y))
        return
    of_x, of_y = parent(x), parent(y)
    x.bound = ((y,),)
    y.within, y.alone = of_x or of_y, x.alone or y.alone
    if y.alone or y.within in (x, y) or (of_x is not None and of_y is not None and of_x is not of_y):
        keep_alone(y)


def keep_alone(atom: Atom) -> None:
    """These units have one order wherever they are."""
    atom.within, atom.alone = None, True


def mixed(axis: Label, others: Iterable[Label]) -> None:
    """Something compares the units of an axis with each other at equal places of the others."""
    atoms = {atom for segment in settled(axis) for atom in segment}
    for other in others:
        for atom in (a for segment in settled(other) for a in segment):
            if parent(atom) in atoms:
                keep_alone(atom)


def factored(axis: Label, sizes: Sequence[int]) -> list[Axis]:
    """The axis as a product of axes of these lengths; the last one's units have an order for each of those before."""
    axis = settled(axis)
    if len(sizes) == 1:
        return [axis]
    atoms = [Atom(size) for size in sizes if size != 1]
    if len(atoms) > 1:
        atoms[-1].within = atoms[-2]
    whole = axis[0][0] if len(axis) == len(axis[0]) == 1 else None
    if whole is not None and not whole.pinned and whole.within is None:
        whole.bound = (tuple(atoms),)
    else:
        unify(axis, (tuple(atoms),))
    rest = iter(atoms)
    return [settled(((next(rest),),)) if size != 1 else ((),) for size in sizes]
