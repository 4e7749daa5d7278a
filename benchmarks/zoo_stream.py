"""Streaming: 200,000 states of 1,198 parameters (about 1 GiB) through two workers, against pyarrow and torch.load.

    python benchmarks/zoo_stream.py [--states 200000] [--folder DIR]

Each worker is a process of its own and checks, by ids in the weights, that it gets every row of its share exactly once
an epoch. Prints states/s and MiB/s of both workers together, each worker's peak memory (VmHWM: with all the
shared memory that it touched), and the same for the reading tasks.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch

from distrecon.nets import architecture
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.storage import store
from distrecon.zoos.stream import shard_rows, stream

PART = 12_500  # states in a file: 57 MiB
ARCH = architecture("cnn_small")


def make(folder: Path, states: int) -> Zoo:
    """A zoo of random numbers whose first two weights tell the row."""
    where, parts = store(folder), []
    for number, first in enumerate(range(0, states, PART)):
        rows = np.arange(first, min(first + PART, states))
        theta_SP = torch.from_numpy(
            np.random.default_rng(number).standard_normal((len(rows), ARCH.num_parameters), np.float32)
        )
        theta_SP[:, 0], theta_SP[:, 1] = torch.from_numpy(rows // 1000), torch.from_numpy(rows % 1000)
        table = zoo_format.states_table(
            ARCH,
            model_id=[f"m{row // 4}" for row in rows],
            epoch=[int(row % 4) for row in rows],
            split=["train"] * len(rows),
            theta_SP=theta_SP,
            metrics={metric: [0.5] * len(rows) for metric in zoo_format.METRICS},
            config=["{}"] * len(rows),
        )
        parts.append(zoo_format.write_part(where, zoo_format.part_name(number), table))
    images = {"name": "digits", "directory": None, "preprocessing": "", "classes": []}
    zoo_format.commit(where, name="made", arch=ARCH, image_set=images, parts=parts, origin={"kind": "benchmark"})
    return open_zoo(folder)


def memory_mib(kind: str, pid: str = "self") -> float:
    """A process's memory; VmHWM: the most it ever held, shared pages included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


@ray.remote(num_cpus=0.9)
class Worker:
    """One rank: iterates over its share and checks it."""

    def __init__(self, folder: str, rank: int, world_size: int, batch_size: int) -> None:
        self.zoo, self.rank, self.world_size, self.batch_size = open_zoo(folder), rank, world_size, batch_size
        torch.set_num_threads(1)

    def run(self, first_epoch: int, last_epoch: int) -> dict:
        share = shard_rows(self.zoo, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size)
        seen = {epoch: [] for epoch in range(first_epoch, last_epoch + 1)}
        start = first = time.monotonic()
        for number, batch in enumerate(
            stream(
                [self.zoo],
                batch_size=self.batch_size,
                first_epoch=first_epoch,
                last_epoch=last_epoch,
                rank=self.rank,
                world_size=self.world_size,
            )
        ):
            if number == 0:
                first = time.monotonic()
            ids = (batch.theta_bP[:, 0] * 1000 + batch.theta_bP[:, 1]).long()
            assert torch.equal(ids, batch.row_b)
            seen[batch.epoch].append(batch.row_b)
        end = time.monotonic()
        for rows in seen.values():
            assert torch.equal(torch.cat(rows).sort().values, share)
        shared = memory_mib("RssShmem")  # of it, pages of Ray's object store, which both workers and the readers share
        return {"seconds": end - start, "first": first - start, "peak": memory_mib("VmHWM"), "shared": shared}


def stat(pid: str) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def ray_processes() -> Iterator[tuple[str, str]]:
    """(pid, name) of this Ray session's raylet, which holds the object store, and of its workers."""
    session = ray._private.worker._global_node.get_session_dir_path()
    names = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            names[path.parent.name] = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    raylets = {pid for pid, name in names.items() if "raylet/raylet" in name.split("\0")[0] and session in name}
    for pid, name in names.items():
        if pid in raylets or (name.startswith("ray::") and stat(pid)[1] in raylets):
            yield pid, name


def cpu_seconds() -> float:
    """Processor time that all of them have used, and their children that have ended."""
    ticks = sum(int(ticks) for pid, _ in ray_processes() for ticks in stat(pid)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def reader_peaks() -> list[float]:
    """Peak memory of the processes that read, busy or idle now."""
    return [memory_mib("VmHWM", pid) for pid, name in ray_processes() if "MapBatches" in name or "IDLE" in name]


def pyarrow_seconds(zoo: Zoo, threads: bool) -> tuple[float, float]:
    """Wall and processor seconds of reading the weights of every file, one after the other, into numpy."""
    start, cpu = time.monotonic(), time.process_time()
    for part in zoo.parts:
        table = pq.read_table(zoo.store.path(part.file), columns=["weights"], use_threads=threads)
        zoo_format.weights_array(table["weights"])
    return time.monotonic() - start, time.process_time() - cpu


def torch_load_seconds(folder: Path, count: int = 2000) -> tuple[float, float]:
    """Wall and processor seconds a state, one file each, as published zoos lie."""
    folder.mkdir()
    state = ARCH.unflatten(torch.randn(ARCH.num_parameters))
    for i in range(count):
        torch.save(state, folder / f"{i}.pt")
    start, cpu = time.monotonic(), time.process_time()
    for i in range(count):
        ARCH.flatten(torch.load(folder / f"{i}.pt", weights_only=True))
    return (time.monotonic() - start) / count, (time.process_time() - cpu) / count


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--states", type=int, default=200_000)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--folder", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        zoo = make(work / "zoo", args.states)
        mib = args.states * ARCH.num_parameters * 4 / 2**20
        print(f"{args.states} states, {mib:.0f} MiB, {len(zoo.row_groups)} row groups")
        loads = tuple(args.states * seconds for seconds in torch_load_seconds(work / "files"))
        alone = min(pyarrow_seconds(zoo, threads=False) for _ in range(2))
        threaded = min(pyarrow_seconds(zoo, threads=True) for _ in range(2))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        workers = [Worker.remote(str(work / "zoo"), rank, 2, args.batch_size) for rank in range(2)]
        ray.get([w.run.remote(0, 0) for w in workers])  # starts the reading processes
        start, cpu = time.monotonic(), cpu_seconds()
        results = ray.get([w.run.remote(1, args.epochs) for w in workers])
        streamed = ((time.monotonic() - start) / args.epochs, (cpu_seconds() - cpu) / args.epochs)
        print("every row exactly once in each epoch, by ids: yes")
        print(f"peak memory of the workers {[round(r['peak']) for r in results]} MiB, ", end="")
        print(f"of it shared with the object store {[round(r['shared']) for r in results]} MiB")
        print(f"peak memory of the readers {[round(p) for p in reader_peaks()]} MiB")
        print(f"{'':28} {'states/s':>10} {'MiB/s':>8} {'of pyarrow':>10} {'CPU-s':>8}")
        for name, (wall, cpu) in (
            ("stream, two workers", streamed),
            ("pyarrow alone, one thread", alone),
            ("pyarrow alone, its threads", threaded),
            ("one torch.load per file", loads),
        ):
            speed = f"{args.states / wall:10,.0f} {mib / wall:8,.0f}"
            print(f"{name:28} {speed} {alone[0] / wall:10.2f} {cpu:8.1f}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
