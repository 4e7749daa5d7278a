"""Counts what code would ask of a GPU, on a machine without one: tensors on `cuda` have shapes and no numbers.

    with recording() as gpu:            # in a process of its own: this module, imported before torch, changes torch
        training = Training(config, zoos, steps, "cuda")
        gpu.reset()
        training.step(batch)
        print(gpu.counts())

Counted are kernels, synchronisations, copies to the GPU, bytes of new tensors and their peak. An operation on tensors
of two devices raises, as on a GPU. A number that the host reads is 1, or False. Attention counts as the one kernel that
it is on a GPU, with the memory that this one needs; a copy to the GPU that is not `non_blocking` is a synchronisation.
"""
# ruff: noqa: E402

import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.fake_gpu.guard import load

load()  # before torch, which asks once what devices there are

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PROJECT = f"{os.sep}distrecon{os.sep}"
VIEWS = set(
    "_reshape_alias _unsafe_view alias as_strided chunk detach diagonal expand expand_as lift_fresh movedim narrow "
    "permute select slice split split_with_sizes squeeze t transpose unbind unfold unsafe_split unsqueeze view".split()
)
QUESTIONS = set(  # and memory asked for, which no kernel fills
    "empty empty_like empty_strided new_empty new_empty_strided "
    "device dim is_contiguous is_non_overlapping_and_dense is_strides_like_format numel size storage_offset stride "
    "sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride".split()
)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
aten = torch.ops.aten
fake = FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def recording() -> Iterator["Recorder"]:
    """Makes `cuda` a device of this process, for good, and counts what is asked of it."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.autocast = _Autocast  # type: ignore[misc, assignment]
    from torch.utils import _foreach_utils

    _foreach_utils._foreach_supported_types.append(FakeTensor)
    with _FusedAttention(), Recorder() as recorder:
        yield recorder


def _line_of_project() -> str:
    """The innermost line of the project that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if PROJECT in file and "site-packages" not in file:
            return f"{file.rpartition(PROJECT)[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class Recorder(TorchDispatchMode):
    """Sees every operation, backward passes included. Each Counter is by what was done and the line that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.now = 0
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted; what is allocated stays."""
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.synchronisations: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.peak, self.written = self.now, 0

    def counts(self) -> dict[str, float]:
        return {
            "kernels": self.kernels.total(),
            "synchronisations": self.synchronisations.total(),
            "copies": self.copies.total(),
            "peak_gib": self.peak / 2**30,
            "written_gib": self.written / 2**30,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        made_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not inputs and not made_there:
            return func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if func is aten._local_scalar_dense.default:
            self._count(self.synchronisations, "item")
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func in (aten.equal.default, aten.nonzero.default):
            self._count(self.synchronisations, name)
            if func is aten.equal.default:
                return True
            with fake:
                return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.long, device=args[0].device)
        if name in INDEXING and isinstance(args[0], FakeTensor):
            args = (args[0], [self._index(index) for index in args[1]], *args[2:])
        try:
            with fake:
                out = func(*args, **kwargs)
        except Exception as error:
            error.add_note(f"{func} at {_line_of_project()}")
            raise
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
            self._copied(source, target, waits)
        on_gpu = made_there or any(tensor.fake_device.type == "cuda" for tensor in inputs)
        if on_gpu and name not in VIEWS | QUESTIONS:
            self._count(self.kernels, name)
        return tree_map(self._made, out)

    def _count(self, counter: Counter[tuple[str, str]], what: str) -> None:
        counter[what, _line_of_project()] += 1

    def _copied(self, source: Tensor, target: Tensor, waits: bool) -> None:
        way = (source.device.type, target.device.type)
        if way == ("cuda", "cpu"):  # someone will wait for it
            self._count(self.synchronisations, f"to the host {tuple(source.shape)}")
        if way == ("cpu", "cuda"):
            self._count(self.copies, f"{source.dtype} {tuple(source.shape)}")
            if waits:
                self._count(self.synchronisations, f"to the GPU {tuple(source.shape)}")

    def _index(self, index: Tensor | None) -> Tensor | None:
        """How many entries a mask has is known on the GPU only; here it has all."""
        if index is None:
            return None
        if not isinstance(index, FakeTensor):
            self._copied(index, torch.empty(0, device="meta"), waits=True)
            self._count(self.copies, f"index {tuple(index.shape)}")
            self._count(self.synchronisations, f"to the GPU {tuple(index.shape)}")
        elif index.dtype == torch.bool and index.ndim == 1:
            self._count(self.synchronisations, "mask")
            with fake:
                return torch.arange(len(index), device=index.device)
        return index

    def _made(self, value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        if value.fake_device.type == "cpu":  # what the host gets has to be real
            return torch.ones(value.shape, dtype=value.dtype)
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.written += size
            self.peak = max(self.peak, self.now)
        return value

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self.alive.pop(key, None)


class _FusedAttention(TorchFunctionMode):
    """Attention by the kernel that GPUs have for it; without one torch would take it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = torch.backends.cuda.mem_efficient_sdp_enabled()  # but where its gradient has to be differentiated
        if func is F.scaled_dot_product_attention and args[0].device.type == "cuda" and fused:
            if torch.is_autocast_enabled("cuda"):
                args = [tensor.to(torch.get_autocast_dtype("cuda")) for tensor in args]
            return aten._scaled_dot_product_efficient_attention(*args, None, torch.is_grad_enabled())[0]
        return func(*args, **(kwargs or {}))


class _Autocast:
    """torch.autocast, which looks for a CUDA build of torch first."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        self.device, self.dtype, self.enabled = device_type, dtype, enabled

    def __enter__(self) -> None:
        self.before = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        torch.set_autocast_enabled(self.device, self.enabled)
        torch.set_autocast_dtype(self.device, self.dtype or self.before[1])
        torch.autocast_increment_nesting()

    def __exit__(self, *error: object) -> None:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(self.device, self.before[0])
        torch.set_autocast_dtype(self.device, self.before[1])
