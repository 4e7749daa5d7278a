"""Where the row groups of a part lie in its file, with a SHA-256 of each one's weights and of its other columns.

A part's footer holds this list (`KEY`, base64 of `ENTRY`), and `zoo.json` the seal of the footer. So a reader verifies
exactly what it reads: the footer once in a process, each row group the first time. The weights of a row group are its
float32 one after the other, as the Parquet page that holds them stores them: they are read as they lie, without
decoding, which costs more than their SHA-256 does.

Legend: G row groups, P parameters.
"""

import base64
import bisect
import contextlib
import hashlib
import io
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrecon.errors import UserError, said
from distrecon.zoos import seals
from distrecon.zoos.storage import Store

KEY = b"distrecon.row_groups"
ENTRY = np.dtype(
    [
        ("start", "<i8"),
        ("weights", "<i8"),
        ("after", "<i8"),
        ("end", "<i8"),
        ("sha_weights", "V32"),
        ("sha_rest", "V32"),
    ]
)  # byte offsets in the file: its weights' values are weights..after, its other columns the rest of start..end
Entry = tuple[int, int, int, int, bytes, bytes]  # as Python reads one
LOCAL_BYTES = 256 * 2**20  # of a file through which other columns than the weights are picked together
REMOTE_BYTES = 16 * 2**20  # of neighbouring row groups in one request to an object store
REMOTE_GAP = 64 * 1024  # bytes that are read for nothing rather than begin another request

_known: dict[tuple[str, str, str], "RowGroups"] = {}  # store, file and seal of the footer


class Sink:
    """A file in memory that a Parquet writer fills row group by row group, and that lists them."""

    def __init__(self) -> None:
        self.content, self.entries = io.BytesIO(), []  # type: tuple[io.BytesIO, list[np.ndarray]]

    def close_group(self, start: int, weights: np.ndarray) -> None:
        """Lists what was written from `start` on: a row group with these weights."""
        with self.content.getbuffer() as buffer, buffer[start:] as written:
            values = np.ascontiguousarray(weights).data.cast("B")
            at = bytes(written).find(values)
            if at < 0:
                raise RuntimeError("the Parquet writer has not stored a row group's weights in one run")
            after = at + len(values)
            rest = hashlib.sha256(written[:at])
            rest.update(written[after:])
            digests = hashlib.sha256(values).digest(), rest.digest()
            places = start, start + at, start + after, start + len(written)
        self.entries.append(np.array([(*places, *digests)], ENTRY))

    def listing(self) -> dict[bytes, bytes]:
        """For the footer."""
        return {KEY: base64.b64encode(np.concatenate([np.empty(0, ENTRY), *self.entries]).tobytes())}


def footer_size(tail: bytes | memoryview) -> int:
    """How many of its last bytes are a Parquet file's footer, by the last eight."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def footer_seal(store: Store, file: str) -> str | None:
    """The seal of a part's footer; None where that lists no row groups, or cannot be read."""
    with store.open(file) as source:
        size = source.size()
        source.seek(max(0, size - 8))
        length = footer_size(source.read(8))
        source.seek(max(0, size - length))
        footer = source.read(length)
    try:
        listed = KEY in (pq.read_metadata(pa.BufferReader(footer)).metadata or {})
    except Exception:  # whatever a damaged file makes the reader raise; the file's own seal tells of it
        return None
    return seals.seal(footer) if listed else None


@dataclass(frozen=True)
class RowGroups:
    """The list of one part, as its footer has it; `seen` says what this process has verified (weights, rest)."""

    entries_G: np.ndarray
    seen_G2: np.ndarray


def read(
    store: Store, file: str, footer: str, groups: Sequence[int], columns: Sequence[str], weights_type: pa.DataType
) -> Iterator[pa.Table]:
    """Row groups of a part, in order, each verified the first time that this process reads it.

    `footer` is the seal of its footer. Raises UserError where the footer or a row group is not what was written.
    """
    with _refusing(store, file), store.open(file) as source:
        pieces, others = _Pieces(source, 0 if store.local else REMOTE_GAP), columns != ["weights"]
        found, fetched = _known.get((str(store), file, footer)), columns
        if found is None or (others and not (store.local and found.seen_G2[groups, 1].all())):
            found, parquet = _listed(store, file, footer, pieces)
        else:  # what was verified before of the other columns, Parquet reads from the disk
            parquet = pq.ParquetFile(source) if others else None
            fetched = [column for column in columns if column == "weights"]
        for run in _runs(found.entries_G, groups, columns, store.local):
            entries = [found.entries_G[group].item() for group in run]
            pieces.fetch(_wanted(entries, fetched))
            for group, entry in zip(run, entries, strict=True):
                if wrong := _wrong(entry, found.seen_G2[group], fetched, pieces):
                    raise _damaged(store, file, f"the SHA-256 of {wrong} {group} is another")
                if others and fetched is columns:
                    start, weights, after, end, *_ = entry
                    pieces.place(start, weights)
                    pieces.place(after, end)
                yield _table(entry, group, columns, pieces, parquet, weights_type)


def listed(store: Store, file: str, footer: str) -> np.ndarray:
    """The list of a part [G] of `ENTRY`, by the seal of its footer; UserError as of `read`."""
    if (key := (str(store), file, footer)) in _known:
        return _known[key].entries_G
    with _refusing(store, file), store.open(file) as source:
        return _listed(store, file, footer, _Pieces(source, 0))[0].entries_G


