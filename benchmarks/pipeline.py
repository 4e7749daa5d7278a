"""What Ray costs: its start, a trial's overhead, a step's wait for its data; and streaming against plain reading.

The stream: 200,000 states of 1,198 parameters (about 1 GiB) through two workers, each a process of its own that checks,
by ids in the weights, that it gets every row of its share exactly once an epoch; against pyarrow and one torch.load a
state. Wall times; processor seconds are of all of Ray's processes.
"""

import itertools
import logging
import os
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import ray
import torch
from ray import tune

from benchmarks.harness import Cell, Options, Part, Row, Table, memory, speed, timing, value, written
from benchmarks.zoos import ARCH, random_zoo, rows_of
from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.model import ZooSample
from distrecon.autoencoder.training import Batch, Training
from distrecon.cluster.session import IDLE
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.stream import shard_rows, stream


def start_ray(cpus: int, object_store_memory: int | None = None) -> None:
    """A cluster of this machine alone, without what only people look at; idle processes stay as in the commands'."""
    os.environ |= IDLE
    ray.init(
        "local", num_cpus=cpus, object_store_memory=object_store_memory, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip


# -- Ray ---------------------------------------------------------------------------------------------------------------


def ray_costs(args: Namespace) -> list[Row]:
    """Starting Ray here, an empty trial of Ray Tune, and the waiting for data."""
    start = time.monotonic()
    start_ray(2, 256 * 2**20)
    rows = [timing("start of Ray on this machine", time.monotonic() - start)]
    try:
        trials = 4 if args.quick else 16
        with tempfile.TemporaryDirectory() as folder:
            tuner = tune.Tuner(
                tune.with_resources(lambda config: {"metric": config["x"]}, {"cpu": 1}),
                param_space={"x": tune.grid_search(list(range(trials)))},
                run_config=tune.RunConfig(storage_path=folder, verbose=0),
            )
            start = time.monotonic()
            tuner.fit()
            seconds = time.monotonic() - start
            rows.append(timing("an empty trial of Ray Tune", seconds / trials, note=f"{trials} trials, two at a time"))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(waiting(random_zoo(Path(folder) / "zoo", 320 if args.quick else 960), 3))
    finally:
        ray.shutdown()
    return rows


def waiting(zoo: Zoo, epochs: int) -> Row:
    """Share of an epoch that steps of the default configuration wait for Ray Data, after the first epoch."""
    config = AutoencoderConfig()
    sample_BP = zoo.sample(64, 0)
    training = Training(config, [ZooSample(zoo.architecture, sample_BP, zoo.images())], total_steps=1000)
    waited: dict[int, float] = defaultdict(float)
    spent: dict[int, float] = defaultdict(float)
    asked = time.monotonic()
    for batch in stream([zoo], batch_size=config.optim.batch_size, last_epoch=epochs - 1):
        came = time.monotonic()
        training.step(Batch(batch.epoch, batch.step, 0, batch.row_b, batch.theta_bP, batch.global_size, batch.offset))
        waited[batch.epoch] += came - asked
        spent[batch.epoch] += time.monotonic() - asked
        asked = time.monotonic()
    first, *later = (waited[epoch] / spent[epoch] for epoch in sorted(spent))
    note = f"{100 * median(later):.1f} % of later epochs, {100 * first:.0f} % of the first, with Ray Data's start"
    return timing("step waits for data", median(list(waited.values())[1:]), note=note, share=median(later))


# -- the stream --------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0.9)
class Worker:
    """One rank: iterates over its share of a random zoo and checks it."""

    def __init__(self, folder: str, rank: int, world_size: int, batch_size: int) -> None:
        self.zoo, self.place = open_zoo(folder), {"rank": rank, "world_size": world_size, "batch_size": batch_size}
        torch.set_num_threads(1)

    def run(self, first_epoch: int, last_epoch: int, memory_bytes: int = 0) -> dict[str, Any]:
        """When each epoch ended, by the clock and in processor seconds; peak bytes, and of them those of Ray's object
        store, which workers and readers share."""
        share = shard_rows(self.zoo, **self.place)
        seen: dict[int, list[torch.Tensor]] = defaultdict(list)
        ends = {}
        options = {"first_epoch": first_epoch, "last_epoch": last_epoch, "memory": memory_bytes, **self.place}
        for batch in stream([self.zoo], **options):
            if batch.epoch == first_epoch or batch.step % 16 == 0:
                assert torch.equal(rows_of(batch.theta_bP), batch.row_b)
            seen[batch.epoch].append(batch.row_b)
            if batch.last:
                ends[batch.epoch] = time.monotonic(), cpu_by_process()
        for rows in seen.values():
            assert torch.equal(torch.cat(rows).sort().values, share)
        return {"peak": memory("VmHWM"), "shared": memory("RssShmem"), "ends": ends}


def streamed(
    folder: Path, epochs: int, world: int = 2, batch_size: int = 64, memory_bytes: int = 0
) -> tuple[float, float, list[Any], object]:
    """Wall and processor seconds of an epoch of all workers, their memory, and they themselves; Ray must have started.

    The first epoch, in which reading processes start and shares are held, is not counted. Who asks again must let the
    workers go first: they hold the processors.
    """
    workers = [Worker.remote(str(folder), rank, world, batch_size) for rank in range(world)]
    found = ray.get([worker.run.remote(0, epochs, memory_bytes) for worker in workers])
    ends = [max((each["ends"][epoch] for each in found), key=lambda end: end[0]) for epoch in range(epochs + 1)]
    spent = [_spent(before, after) for (_, before), (_, after) in itertools.pairwise(ends)]
    return (ends[-1][0] - ends[0][0]) / epochs, sum(spent) / epochs, found, workers


def _spent(before: dict[str, float], after: dict[str, float]) -> float:
    """Processor seconds between two looks at the processes, of those that are still there."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def _stat(pid: str) -> list[str]:
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
        if pid in raylets or (name.startswith("ray::") and _stat(pid)[1] in raylets):
            yield pid, name


def _reads(name: str) -> bool:
    """Whether a process of Ray reads for streams, or waits to."""
    return "MapBatches" in name or "IDLE" in name


def cpu_of(pid: str) -> float:
    """Processor seconds that a process has used, with its children that have ended."""
    return sum(int(ticks) for ticks in _stat(pid)[11:15]) / os.sysconf("SC_CLK_TCK")


def cpu_by_process() -> dict[str, float]:
    """Processor time that each of them has used."""
    return {pid: cpu_of(pid) for pid, _ in ray_processes()}


def cpu_seconds() -> float:
    """Of all of them together."""
    return sum(cpu_by_process().values())


def pyarrow_seconds(zoo: Zoo, threads: bool) -> tuple[float, float]:
    """Wall and processor seconds of reading the weights of every file, one after the other, into numpy."""
    start, cpu = time.monotonic(), time.process_time()
    for part in zoo.parts:
        table = pq.read_table(zoo.store.path(part.file), columns=["weights"], use_threads=threads)
        zoo_format.weights_array(table["weights"])
    return time.monotonic() - start, time.process_time() - cpu


def torch_load_seconds(folder: Path, count: int) -> tuple[float, float]:
    """Wall and processor seconds a state, one file each, as published zoos lie."""
    folder.mkdir()
    state = ARCH.unflatten(torch.randn(ARCH.num_parameters))
    for i in range(count):
        torch.save(state, folder / f"{i}.pt")
    start, cpu = time.monotonic(), time.process_time()
    for i in range(count):
        ARCH.flatten(torch.load(folder / f"{i}.pt", weights_only=True))
    return (time.monotonic() - start) / count, (time.process_time() - cpu) / count


def zoo_stream(args: Namespace) -> list[Row]:
    """States a second of the stream, of held shares and of plain ways to read; memory of workers and readers."""
    states, files, epochs = (2_000, 100, 1) if args.quick else (args.states, 2000, args.epochs)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        zoo = random_zoo(work / "zoo", states)
        wall, cpu = torch_load_seconds(work / "files", files)
        ways = {
            "pyarrow alone, one thread": min(pyarrow_seconds(zoo, threads=False) for _ in range(3)),
            "pyarrow alone, its threads": min(pyarrow_seconds(zoo, threads=True) for _ in range(3)),
            f"one torch.load a file ({files:,} files, scaled)": (states * wall, states * cpu),
        }
        start_ray(2)
        ours, memories = {}, {}
        try:
            for way, held in (("stream, two workers", 0), ("held, two workers", 2**40)):
                wall, cpu, found = streamed(work / "zoo", epochs, batch_size=args.batch_size, memory_bytes=held)[:3]
                ours[way] = wall, cpu
                readers = [memory("VmHWM", pid) for pid, name in ray_processes() if _reads(name)]
                memories[way] = {
                    "workers": [each["peak"] for each in found],
                    "shared": [each["shared"] for each in found],
                    "readers": readers,
                }
        finally:
            ray.shutdown()
    alone, alone_cpu = ways["pyarrow alone, one thread"]
    return [
        {
            "way": way,
            "states": states,
            "states_per_second": states / wall,
            "mib_per_second": states * ARCH.num_parameters * 4 / 2**20 / wall,
            "of_pyarrow": alone / wall,
            "cpu_seconds": cpu,
            "cpu_of_pyarrow": cpu / alone_cpu,
            "peak_bytes": memories.get(way),
        }
        for way, (wall, cpu) in (ours | ways).items()
    ]


def cells(args: Namespace) -> Iterator[Cell]:
    key = {"states": args.states, "epochs": args.epochs, "batch_size": args.batch_size}
    yield Cell(key, lambda: zoo_stream(args))


def _told(rows: Sequence[Row], args: Namespace) -> str:
    texts = [written(BY_WAY, rows), "Every row came exactly once in each epoch, by ids in the weights."]
    for row in rows:
        if row["peak_bytes"]:
            peaks = {who: ", ".join(f"{b / 2**20:.0f}" for b in held) for who, held in row["peak_bytes"].items()}
            texts.append(
                f"{row['way']}: peak memory of the workers {peaks['workers']} MiB, of it shared with the object store "
                f"{peaks['shared']} MiB; of the readers {peaks['readers']} MiB."
            )
    return "\n\n".join(texts)


_whole: Callable[[float], str] = "{:,.0f}".format
BY_WAY = Table(
    (
        value("states", "states", _whole),
        value("states/s", "states_per_second", _whole),
        value("MiB/s", "mib_per_second", _whole),
        value("of pyarrow, one thread", "of_pyarrow", "{:.2f}".format),
        value("CPU-s an epoch", "cpu_seconds", "{:.2f}".format),
        value("of pyarrow's", "cpu_of_pyarrow", "{:.2f}".format),
    ),
    by=lambda row: row["way"],
)
OPTIONS: Options = {
    "--states": {"type": int, "default": 200_000},
    "--epochs": {"type": int, "default": 2},
    "--batch-size": {"type": int, "default": 64},
    "--folder": {"help": "where the zoo is written for the time (default: the system's)"},
}
PARTS = {"ray": speed(ray_costs), "zoo_stream": Part(cells, _told, OPTIONS)}
