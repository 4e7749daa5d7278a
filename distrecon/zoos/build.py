"""Builds a zoo in units, each a Ray task that writes one part, so that whatever dies, finished units stay.

    ZOO/unfinished/origin.json        what is being made; written first
    ZOO/states/part-00003.parquet     a unit's states, whole or not at all
    ZOO/unfinished/unit-00003.json    its report, written last: the unit is finished

When all units have reports, the caller commits `zoo.json` and the folder `unfinished` goes.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from distrecon.zoos import format as zoo_format
from distrecon.zoos import tasks
from distrecon.zoos.storage import Store

Progress = Callable[[int, int, float], None]  # models done, models in all, seconds since the call


class Unit(Protocol):
    """A part to write: its number in the zoo, and its models."""

    @property
    def number(self) -> int: ...

    @property
    def models(self) -> Sequence[Any]: ...


def report_name(number: int) -> str:
    return f"unfinished/unit-{number:05d}.json"


def begin(where: Store, origin: Any) -> None:
    """Says what is being made, from part number `first_unit` of the zoo on."""
    first = next_part(where)
    where.write(zoo_format.UNFINISHED, json.dumps({"first_unit": first, "origin": origin}, indent=1).encode())


def begun(where: Store) -> tuple[int, Any] | None:
    """The first unit's number and what is being made, or None; clears what was left of a build that did commit."""
    if not where.exists("unfinished"):
        return None
    if where.exists(zoo_format.UNFINISHED):
        content = json.loads(where.read(zoo_format.UNFINISHED))
        if next_part(where) == content["first_unit"]:
            return content["first_unit"], content["origin"]
    finish(where)
    return None


def next_part(where: Store) -> int:
    """The number of the next part to append: one more than the largest that `zoo.json` lists."""
    if not where.exists(zoo_format.MANIFEST):
        return 0
    parts = zoo_format.parts_of(zoo_format.read_manifest(where))
    return max(zoo_format.part_number(part.file) for part in parts) + 1


def run(
    units: Sequence[Unit],
    function: Callable[..., dict[str, Any]],
    where: Store,
    *shared: Any,
    progress: Progress | None,
    resources: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Reports of all units, in order, after running `function(unit, where, *shared)` for the missing ones.

    The function writes the unit's part and returns its report, plain JSON data, which this then keeps.
    """
    finished = set(where.names("unfinished"))
    missing = [unit for unit in units if report_name(unit.number) not in finished]
    total = sum(len(unit.models) for unit in units)
    done = total - sum(len(unit.models) for unit in missing)
    start = time.monotonic()
    if progress:
        progress(done, total, 0.0)
    for unit, _ in tasks.run(_keep_report, missing, function, where, *shared, resources=resources):
        done += len(unit.models)
        if progress:
            progress(done, total, time.monotonic() - start)
    return (json.loads(where.read(report_name(unit.number))) for unit in units)


def _keep_report(unit: Unit, function: Callable[..., dict[str, Any]], where: Store, *shared: Any) -> None:
    report = function(unit, where, *shared)
    where.write(report_name(unit.number), json.dumps(report).encode())


def finish(where: Store) -> None:
    """After the commit."""
    where.delete_folder("unfinished")