@contextlib.contextmanager
def _refusing(store: Store, file: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{store.path(file)} is missing; the zoo lists it") from None
    except UserError:
        raise
    except Exception as error:  # the reader raises nearly anything on a damaged file
        raise UserError(f"{store.path(file)} is damaged: {said(error)}") from None


def _listed(store: Store, file: str, wanted: str, pieces: "_Pieces") -> tuple[RowGroups, pq.ParquetFile]:
    """The part's list, from its footer; and the part, of which Parquet sees what is placed in the pieces' image."""
    begin = max(0, pieces.size - int(wanted.rpartition(":")[2]))
    pieces.fetch([(begin, pieces.size)])
    if seals.seal(pieces.buffer(begin, pieces.size)) != wanted:
        raise _damaged(store, file, "its footer's SHA-256 is another")
    pieces.place(begin, pieces.size)
    parquet = pq.ParquetFile(pa.BufferReader(pieces.image))
    if (key := (str(store), file, wanted)) not in _known:
        entries_G = np.frombuffer(base64.b64decode(parquet.metadata.metadata[KEY]), ENTRY)
        _known[key] = RowGroups(entries_G, np.zeros((len(entries_G), 2), bool))
    return _known[key], parquet


def _damaged(store: Store, file: str, what: str) -> UserError:
    return UserError(
        f"{store}: {file} is damaged: it is not what was written there ({what}); zoo check lists all that is wrong"
    )


def _runs(entries_G: np.ndarray, groups: Sequence[int], columns: Sequence[str], local: bool) -> Iterator[list[int]]:
    """The row groups that are read together: each for itself where weights lie on a disk, else neighbours."""
    limit = REMOTE_BYTES if not local else 0 if "weights" in columns else LOCAL_BYTES
    run: list[int] = []
    for group in groups:
        if run and (entries_G["end"][group] - entries_G["start"][run[0]] > limit or group < run[-1]):
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _wanted(entries: Sequence[Entry], columns: Sequence[str]) -> list[tuple[int, int]]:
    """Which bytes of the file hold the columns, in order."""
    found = []
    for start, weights, after, end, *_ in entries:
        if columns == ["weights"]:
            found.append((weights, after))
        elif columns:
            found += [(start, end)] if "weights" in columns else [(start, weights), (after, end)]
    return found


def _wrong(entry: Entry, seen: np.ndarray, columns: Sequence[str], pieces: "_Pieces") -> str | None:
    """Which columns of a row group are wrong, by their SHA-256, unless this process has compared them before."""
    start, weights, after, end, sha_weights, sha_rest = entry
    if "weights" in columns and not seen[0]:
        if hashlib.sha256(pieces.buffer(weights, after)).digest() != sha_weights:
            return "the weights of row group"
        seen[0] = True
    if columns != ["weights"] and not seen[1]:
        rest = hashlib.sha256(pieces.buffer(start, weights))
        rest.update(pieces.buffer(after, end))
        if rest.digest() != sha_rest:
            return "row group"
        seen[1] = True
    return None


def _table(
    entry: Entry,
    group: int,
    columns: Sequence[str],
    pieces: "_Pieces",
    parquet: pq.ParquetFile | None,
    weights_type: pa.DataType,
) -> pa.Table:
    _, begin, end, *_ = entry
    if parquet is None or columns == ["weights"]:
        return pa.table([_weights(pieces.buffer(begin, end), weights_type)], names=["weights"])
    others = [column for column in columns if column != "weights"]
    table = parquet.read_row_group(group, columns=others, use_threads=False).replace_schema_metadata(None)
    if "weights" in columns:
        values = _weights(pieces.buffer(begin, end), weights_type)
        table = table.add_column(columns.index("weights"), "weights", values)
    return table


def _weights(values: pa.Buffer, weights_type: pa.DataType) -> pa.ExtensionArray:
    """Weights from their bytes, which are copied where they do not lie as numbers must."""
    if values.address % 64:
        values = pa.py_buffer(np.frombuffer(values, np.uint8).copy())
    floats = pa.Array.from_buffers(pa.float32(), values.size // 4, [None, values])
    return pa.ExtensionArray.from_storage(
        weights_type, pa.FixedSizeListArray.from_arrays(floats, weights_type.shape[0])
    )


class _Pieces:
    """Some bytes of a file, in memory, under their offsets in it."""

    def __init__(self, source: pa.NativeFile, gap: int) -> None:
        self.source, self.gap, self.size = source, gap, source.size()
        self.begins: list[int] = []
        self.contents: list[pa.Buffer] = []

    @cached_property
    def image(self) -> pa.Buffer:
        """As large as the file, with what was placed in it; only that takes memory."""
        return pa.py_buffer(self._image)

    @cached_property
    def _image(self) -> mmap.mmap:
        return mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def place(self, begin: int, end: int) -> None:
        self._image[begin:end] = self.buffer(begin, end)

    def fetch(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Reads ranges, which rise, in place of those before; as one where no more than `gap` lies between them."""
        self.begins, self.contents = [], []
        merged: list[list[int]] = []
        for begin, end in wanted:
            if merged and begin - merged[-1][1] <= self.gap:
                merged[-1][1] = end
            else:
                merged.append([begin, end])
        for begin, end in merged:
            self.source.seek(begin)
            self.begins.append(begin)
            self.contents.append(self.source.read_buffer(end - begin))

    def buffer(self, begin: int, end: int) -> pa.Buffer:
        number = bisect.bisect_right(self.begins, begin) - 1
        if number >= 0 and end <= self.begins[number] + self.contents[number].size:
            return self.contents[number].slice(begin - self.begins[number], end - begin)
        raise ValueError(f"bytes {begin} to {end} are not there")
