"""How operations pass on the make-up of their tensors' axes: a rule for each, by its name in PyTorch's ATen.

A rule gets the operation with its arguments as labels (one for each axis of a tensor, see `axes.py`) and gives the
labels of its result; on the way it makes axes equal (`unify`) or keeps them in order (`pin`). An operation that treats
every unit of an axis alike, whatever the order, passes the axis on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from distrecon.nets import axes
from distrecon.nets.axes import Axis, Label, Piece, Stack, cut, fixed, free, length, pin, settled, unify

Labels = tuple[Label, ...]


@dataclass
class Call:
    """One operation: arguments in which tensors are labels, and the shapes of its results."""

    args: Sequence[Any]
    kwargs: dict[str, Any]
    shapes: list[tuple[int, ...]]  # of its results, one after the other
    unstacked: set[int] = field(default_factory=set)  # axes of the result of which only single places are taken

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def is_labels(value: Any) -> bool:
    return isinstance(value, tuple) and getattr(value, "labels", False)


class Tensor(tuple[Label, ...]):
    """The labels of a tensor's axes."""

    labels = True


def flatten_labels(value: Any) -> list[Tensor]:
    """All tensors' labels among arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [found for item in value for found in flatten_labels(item)]
    return []


def _kept(x: Tensor, first: int, shape: Sequence[int]) -> Tensor:
    """The first axes as they are, places in fixed order for the others."""
    for label in x[first:]:
        pin(label)
    return Tensor((*x[:first], *map(fixed, shape[first:])))


# -- one unit, one number ----------------------------------------------------------------------------------------------

POINTWISE = """relu leaky_relu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid softplus
softsign logsigmoid log_sigmoid relu6 threshold abs neg exp log log1p expm1 sqrt rsqrt square reciprocal sin cos erf
pow clamp clamp_min clamp_max sign floor ceil round nan_to_num dropout feature_dropout alpha_dropout contiguous
clone to _to_copy detach alias lift_fresh_copy type_as float add sub rsub mul
div true_divide where maximum minimum lerp addcmul addcdiv atan2 masked_fill eq ne lt le gt ge logical_and logical_or
logical_not bitwise_not isnan hardshrink softshrink tanhshrink erfc atan asin sinh cosh trunc frac exp2 log2 log10
zeros_like ones_like full_like""".split()


@rule(*POINTWISE)
def pointwise(call: Call) -> Tensor:
    """Also sums and products: tensors' axes are matched from the last, as broadcasting does."""
    tensors = flatten_labels([*call.args, *call.kwargs.values()])
    return broadcast(tensors, len(call.shape))


def broadcast(tensors: Sequence[Tensor], ndim: int) -> Tensor:
    result: list[Label] = []
    for place in range(-ndim, 0):
        labels = [t[place] for t in tensors if len(t) >= -place]
        wide = [label for label in labels if length(label) != 1] or labels[:1]
        for other in wide[1:]:
            unify(wide[0], other)
        result.append(wide[0] if wide else ((),))
    return Tensor(result)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(call: Call) -> Tensor:
    x, dim = call.args[0], call.arg(1, "dim")
    axes.mixed(x[dim], [label for d, label in enumerate(x) if d != dim % len(x)])
    return x


@rule("prelu")
def prelu(call: Call) -> Tensor:
    x, weight = call.args[:2]
    if length(weight[0]) != 1:
        unify(x[1], weight[0])
    return x


# -- weighted sums -----------------------------------------------------------------------------------------------------


@rule("linear")
def linear(call: Call) -> Tensor:
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    unify(x[-1], weight[-1])
    if bias is not None:
        unify(weight[0], bias[0])
    return Tensor((*x[:-1], *weight[:-1]))


