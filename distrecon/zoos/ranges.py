"""Weights straight from the bytes of a zoo's files: what a task that reads for training does.

The process that plans the reading asks the files' footers where each row group's weights lie (`row_groups.py`); the
tasks are told, and read nothing else of the files: on local disks into one array that is kept from task to task, from
object stores as a few large ranges at once. What a stream reads for the first time is compared with its SHA-256.

Legend: N row groups, K spans, R rows, P parameters.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distrecon.errors import UserError, reading, said
from distrecon.zoos import format as zoo_format
from distrecon.zoos import row_groups
from distrecon.zoos.storage import Store
from distrecon.zoos.zoo import Zoo

GAP_BYTES = 256 * 1024  # between two runs that are worth a request of their own
RANGE_BYTES = 16 * 2**20  # of one request
REQUESTS = 16  # at once, of one task
OPEN = 256  # files of object stores that a process remembers

_kept: list[np.ndarray] = []  # the array that this process reads into
_open: dict[tuple[str, str, str | None], pa.NativeFile] = {}
_opening = threading.Lock()


@dataclass(frozen=True)
class Reads:
    """Row groups to read, and which of their rows: `files[file_N]`, rows skip_N .. skip_N + take_N - 1 of rows_N."""

    files: tuple[str, ...]
    seals: tuple[str | None, ...]  # of the files' footers
    file_N: np.ndarray
    offset_N: np.ndarray  # of the first weight in the file
    rows_N: np.ndarray
    skip_N: np.ndarray
    take_N: np.ndarray
    sha_N: np.ndarray  # of its weights
    compare_N: np.ndarray  # whether they are to be compared, or were before


def reads_of(zoo: Zoo, spans_K2: np.ndarray, compared_G: np.ndarray) -> Reads:
    """What to read for some spans of rows (first row, rows), in their order; sets `compared_G` of their row groups.

    Raises UserError for a file that is missing or whose footer is damaged.
    """
    layout = zoo.layout
    groups = [layout.groups_of(span[None]) for span in spans_K2]
    group_N = np.concatenate([np.empty(0, np.int64), *groups])
    begin_N, end_N = (np.repeat(bound, [len(each) for each in groups]) for bound in (spans_K2[:, 0], spans_K2.sum(1)))
    first_N, rows_N = layout.first_G[group_N], layout.rows_G[group_N]
    skip_N = np.maximum(begin_N - first_N, 0)
    compare_N = ~compared_G[group_N]
    compared_G[group_N] = True
    part_N = layout.part_G[group_N]
    footers = {zoo.parts[number].file: zoo.parts[number].footer for number in np.unique(part_N)}
    files = {file: number for number, file in enumerate(footers)}
    file_N = np.array([files[zoo.parts[number].file] for number in part_N.tolist()], np.int64)
    with ThreadPoolExecutor(REQUESTS) as pool:
        listed = list(pool.map(lambda item: row_groups.listed(zoo.store, *item), footers.items()))
    entry_N = np.empty(len(group_N), row_groups.ENTRY)
    for number, entries_G in enumerate(listed):
        with reading(zoo.store.path([*files][number])):
            entry_N[file_N == number] = entries_G[layout.group_G[group_N][file_N == number]]
    with reading(zoo.store.path(zoo_format.MANIFEST)):
        if (entry_N["after"] - entry_N["weights"] != rows_N * zoo.architecture.num_parameters * 4).any():
            raise ValueError("its row groups are not those of its files")
    return Reads(
        tuple(footers),
        tuple(footers.values()),
        file_N,
        entry_N["weights"].copy(),
        rows_N,
        skip_N,
        np.minimum(end_N - first_N, rows_N) - skip_N,
        entry_N["sha_weights"].copy(),
        compare_N,
    )


def read(store: Store, num_parameters: int, reads: Reads) -> np.ndarray:
    """weights[R, P] float32 of the rows, which stand until this process reads again.

    Raises UserError that names a file that is missing, cut short, or not what was written there.
    """
    out_RP = _array(int(reads.take_N.sum()) * num_parameters).reshape(-1, num_parameters)
    starts = reads.take_N.cumsum() - reads.take_N
    out_N = [out_RP[start : start + take] for start, take in zip(starts, reads.take_N, strict=True)]
    if store.local:
        for number, file in enumerate(reads.files):
            with _naming(store.path(file)):
                _from_disk(store.path(file), reads, np.flatnonzero(reads.file_N == number).tolist(), out_N)
    else:
        with ThreadPoolExecutor(REQUESTS) as pool:
            for _ in pool.map(lambda those: _from_store(store, reads, those, out_N), requests(reads, num_parameters)):
                pass
    return out_RP


def _array(numbers: int) -> np.ndarray:
    """Memory of this process that has been used before: fresh pages cost more than what is read into them."""
    if not _kept or len(_kept[0]) < numbers:
        _kept[:] = [np.empty(numbers, np.float32)]
    return _kept[0][:numbers]


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of the operating system that name the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the zoo lists it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {said(error)}") from None


def _from_disk(path: str, reads: Reads, those: Sequence[int], out_N: Sequence[np.ndarray]) -> None:
    """The row groups `those` of one file, each into its place."""
    file = os.open(path, os.O_RDONLY)
    try:
        for n in those:
            whole = len(out_N[n]) == reads.rows_N[n]
            run = out_N[n] if whole else np.empty((reads.rows_N[n], out_N[n].shape[1]), np.float32)
            got, bytes_ = 0, run.data.cast("B")
            while got < len(bytes_) and (more := os.preadv(file, [bytes_[got:]], int(reads.offset_N[n]) + got)):
                got += more
            _take(path, reads, n, bytes_[:got], out_N[n])
    finally:
        os.close(file)


def _from_store(store: Store, reads: Reads, those: Sequence[int], out_N: Sequence[np.ndarray]) -> None:
    """Neighbouring row groups of one file, by one request."""
    number = reads.file_N[those[0]]
    path, row_bytes = store.path(reads.files[number]), 4 * out_N[those[0]].shape[1]
    begin = int(reads.offset_N[those[0]])
    end = int(reads.offset_N[those[-1]] + reads.rows_N[those[-1]] * row_bytes)
    with _naming(path):
        content = memoryview(_opened(store, reads.files[number], reads.seals[number]).read_at(end - begin, begin))
    for n in those:
        start = int(reads.offset_N[n]) - begin
        _take(path, reads, n, content[start : start + int(reads.rows_N[n]) * row_bytes], out_N[n])


def _opened(store: Store, file: str, seal: str | None) -> pa.NativeFile:
    """A file of an object store, whose size is asked for once in a process; another `seal`, another file."""
    key = str(store), file, seal
    with _opening:
        found = _open.get(key)
    if found is None:
        found = store.open(file)
        with _opening:  # several threads read for one task
            while len(_open) >= OPEN:
                del _open[next(iter(_open))]
            _open[key] = found
    return found


def requests(reads: Reads, num_parameters: int) -> list[list[int]]:
    """The row groups (positions in `reads`) by request to an object store: neighbours in a file are read at once."""
    ranges: list[list[int]] = []
    end, file, begin = -1, -1, 0
    for n in np.lexsort((reads.offset_N, reads.file_N)).tolist():
        offset, after = int(reads.offset_N[n]), int(reads.offset_N[n] + 4 * num_parameters * reads.rows_N[n])
        if ranges and reads.file_N[n] == file and offset - end <= GAP_BYTES and after - begin <= RANGE_BYTES:
            ranges[-1].append(n)
        else:
            ranges.append([n])
            file, begin = reads.file_N[n], offset
        end = after
    return ranges


def _take(path: str, reads: Reads, n: int, content: memoryview, out_RP: np.ndarray) -> None:
    """Puts the wanted rows of a row group in their place, after comparing all of it with its SHA-256."""
    wanted = int(reads.rows_N[n]) * out_RP.shape[1] * 4
    if len(content) != wanted:
        raise UserError(f"{path} is damaged: it ends before its weights; zoo check lists all that is wrong")
    if reads.compare_N[n] and hashlib.sha256(content).digest() != reads.sha_N[n].tobytes():
        raise UserError(
            f"{path} is damaged: the SHA-256 of the weights at byte {reads.offset_N[n]} is another; zoo check lists "
            "all that is wrong"
        )
    if content.obj is not out_RP:
        rows_SP = np.frombuffer(content, np.float32).reshape(-1, out_RP.shape[1])
        out_RP[:] = rows_SP[reads.skip_N[n] : reads.skip_N[n] + len(out_RP)]
