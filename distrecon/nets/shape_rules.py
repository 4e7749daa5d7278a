"""The rules of operations that move, cut and join axes (see `rules.py`)."""

from __future__ import annotations

from math import prod
from typing import Any

from distrecon.nets import axes
from distrecon.nets.axes import Axis, Label, Piece, Stack, cut, fixed, free, length, pin, settled, unify
from distrecon.nets.calls import Call, Rule, Tensor, adder, broadcast

RULES: dict[str, Rule] = {}
rule = adder(RULES)


# -- shape -------------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def reshape(call: Call) -> Tensor:
    """Axes flattened into one are its factors; an axis cut into several is their product."""
    x, sizes = list(call.args[0]), list(call.shape)
    result: list[Label] = []
    while x or sizes:
        block, wanted = [x.pop(0)] if x else [], [sizes.pop(0)] if sizes else []
        while (have := prod(map(length, block))) != (want := prod(wanted)):
            if have < want:
                block.append(x.pop(0))
            else:
                wanted.append(sizes.pop(0))
        while wanted and len(wanted) < len(block) and sizes and sizes[0] == 1:
            wanted.append(sizes.pop(0))
        result += _regrouped(block, wanted, call.unstacked, len(result))
    return Tensor(result)


def _regrouped(block: list[Label], sizes: list[int], unstacked: set[int], at: int) -> list[Label]:
    if [length(label) for label in block] == sizes:
        return block
    if len(block) == 1 and len(sizes) > 1 and at in unstacked and sizes[0] > 1:
        stack = Stack(sizes[0])
        parts = [axes.factored(part, sizes[1:]) for part in cut(block[0], [prod(sizes[1:])] * sizes[0])]
        return [stack, *(Piece(stack, [part[j] for part in parts]) for j in range(len(sizes) - 1))]
    return list(axes.factored(axes.product(block), sizes)) if sizes else []


@rule("permute")
def permute(call: Call) -> Tensor:
    return Tensor(call.args[0][d] for d in call.args[1])


@rule("transpose", "swapaxes")
def transpose(call: Call) -> Tensor:
    x, a, b = list(call.args[0]), call.args[1], call.args[2]
    x[a], x[b] = x[b], x[a]
    return Tensor(x)


@rule("t", "numpy_T")
def t(call: Call) -> Tensor:
    return Tensor(reversed(call.args[0]))


@rule("movedim")
def movedim(call: Call) -> Any:
    x, source, target = call.args[:3]
    if not isinstance(source, int):
        return NotImplemented
    labels = list(x)
    labels.insert(target % len(x), labels.pop(source))
    return Tensor(labels)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Tensor:
    x, dim = list(call.args[0]), call.args[1]
    x.insert(dim % (len(x) + 1), ((),))
    return Tensor(x)


@rule("squeeze")
def squeeze(call: Call) -> Tensor:
    x, dim = call.args[0], call.arg(1, "dim")
    dims = range(len(x)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(x) for d in dims if length(x[d]) == 1}
    return Tensor(label for d, label in enumerate(x) if d not in gone)


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Tensor:
    """Copies of one number may come in any order."""
    x = call.args[0]
    padded = [((),)] * (len(call.shape) - len(x)) + list(x)
    return Tensor(
        label if length(label) == size else free(size) for label, size in zip(padded, call.shape, strict=True)
    )


# -- parts and wholes --------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def concatenate(call: Call) -> Tensor:
    tensors, dim = [t for t in call.args[0] if len(t) > 1 or length(t[0])], call.arg(1, "dim", 0)
    dim %= len(tensors[0])
    result: list[Label] = []
    for d in range(len(tensors[0])):
        labels = [tensor[d] for tensor in tensors]
        if d == dim:
            result.append(tuple(segment for label in labels for segment in settled(label)))
            continue
        for other in labels[1:]:
            unify(labels[0], other)
        result.append(labels[0])
    return Tensor(result)


@rule("stack")
def stack(call: Call) -> Tensor:
    tensors, dim = call.args[0], call.arg(1, "dim", 0)
    labels = list(broadcast(tensors, len(tensors[0])))
    labels.insert(dim % (len(labels) + 1), fixed(len(tensors)))
    return Tensor(labels)


def _taken(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """x with another axis in the place of `dim`."""
    return Tensor((*x[:dim], axis, *x[dim + 1 :]))


@rule("slice")
def slice_(call: Call) -> Tensor:
    x, dim = call.args[0], call.arg(1, "dim", 0) % len(call.args[0])
    whole = length(x[dim])
    start, end, _ = slice(call.arg(2, "start"), call.arg(3, "end")).indices(whole)
    step = call.arg(4, "step", 1)
    if step != 1:
        pin(x[dim])
        return _taken(x, dim, fixed(call.shape[dim]))
    return _taken(x, dim, cut(x[dim], [start, end - start, whole - end])[1])


@rule("narrow")
def narrow(call: Call) -> Tensor:
    x, dim, start, size = call.args[:4]
    dim %= len(x)
    return _taken(x, dim, cut(x[dim], [start, size, length(x[dim]) - start - size])[1])


@rule("select")
def select(call: Call) -> Tensor:
    x, dim, index = call.args[:3]
    dim %= len(x)
    index %= length(x[dim])
    chosen = x[dim]
    if isinstance(chosen, Stack):
        x = Tensor(a.choices[index] if isinstance(a, Piece) and a.stack is chosen else a for a in x)
    else:
        cut(chosen, [index, 1, length(chosen) - index - 1])
    return Tensor((*x[:dim], *x[dim + 1 :]))


@rule("unbind")
def unbind(call: Call) -> list[Tensor]:
    x, dim = call.args[0], call.arg(1, "dim", 0)
    return [select(Call([x, dim, i], {}, [])) for i in range(length(x[dim % len(x)]))]


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(call: Call) -> list[Tensor]:
    x, dim = call.args[0], call.arg(2, "dim", 0)
    dim %= len(x)
    parts = cut(x[dim], [shape[dim] for shape in call.shapes])
    return [_taken(x, dim, part) for part in parts]


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Tensor:
    """A constant put round channels is so many more of them, all alike."""
    x, amounts, mode = list(call.args[0]), call.args[1], call.arg(2, "mode", "constant")
    constant = mode == "constant" or not isinstance(mode, str)
    for k in range(len(amounts) // 2):
        before, after = amounts[2 * k : 2 * k + 2]
        dim = len(x) - 1 - k
        if not before and not after:
            continue
        if constant and before >= 0 and after >= 0:
            ends = [free(n) if n else () for n in (before, after)]
            x[dim] = settled((*ends[0], *settled(x[dim]), *ends[1]))
        else:
            pin(x[dim])
            x[dim] = fixed(call.shape[dim])
    return Tensor(x)
