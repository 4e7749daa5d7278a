"""What data-parallel workers share: rows of the global batch (with gradients), sums. No-ops on one worker.

A worker holds the rows [offset, offset + b) of a global batch of G; b may differ between workers and may be 0.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GlobalRows(torch.autograd.Function):
    """Every worker's rows in one tensor. The gradient of a row is the sum of what all workers' losses say about it."""

    @staticmethod
    def forward(ctx, local: Tensor, offset: int, size: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.offset, ctx.count = offset, local.shape[1]
        everything = local.new_zeros(local.shape[0], size, *local.shape[2:])
        everything[:, offset : offset + local.shape[1]] = local
        dist.all_reduce(everything)
        return everything

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[:, ctx.offset : ctx.offset + ctx.count], None, None


def global_rows(local: Tensor, offset: int, size: int) -> Tensor:
    """[V, b, ...] of each worker -> [V, size, ...] on all; every worker must call it, also with b = 0."""
    return _GlobalRows.apply(local, offset, size) if active() else local


def total(values: Tensor) -> Tensor:
    """Sum over the workers, without gradient."""
    values = values.detach()
    if active():
        values = values.clone()
        dist.all_reduce(values)
    return values


def broadcast(tensors: Iterable[Tensor]) -> None:
    """The first worker's values on all, so that rounding in their making cannot differ."""
    if active():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def from_first(make: Callable[[], Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """What `make` gives on the first worker, the only one that calls it, on all: float32 of this shape, on the CPU.

    `device`: of this worker, over which it is sent.
    """
    if not active():
        return make()
    values = (make() if dist.get_rank() == 0 else torch.empty(shape)).to(device)
    broadcast([values])
    return values.cpu()
