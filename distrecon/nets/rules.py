"""How operations pass on the make-up of their tensors' axes: a rule for each, by its name in PyTorch's ATen.

A rule gets the operation with its arguments as labels (one for each axis of a tensor, see `axes.py`) and gives the
labels of its result; on the way it makes axes equal (`unify`) or keeps them in order (`pin`). An operation that treats
every unit of an axis alike, whatever the order, passes the axis on.
"""

from __future__ import annotations

from typing import Any

from distrecon.nets import axes, shape_rules
from distrecon.nets.axes import Label, fixed, free, length, pin, unify
from distrecon.nets.calls import Call, Rule, Tensor, adder, broadcast, flatten_labels, kept

RULES: dict[str, Rule] = dict(shape_rules.RULES)
rule = adder(RULES)


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


@rule("_weight_norm")
def weight_norm(call: Call) -> Tensor:
    direction, size, dim = call.args[0], call.args[1], call.arg(2, "dim", 0)
    unify(direction[dim], size[dim])
    return direction


# -- pooling and reduction ---------------------------------------------------------------------------------------------


def _pooled(dims: int) -> Rule:
    return lambda call: kept(call.args[0], len(call.args[0]) - dims, call.shape)


for _dims in (1, 2, 3):
    for _name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        rule(f"{_name}{_dims}d")(_pooled(_dims))


def _resized(call: Call) -> Tensor:
    return kept(call.args[0], 2, call.shape)


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
