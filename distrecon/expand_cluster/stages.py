"""Trained students kept on disk, so that an interrupted recovery continues where it was.

A recovery is deterministic: called again it asks the same queries and comes to the same stages. Each stage's tensor and
the random generator's state after it are kept under the stage's name; a stage found there is not computed again.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrecon.errors import UserError


class Stages:
    """A folder of stages of one recovery; `request` says which, and another request is refused with UserError."""

    def __init__(self, folder: Path, request: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mark = hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).hexdigest()
        file = folder / "request.txt"
        if file.exists() and file.read_text() != mark:
            raise UserError(f"{folder} holds stages of a recovery with other settings; resume with the same options")
        file.write_text(mark)

    def keep(self, name: str, generator: torch.Generator, compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of the stage `name`: from disk, with the generator set as after it, or computed and kept."""
        file = self.folder / f"{name.replace(' ', '-')}.safetensors"
        if file.exists():
            stored = load_file(file)
            generator.set_state(stored["generator"])
            return stored["tensor"]
        tensor = compute()
        partial_file = file.with_suffix(".partial")
        save_file({"tensor": tensor, "generator": generator.get_state()}, partial_file)
        os.replace(partial_file, file)  # a stage that was being written when the run died does not count
        return tensor
