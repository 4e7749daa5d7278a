"""Compiles `guard.cpp` against the installed torch; imports no torch, which has to be loaded after the guard."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
NEEDED = ("c10", "torch_cpu")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def load() -> None:
    """Makes `cuda` a device of the torch that this process will import. CalledProcessError if compiling fails."""
    for name in NEEDED:  # here, since the guard, kept for every environment with this torch, knows no folder of theirs
        ctypes.CDLL(str(_torch() / f"lib/lib{name}.so"))
    ctypes.CDLL(str(library()))


def library() -> Path:
    """The compiled guard, made once for every version of it and of torch. CalledProcessError if that fails."""
    key = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes() + version("torch").encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distrecon"
    made = cache / f"fake-cuda-{key}.so"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{_torch() / 'include'}", f"-I{_torch() / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{_torch() / 'lib'}", *(f"-l{name}" for name in NEEDED)]
        unfinished = made.with_suffix(f".{os.getpid()}")
        command = [compiler() or "g++", "-O0", "-std=c++20", "-shared", "-fPIC", *includes, str(SOURCE), *libraries]
        subprocess.run([*command, "-o", str(unfinished)], check=True, capture_output=True, text=True)
        unfinished.replace(made)
    return made


def _torch() -> Path:
    return Path(find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
