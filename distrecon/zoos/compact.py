"""`compact`: a zoo's many small files joined to few, of which reading asks for less.

The row groups stay as they are, in the same order: rows, batches and the zoo's digest do too. The new files are written
beside the old ones; `zoo.json` is replaced once, which is the commit, and only then the old files go. Whatever dies
leaves the zoo of before, or the new one; the same command goes on and clears what was left.
"""

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distrecon.errors import UserError
from distrecon.zoos import build, parallel
from distrecon.zoos import format as zoo_format
from distrecon.zoos.format import Part
from distrecon.zoos.storage import Store, store
from distrecon.zoos.writer import Writer, writing
from distrecon.zoos.zoo import Zoo, open_zoo

FILE_BYTES = 64 * 2**20  # of weights in a file: some pieces, and what a task holds in memory a few times
KIND = "compact"


@dataclass(frozen=True)
class Joined:
    """A file to write: its number, and the parts that it joins (positions)."""

    number: int
    parts: tuple[int, ...]


def compact(
    path: str | os.PathLike[str] | Store,
    filesystem: Any = None,
    progress: build.Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> tuple[int, int]:
    """Joins neighbouring small files of a zoo to files of about `file_bytes` of weights; how many it had and has.

    In parallel: as Ray tasks where this process has joined a cluster, else in threads. Raises UserError for what is no
    zoo, where another process writes it or something unfinished is in it, and for a file that is missing or damaged;
    the zoo is then as it was.
    """
    where = path if isinstance(path, Store) else store(path, filesystem)
    open_zoo(where)  # refuses what is no zoo before anything is made
    with writing(where) as writer:
        zoo = open_zoo(where)
        before = list(dict.fromkeys(part.file for part in zoo.parts))
        begun = build.begun(where)
        if begun is not None and begun[1]["kind"] != KIND:
            raise UserError(f"{where} has an unfinished {begun[1]['kind']}: finish it by the command that began it")
        joined = _joined(zoo, build.next_part(where), file_bytes)
        if joined:
            build.begin(writer, {"kind": KIND})
            _commit(writer, zoo, _written(zoo, joined, progress))
        _clear(where)
    return len(before), len({part.file for part in open_zoo(where).parts})


def _joined(zoo: Zoo, number: int, file_bytes: int) -> list[Joined]:
    """What to write. Files that are large enough, and can be read as they are, stay."""
    row_bytes = 4 * zoo.architecture.num_parameters
    found: list[Joined] = []
    waiting: list[int] = []
    files, size = 0, 0

    def close() -> None:
        nonlocal waiting, files, size
        if files > 1 or any(zoo.parts[n].footer is None for n in waiting):
            found.append(Joined(number + len(found), tuple(waiting)))
        waiting, files, size = [], 0, 0

    for _, of in itertools.groupby(range(len(zoo.parts)), lambda n: zoo.parts[n].file):
        those = list(of)
        more = row_bytes * sum(zoo.parts[n].rows for n in those)
        if waiting and size + more > file_bytes:
            close()
        waiting, files, size = [*waiting, *those], files + 1, size + more
    close()
    return found


def _written(zoo: Zoo, joined: Sequence[Joined], progress: build.Progress | None) -> list[Part]:
    """The zoo's parts, where they lie when all has been written."""
    parts = list(zoo.parts)
    done, total, start = 0, sum(zoo.parts[n].rows for item in joined for n in item.parts), time.monotonic()
    for item, found in parallel.run(_write, joined, zoo):
        for n, part in zip(item.parts, found, strict=True):
            parts[n] = part
        done += sum(part.rows for part in found)
        if progress:
            progress(done, total, time.monotonic() - start)
    return [part for part in parts if part.rows]


def _write(item: Joined, zoo: Zoo) -> list[Part]:
    """Writes one file; the parts in it, as they now lie."""
    file = zoo_format.part_name(item.number)
    chosen = np.flatnonzero((item.parts[0] <= zoo.layout.part_G) & (zoo.layout.part_G <= item.parts[-1]))
    tables = (table for _, table in zoo.read(zoo.groups(chosen)))
    schema = zoo_format.schema(zoo.architecture.num_parameters)
    seal, footer = zoo_format.write_groups(zoo.store, file, schema, tables)
    counts = np.bincount(zoo.layout.part_G[chosen] - item.parts[0], minlength=len(item.parts))
    starts = counts.cumsum() - counts
    return [
        replace(zoo.parts[n], file=file, group=int(group), seal=seal, footer=footer)
        for n, group in zip(item.parts, starts, strict=True)
    ]


def _commit(writer: Writer, zoo: Zoo, parts: Sequence[Part]) -> None:
    info, states = zoo.info, {part.file for part in zoo.parts}
    zoo_format.commit(
        writer.store,
        name=zoo.name,
        arch=zoo.architecture,
        image_set=info["image_set"],
        parts=parts,
        origin=info["origin"],
        excluded=info["excluded"],
        files={file: mark for file, mark in zoo.sealed.items() if file not in states},
        kept={"digest": zoo.digest, "piece_bytes": info.get("piece_bytes", 0)},
        writer=writer,
    )


def _clear(where: Store) -> None:
    """Deletes what is no part of the zoo, or no more; nobody else writes it now."""
    listed = {part.file for part in open_zoo(where).parts}
    for name in where.names("states"):
        if name not in listed:
            where.delete(name)
    if where.exists("unfinished"):
        build.finish(where)