def convolution(call: Call, transposed: bool = False) -> Tensor:
    """Channels are summed over within each group of them; the groups themselves may change places."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    spatial = len(weight) - 2
    groups = call.arg(7 if transposed else 6, "groups", 1)
    channels = x[-spatial - 1]
    out_axis, in_axis = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    for label in (*weight[2:], *x[-spatial:]):
        pin(label)
    out: Label = out_axis
    if groups == 1:
        unify(channels, in_axis)
    elif transposed:
        for label in (channels, out_axis, in_axis):
            pin(label)
        out = fixed(call.shape[-spatial - 1])
    else:
        (of_groups,) = free(groups)[0]
        inner, outer = (
            axes.free(size, of_groups)[0] for size in (length(channels) // groups, length(out_axis) // groups)
        )
        unify(channels, ((of_groups, *inner),))
        unify(in_axis, (inner,))
        unify(out_axis, ((of_groups, *outer),))
    if bias is not None:
        unify(out, bias[0])
    return Tensor((*x[: -spatial - 1], out, *map(fixed, call.shape[-spatial:])))


rule("conv1d", "conv2d", "conv3d")(convolution)
rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")(lambda call: convolution(call, transposed=True))


@rule("matmul", "bmm", "mm")
def matmul(call: Call) -> Any:
    a, b = call.args[:2]
    if len(a) < 2 or len(b) < 2:
        return NotImplemented
    unify(a[-1], b[-2])
    batch = broadcast([Tensor(a[:-2]), Tensor(b[:-2])], len(call.shape) - 2)
    return Tensor((*batch, a[-2], b[-1]))


@rule("addmm", "baddbmm")
def addmm(call: Call) -> Any:
    product = matmul(Call(call.args[1:3], {}, call.shapes))
    return broadcast([product, call.args[0]], len(call.shape))


@rule("einsum")
def einsum(call: Call) -> Any:
    equation, tensors = call.args[0].replace(" ", ""), call.args[1]
    if "." in equation or "->" not in equation:
        return NotImplemented
    left, right = equation.split("->")
    known: dict[str, Label] = {}
    for letters, tensor in zip(left.split(","), tensors, strict=True):
        for letter, label in zip(letters, tensor, strict=True):
            unify(known.setdefault(letter, label), label)
    return Tensor(known[letter] for letter in right)


@rule("embedding")
def embedding(call: Call) -> Tensor:
    weight, indices = call.args[:2]
    pin(weight[0])  # what an index means is outside of the network
    return Tensor((*indices, *weight[1:]))


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Tensor:
    """Heads may change places, and channels within a head: queries' with keys', values' with what reads them."""
    query, key, value = call.args[:3]
    if any(len(t) != len(query) for t in (key, value)) or call.kwargs.get("enable_gqa"):
        return NotImplemented  # type: ignore[return-value]
    batch = broadcast([Tensor(t[:-2]) for t in (query, key, value)], len(query) - 2)
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    if (mask := call.arg(3, "attn_mask")) is not None:
        broadcast([Tensor((*batch, query[-2], key[-2])), mask], len(query))
    elif call.arg(5, "is_causal", False):
        pin(query[-2])
        pin(key[-2])
    return Tensor((*batch, query[-2], value[-1]))


# -- normalisation -----------------------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm")
def batch_norm(call: Call) -> Tensor:
    x = call.args[0]
    for vector in flatten_labels(call.args[1:5]):
        unify(x[1], vector[0])
    return x


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Tensor:
    x, normalised = call.args[0], len(call.args[1])
    for label in x[-normalised:]:
        axes.mixed(label, x[:-normalised])
    for tensor in flatten_labels(call.args[2:4]):
        broadcast([x, tensor], len(x))
    return x


@rule("group_norm")
def group_norm(call: Call) -> Tensor:
    x, groups = call.args[:2]
    if 1 < groups < length(x[1]):
        unify(x[1], axes.product(axes.factored(free(length(x[1])), (groups, length(x[1]) // groups))))
    for vector in flatten_labels(call.args[2:4]):
        unify(x[1], vector[0])
    return x


# -- pooling and reduction ---------------------------------------------------------------------------------------------


def _pooled(dims: int) -> Rule:
    return lambda call: _kept(call.args[0], len(call.args[0]) - dims, call.shape)


for _dims in (1, 2, 3):
    for _name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        rule(f"{_name}{_dims}d")(_pooled(_dims))


def _resized(call: Call) -> Tensor:
    return _kept(call.args[0], 2, call.shape)


for _name in ("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"):
    rule(_name, f"_{_name}_aa")(_resized)


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "norm", "linalg_vector_norm", "prod")
def reduction(call: Call) -> Any:
    """Over any order of units it is the same."""
    x, name = call.args[0], call.arg(1, "dim")
    if name is not None and not isinstance(name, int | list):
        return NotImplemented
    dims = range(len(x)) if name is None or name == [] else [name] if isinstance(name, int) else name
    gone = {d % len(x) for d in dims}
    left = [label for d, label in enumerate(x) if d not in gone]
    if len(left) == len(call.shape):
        return Tensor(left)
    return Tensor(((),) if d in gone else label for d, label in enumerate(x))


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
