"""Many models of one torch module at once: `torch.func.functional_call` under `vmap`, in chunks of bounded memory.

A batch-normalised module runs in evaluation mode, on the running statistics that theta holds; while a zoo is trained
its normalisation reads the batch, and the statistics follow (`train`); `remeasure` takes them anew from given inputs.
Dropout is always off.

Legend: B models, P parameters, Q inputs, C outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distrecon.errors import UserError
from distrecon.nets.table import Table

BatchNorm = nn.modules.batchnorm._BatchNorm  # the class of all of them, which torch has under no public name
NUMBERS = 1 << 26  # intermediate numbers of a chunk's widest operation: 256 MB in float32


def forward(module: nn.Module, table: Table, theta_BP: Tensor, inputs: Tensor, chunk: int | None) -> Tensor:
    """outputs[B, Q, C] of B models on shared inputs."""
    state, dims = states(table, theta_BP)
    return _mapped(module, dims, chunk)(state, _typed(inputs, theta_BP))


def train(module: nn.Module, table: Table, theta_BP: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """outputs[B, Q, C] normalised by the batch, and theta with the running statistics moved as the module says."""
    state, dims = states(table, theta_BP)
    moved = [e.name for e in table.entries if e.role in ("mean", "variance")]
    state |= {name: state[name].detach().clone() for name in moved}
    with _measuring(module):
        logits_BQC = _mapped(module, dims, None)(state, _typed(inputs, theta_BP))
    after_BP = theta_BP.detach().clone()
    for entry, view in zip(table.entries, table.tensors(after_BP), strict=True):
        if entry.role in ("mean", "variance"):
            view.copy_(state[entry.name].view_as(view))
    return logits_BQC, after_BP


@torch.no_grad()
def remeasure(module: nn.Module, table: Table, theta_BP: Tensor, inputs: Tensor, chunk: int) -> Tensor:
    """theta with the running means and variances that these inputs give, all at once."""
    with _measuring(module, momentum=1.0):
        return torch.cat([train(module, table, part, inputs)[1] for part in theta_BP.split(chunk)])


def own_copy(module: nn.Module) -> nn.Module:
    """The module for our use: in evaluation mode, not trained by anybody else."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _typed(inputs: Tensor, theta_BP: Tensor) -> Tensor:
    return inputs.to(theta_BP.dtype) if inputs.is_floating_point() else inputs


def states(table: Table, theta_BP: Tensor) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The state dict of B models, [B, *shape] each, and which of its entries differ by model.

    A variance is never below zero, whatever numbers a decoder gave.
    """
    state: dict[str, Tensor] = {}
    for entry, value in zip(table.entries, table.tensors(theta_BP), strict=True):
        shaped = value.reshape(len(theta_BP), *entry.shape)
        shaped = shaped.clamp_min(0) if entry.role == "variance" else shaped
        state |= dict.fromkeys((entry.name, *entry.also), shaped)
    dims: dict[str, int | None] = dict.fromkeys(state, 0)
    for constant in table.constants:
        state[constant.name], dims[constant.name] = constant.tensor().to(theta_BP.device), None
    return state, dims


def _mapped(module: nn.Module, dims: Mapping[str, int | None], chunk: int | None):  # type: ignore[no-untyped-def]
    def one(state: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, state, (inputs,), tie_weights=False)

    mapped = torch.func.vmap(one, in_dims=(dims, None), chunk_size=chunk)

    def call(state: dict[str, Tensor], inputs: Tensor) -> Tensor:
        with plain_attention(), _Differentiable():
            return mapped(state, inputs)

    return call


class _Differentiable(TorchFunctionMode):
    """Normalisation by running statistics as arithmetic: torch's own has no gradient with respect to them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = {F.batch_norm: batch_norm, F.instance_norm: _instance_norm}.get(func, func)
        return own(*args, **(kwargs or {}))


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or mean is None or variance is None:
        return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)  # the same by statistics


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as operations that vmap knows, not as the fused kernel of a whole layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _measuring(module: nn.Module, momentum: float | None = None) -> Iterator[None]:
    """Batch normalisation reads the batch and moves its statistics; everything else stays in evaluation mode."""
    layers = [m for m in module.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    before = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.train()
            layer.momentum = momentum if momentum is not None else layer.momentum
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.eval()
            layer.momentum = value


def check(module: nn.Module, table: Table, name: str) -> None:
    """UserError that names the first entry in which a module differs from the table."""
    own = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    known = {key: e.shape for e in table.entries for key in (e.name, *e.also)}
    known |= {c.name: c.shape for c in table.constants}
    for key in [*known, *own]:
        if own.get(key) != known.get(key):
            there, here = known.get(key, "no such entry"), own.get(key, "no such entry")
            raise UserError(f"{name}: {key!r} is {here} in the module, {there} in the networks")
