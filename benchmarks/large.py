"""Zoos of millions of states: one written for the time and streamed once by two workers, and one that is a list only.

The states are random numbers whose first two weights tell the row, in files of 64 MiB; every row has to come once.
"""

import json
import resource
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.harness import Cell, Options, Part, Row, Table, memory, value
from benchmarks.pipeline import cpu_seconds, ray_processes, start_ray
from benchmarks.zoos import ARCH, SIDE, rows_of
from distrecon.errors import UserError
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.compact import FILE_BYTES
from distrecon.zoos.inspection import check, describe
from distrecon.zoos.storage import store
from distrecon.zoos.stream import plan, stream

STATE_BYTES = 4 * ARCH.num_parameters
PART_STATES = FILE_BYTES // STATE_BYTES
MARK = "sha256:" + 64 * "0" + ":1"  # of files that are not there


def _write(number: int, states: int, folder: str) -> zoo_format.Part:
    rows = np.arange(number * PART_STATES, min((number + 1) * PART_STATES, states))
    theta_SP = torch.randn(512, ARCH.num_parameters, generator=torch.Generator().manual_seed(number))
    theta_SP = theta_SP.repeat(-(-len(rows) // 512), 1)[: len(rows)]
    theta_SP[:, 0], theta_SP[:, 1] = torch.from_numpy(rows // SIDE), torch.from_numpy(rows % SIDE)
    table = zoo_format.states_table(
        ARCH,
        model_id=[f"m{row // 4}" for row in rows],
        epoch=[int(row % 4) for row in rows],
        split=["train"] * len(rows),
        theta_SP=theta_SP,
        metrics={metric: [0.5] * len(rows) for metric in zoo_format.METRICS},
        config=["{}"] * len(rows),
    )
    return zoo_format.write_part(store(folder), zoo_format.part_name(number), table)


def _commit(folder: Path, parts: list[zoo_format.Part]) -> Zoo:
    images = zoo_format.image_entry(None)
    zoo_format.commit(store(folder), name="large", arch=ARCH, image_set=images, parts=parts, origin={"kind": "random"})
    return open_zoo(folder)


@ray.remote(num_cpus=0.9)
class Reader:
    """One of two workers: its share, once."""

    def run(self, folder: str, rank: int, world: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        zoo = open_zoo(folder)
        seen = np.zeros(zoo.num_states, bool)
        rows, first = 0, 0.0
        for batch in stream([zoo], batch_size=64, last_epoch=0, rank=rank, world_size=world):
            found = rows_of(batch.theta_bP).numpy()
            assert (found == batch.row_b.numpy()).all()
            assert not seen[found].any()
            seen[found] = True
            rows += len(found)
            first = first or time.monotonic()
        peaks = {"peak": memory("VmHWM"), "shared": memory("RssShmem")}
        return {"seen": np.packbits(seen), "rows": rows, "first": first, "last": time.monotonic(), **peaks}


def written(states: int, folder: str | None, kept: str | None) -> list[Row]:
    """Written, unless it has been `kept`, streamed once by two workers, checked, described."""
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if not kept and states * STATE_BYTES * 1.2 > free:
        raise UserError(f"--states {states} take {states * STATE_BYTES / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    seconds: dict[str, float] = {}

    def clocked(what: str, work: Any) -> Any:
        start = time.monotonic()
        result = work()
        seconds[what] = time.monotonic() - start
        return result

    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(kept or Path(name) / "zoo")
        if not kept:
            numbers = range(-(-states // PART_STATES))
            clocked("write", lambda: _commit(place, [_write(number, states, str(place)) for number in numbers]))
        start_ray(2)
        try:
            cpu = cpu_seconds()
            readers = [Reader.remote() for _ in range(2)]  # type: ignore[attr-defined]
            found = ray.get([reader.run.remote(str(place), rank, 2) for rank, reader in enumerate(readers)])
            cpu = cpu_seconds() - cpu
            tasks = [memory("VmHWM", pid) for pid, name in ray_processes() if "MapBatches" in name or "IDLE" in name]
        finally:
            ray.shutdown()
        assert np.array_equal(found[0]["seen"] ^ found[1]["seen"], np.packbits(np.ones(states, bool)))
        zoo = open_zoo(place)
        assert not clocked("check", lambda: check(zoo, sample=0)).problems
        clocked("describe", lambda: describe(zoo))
    wall = max(each["last"] for each in found) - min(each["first"] for each in found)
    return [
        {
            "states": states,
            "states_per_second": states / wall,
            "cpu_seconds": cpu,
            "worker_mib": max(each["peak"] for each in found) / 2**20,
            "shared_mib": max(each["shared"] for each in found) / 2**20,
            "task_mib": max(tasks, default=0) / 2**20,
            **{f"{what}_seconds": spent for what, spent in seconds.items()},
        }
    ]


def listed(states: int) -> list[Row]:
    """A zoo's list without its files: opening, planning, the first window of two passes; the memory this took."""
    counts = [min(PART_STATES, states - first) for first in range(0, states, PART_STATES)]
    size = zoo_format.rows_per_group(ARCH.num_parameters)
    names = (zoo_format.part_name(number) for number in range(len(counts)))
    parts = [
        zoo_format.Part(n, size, {"train": c}, {"train": c}, MARK, MARK) for n, c in zip(names, counts, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        _commit(Path(folder), parts)
        before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.process_time()]

        def lap() -> float:
            clock.append(time.process_time())
            return 1e3 * (clock[-1] - clock[-2])

        zoo = open_zoo(folder)
        row: Row = {"states": states, "mib": len(json.dumps(zoo.info)) / 2**20, "open_ms": lap()}
        order = plan([zoo], batch_size=64).orders[0]
        row["plan_ms"] = lap()
        order.window(0, 0, 0, 2)
        row["first_ms"] = lap()
        for window in range(1, 101):
            order.window(0, window, 0, 2)
        row["window_ms"] = lap() / 100
        order.window(1, 0, 0, 2)
        row["next_pass_ms"] = lap()
        row["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [row]


def cells(args: Namespace) -> Iterator[Cell]:
    states, many = (20_000, 1_000_000) if args.quick else (args.states, args.listed)
    yield Cell({"what": "listed", "of": many}, partial(listed, many))
    yield Cell({"what": "streamed", "of": states}, partial(written, states, args.folder, args.kept))


_whole = "{:,.0f}".format
LISTED = Table(
    (
        value("MiB of zoo.json", "mib", "{:.1f}".format),
        value("open, ms", "open_ms", _whole),
        value("plan, ms", "plan_ms", _whole),
        value("first window", "first_ms", _whole),
        value("a window", "window_ms", "{:.1f}".format),
        value("next pass", "next_pass_ms", _whole),
        value("peak MiB", "peak_mib", _whole),
    ),
    by=lambda row: f"{row['states']:,} states listed",
)
STREAMED = Table(
    (
        value("states/s", "states_per_second", _whole),
        value("CPU-s", "cpu_seconds", _whole),
        value("MiB a worker", "worker_mib", _whole),
        value("of them shared", "shared_mib", _whole),
        value("MiB a reading task", "task_mib", _whole),
        value("written in, s", "write_seconds", _whole),
        value("checked in, s", "check_seconds", _whole),
        value("described in, s", "describe_seconds", _whole),
    ),
    by=lambda row: f"{row['states']:,} states streamed once",
)


def _tables(rows: Any, args: Namespace) -> str:
    from benchmarks.harness import written as told

    kinds = {"listed": LISTED, "streamed": STREAMED}
    chosen = {what: [row for row in rows if row["what"] == what] for what in kinds}
    return "\n\n".join(told(table, chosen[what]) for what, table in kinds.items() if chosen[what])


OPTIONS: Options = {
    "--states": {"type": int, "default": 2_600_000, "help": "written for the time: 12 GiB by default"},
    "--listed": {"type": int, "default": 26_000_000},
    "--folder": {"help": "where the zoo is written for the time (default: the system's)"},
    "--kept": {"metavar": "ZOO", "help": "a zoo of so many states that this part has written; it stays"},
}
PARTS = {"large_zoo": Part(cells, _tables, OPTIONS)}
