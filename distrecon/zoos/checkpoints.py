"""Reads checkpoint files of unknown origin without running anything that is in them."""

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from distrecon.errors import UserError, said
from distrecon.nets import Architecture, ChainArchitecture
from distrecon.nets.recognise import flatten_as

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
NESTS = ("model_state_dict", "state_dict", "model", "net", "weights")  # where training loops put the state dict
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # what data parallelism and compilation put before its names
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_WEIGHT = 1e6  # beyond it a model has exploded, whatever its accuracy says


def load(content: bytes, name: str) -> Any:
    """What a torch file holds, unpickled with `weights_only`: tensors and plain containers, nothing else.

    Raises UserError: the file is refused because it holds other objects, or it is damaged.
    """
    _check_size(content, name)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{name}: refused: not tensors in plain containers, and loading more could run code") from None
    except Exception as error:  # torch's readers raise nearly anything on a damaged file
        raise UserError(f"{name}: truncated or not a torch file ({type(error).__name__})") from None


def _check_size(content: bytes, name: str) -> None:
    """UserError for a torch file with compressed records, which torch does not write and which can hold anything."""
    if not content.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise UserError(f"{name}: truncated or not a torch file ({type(error).__name__})") from None
    if packed:
        raise UserError(f"{name}: refused: its records are compressed, which torch's own never are")


def read_state_dict(content: bytes, name: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, wherever it is nested, under its plain names.

    Raises UserError: refused, damaged, or no state dict in it.
    """
    if name.endswith(".safetensors"):
        try:
            state = safetensors.torch.load(content)
        except Exception as error:  # the reader raises its own on damaged files, others on types that torch lacks
            raise UserError(f"{name}: truncated or not a safetensors file ({said(error)})") from None
    else:
        found = find_state_dict(load(content, name))
        if found is None:
            raise UserError(f"{name}: no state dict in it")
        state = found
    for key, value in state.items():
        _check_tensor(value, key, name)
    return unwrap(state)


def _check_tensor(value: Tensor, key: str, name: str) -> None:
    """UserError for a tensor that is not plain numbers in the file; asks for no memory."""
    if value.is_cpu and value.layout == torch.strided and not value.is_quantized and value.is_contiguous():
        return  # one number after the other, which torch does not let lie outside of their storage
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        kind = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
        raise UserError(f"{name}: not plain tensors ({key!r} is {kind})")
    wanted, there = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if wanted > there:
        raise UserError(f"{name}: not plain tensors ({key!r} has {wanted:,} bytes of which the file holds {there:,})")


def find_state_dict(value: Any, depth: int = 3) -> dict[str, Tensor] | None:
    """The first mapping of names to tensors, in the usual places."""
    if not isinstance(value, Mapping) or not value:
        return None
    if all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        return dict(value)
    inner = (find_state_dict(value[key], depth - 1) for key in NESTS if key in value and depth)
    return next((found for found in inner if found is not None), None)


def unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before every name."""
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            return unwrap({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def to_theta(arch: Architecture, state: dict[str, Tensor], name: str) -> Tensor:
    """theta[P] float32; UserError for another architecture's shapes, non-finite or exploded weights."""
    constants = {constant.name for constant in arch.table.constants}
    for key, value in state.items():
        if key not in constants and value.dtype not in FLOATS:
            raise UserError(f"{name}: {key!r} holds {value.dtype}, not floating-point numbers")
    try:
        theta_P = (flatten_as(arch, state) if isinstance(arch, ChainArchitecture) else arch.flatten(state)).float()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    largest = float(theta_P.abs().max())
    if not math.isfinite(largest):  # the largest of numbers with a NaN is NaN
        raise UserError(f"{name}: non-finite weights")
    if largest > LARGEST_WEIGHT:
        raise UserError(f"{name}: exploded weights (up to {largest:.1e})")
    return theta_P
