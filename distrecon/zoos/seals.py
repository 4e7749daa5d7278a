"""Seals: what each file of a zoo held when it was written, as its size and SHA-256; the one place that compares them.

`zoo.json` lists a seal for every file (`"files"`), and ends with a SHA-256 of itself. `zoo check` compares all of them
every time. A reader compares what it reads once per process: row groups as `row_groups.py` says; files that list none,
as images and the parts of older zoos, whole, in threads beside the reading.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

from distrecon.errors import UserError
from distrecon.zoos.storage import Store

T = TypeVar("T")
CHUNK = 4 * 2**20  # bytes of a file in memory at once, in each thread
THREADS = min(4, os.cpu_count() or 1)  # hashlib and pyarrow let others run

_compared: set[tuple[str, str, str]] = set()  # store, file and seal of what this process has found as it should be


def seal(content: bytes | pa.Buffer) -> str:
    """The seal of a file with this content: `sha256:HEX:BYTES`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}:{len(memoryview(content))}"


def seal_of(store: Store, name: str) -> str:
    """The seal of a file as it is now; it is read whole, but never all in memory."""
    digest, size = hashlib.sha256(), 0
    with store.open(name) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return f"sha256:{digest.hexdigest()}:{size}"


def seals_of(store: Store, names: Iterable[str]) -> dict[str, str]:
    """The seals of files as they are now, read in parallel."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: seal_of(store, name), names), strict=True))


def problem(store: Store, name: str, wanted: str) -> str | None:
    """What is wrong with a file, by its seal, or None; names the file."""
    try:
        found = seal_of(store, name)
    except FileNotFoundError:
        return f"{name} is missing; the zoo lists it"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if found == wanted:
        return None
    sizes = found.rpartition(":")[2], wanted.rpartition(":")[2]
    what = f"it has {sizes[0]} bytes, not {sizes[1]}" if sizes[0] != sizes[1] else "its SHA-256 is another"
    return f"{name} is damaged: it is not what was written there ({what})"


def problems(store: Store, sealed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every file that differs from its seal or is missing, and what is wrong; all are read anew, in parallel."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: problem(store, name, sealed[name]), sealed)
        for name, text in zip(sealed, found, strict=True):
            if text is None:
                _compared.add((str(store), name, sealed[name]))
            else:
                yield name, text


class Comparison:
    """Compares files with their seals in the background, those that this process has not compared yet.

    with Comparison(store, sealed, names) as comparison:
        comparison.demand(name)         # UserError where it differs from its seal; one that has none passes
        comparison.held(name, values)   # what is read from it meanwhile, held back until it is known to be sound
    """

    def __init__(self, store: Store, sealed: Mapping[str, str], names: Iterable[str]) -> None:
        self.store, self.sealed = store, sealed
        self.missing = [n for n in dict.fromkeys(names) if n in sealed and self._key(n) not in _compared]
        self.found: dict[str, Future[str | None]] = {}

    def _key(self, name: str) -> tuple[str, str, str]:
        return str(self.store), name, self.sealed[name]

    def __enter__(self) -> "Comparison":
        if self.missing:
            self.pool = ThreadPoolExecutor(THREADS)
            self.found = {n: self.pool.submit(problem, self.store, n, self.sealed[n]) for n in self.missing}
        return self

    def demand(self, name: str) -> None:
        if name in self.found:
            if (text := self.found.pop(name).result()) is not None:
                raise UserError(f"{self.store}: {text}; zoo check lists all that is wrong")
            _compared.add(self._key(name))

    def held(self, name: str, values: Iterable[T]) -> Iterator[T]:
        waiting: list[T] = []
        for value in values:
            waiting.append(value)
            if name not in self.found or self.found[name].done():
                self.demand(name)
                yield from waiting
                waiting.clear()
        self.demand(name)
        yield from waiting

    def __exit__(self, *error: Any) -> None:
        if self.missing:
            self.pool.shutdown(cancel_futures=True)


# -- zoo.json's own ---------------------------------------------------------------------------------------------------

KEY = "sha256"


def signed(text: str) -> bytes:
    """A JSON object with the SHA-256 of its own text as its last key."""
    own = hashlib.sha256(text.encode()).hexdigest()
    return (text.removesuffix("\n}") + f',\n "{KEY}": "{own}"\n}}').encode()


def is_as_signed(raw: bytes, own: str) -> bool:
    """Whether the file that ends with the SHA-256 `own` is as `signed` wrote it, to the byte."""
    tail = f',\n "{KEY}": "{own}"\n}}'.encode()
    return raw.endswith(tail) and hashlib.sha256(raw.removesuffix(tail) + b"\n}").hexdigest() == own
