"""How numbers are computed on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def computes_at_once(device: torch.device) -> bool:
    """Whether an operation is done when it returns; elsewhere it is only queued, and asking for a number waits."""
    return device.type == "cpu"


@contextmanager
def products(device: torch.device, precision: str) -> Iterator[None]:
    """Products of float32 matrices and convolutions on a GPU: with rounded factors for `tf32`, else exactly float32."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn  # whose stubs lack its parts
    switches = (torch.backends.cuda.matmul, cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
