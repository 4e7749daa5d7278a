"""Builds a zoo in units, each a Ray task that writes one part, so that whatever dies, finished units stay.

    ZOO/unfinished/origin.json        what is being made; written first
    ZOO/states/part-00003.parquet     a unit's states, whole or not at all
    ZOO/unfinished/unit-00003.json    its report, written last: the unit is finished

When all units have reports, the caller commits `zoo.json` and the folder `unfinished` goes.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from distrecon.errors import reading
from distrecon.zoos import format as zoo_format
from distrecon.zoos import tasks
from distrecon.zoos.storage import Store
from distrecon.zoos.writer import Writer

Progress = Callable[[int, int, float], None]  # models done, models in all, seconds since the call


class Unit(Protocol):
    """A part to write: its number in the zoo, and its models."""

    @property
    def number(self) -> int: ...

    @property
    def models(self) -> Sequence[Any]: ...


def report_name(number: int) -> str:
    return f"unfinished/unit-{number:05d}.json"


def begin(writer: Writer, origin: Any) -> int:
    """Says what is being made, from that part number of the zoo on which it answers."""
    first = next_part(writer.store)
    writer.begin({"first_unit": first, "origin": origin})
    return first


def begun(where: Store) -> tuple[int, Any] | None:
    """The first unit's number and what is being made, or None; clears what was left of a build that did commit.

    Who goes on with it calls `go_on`. Raises UserError where what it is cannot be read.
    """
    if not where.exists("unfinished"):
        return None
    if where.exists(zoo_format.UNFINISHED):
        with reading(f"{where.path(zoo_format.UNFINISHED)} (delete its folder to begin anew)"):
            content = json.loads(where.read(zoo_format.UNFINISHED))
            first, origin = content["first_unit"], content["origin"]
            origin["kind"]
        if next_part(where) == first:
            return first, origin
    finish(where)
    return None


def go_on(writer: Writer, first: int, origin: Any) -> None:
    """Takes over what was begun; on a store without locks, a writer that still works on it is told when it looks."""
    writer.begin({"first_unit": first, "origin": origin})


def next_part(where: Store) -> int:
    """The number of the next part to append: one more than the largest that `zoo.json` lists."""
    if not where.exists(zoo_format.MANIFEST):
        return 0
    parts = zoo_format.parts_of(zoo_format.read_manifest(where))
    return max((zoo_format.part_number(part.file) for part in parts), default=-1) + 1


def run(
    units: Sequence[Unit],
    function: Callable[..., dict[str, Any]],
    writer: Writer,
    *shared: Any,
    progress: Progress | None,
    resources: dict[str, Any],
) -> list[dict[str, Any]]:
    """Reports of all units, in order, after running `function(unit, store, *shared)` for the missing ones.

    The function writes the unit's part and returns its report, plain JSON data, which this then keeps. Raises UserError
    where another writer takes over.
    """
    where = writer.store
    finished = set(where.names("unfinished"))
    missing = [unit for unit in units if report_name(unit.number) not in finished]
    total = sum(len(unit.models) for unit in units)
    done = total - sum(len(unit.models) for unit in missing)
    start = time.monotonic()
    if progress:
        progress(done, total, 0.0)
    for unit, _ in tasks.run(_keep_report, missing, function, writer, *shared, resources=resources):
        done += len(unit.models)
        if progress:
            progress(done, total, time.monotonic() - start)
    writer.check()
    try:
        return [json.loads(where.read(report_name(unit.number))) for unit in units]
    except FileNotFoundError:
        writer.check()  # another one has finished it since
        raise


def _keep_report(unit: Unit, function: Callable[..., dict[str, Any]], writer: Writer, *shared: Any) -> None:
    writer.check()
    report = function(unit, writer.store, *shared)
    writer.check()
    writer.store.write(report_name(unit.number), json.dumps(report).encode())


def finish(where: Store) -> None:
    """After the commit."""
    where.delete_folder("unfinished")
