"""Streaming from an object store that answers late.

Two stores: moto's S3 server behind a proxy that waits before every request, and a server of the same answers that
sends files as they lie, late too, and nearly without processor time. Both are processes of their own on the cores that
the stream runs on, so models a second are a lower bound. What the requests alone allow is measured beside them: the
same ranges, as many at once, by plain pyarrow.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import ray
import torch

from benchmarks.harness import Cell, Options, Part, Row, Table, value
from benchmarks.pipeline import cpu_of, cpu_seconds, start_ray
from benchmarks.zoos import random_zoo, rows_of
from distrecon.nets import architecture
from distrecon.zoos import Zoo, open_zoo, ranges
from distrecon.zoos.compact import compact
from distrecon.zoos.rows import Passing
from distrecon.zoos.storage import store
from distrecon.zoos.stream import WINDOWS_AHEAD, plan, stream

KINDS = ("GET", "HEAD", "PUT", "POST", "DELETE")
BUCKET = "zoos"
BLOCK = 256 * 1024
IMPORTED = 200  # states in a file, as an import of 50 models with four states each writes them


# -- a late object store -----------------------------------------------------------------------------------------------


def _serve(port: "Synchronized[int]") -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port.value = server.get_host_and_port()[1]
    time.sleep(1e6)


def _delay(upstream: int, seconds: float, counts: Any, port: Any) -> None:
    asyncio.run(_proxy(upstream, seconds, counts, port))


async def _proxy(upstream: int, seconds: float, counts: Any, port: Any) -> None:
    async def requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            kind = head.split(b" ", 1)[0].decode()
            counts[KINDS.index(kind)] += 1
            await asyncio.sleep(seconds)
            lengths = [
                line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
            ]
            left = int(lengths[0]) if lengths else 0
            writer.write(head)
            while left and (block := await reader.read(min(left, BLOCK))):
                left -= len(block)
                writer.write(block)
                await writer.drain()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(BLOCK):
            counts[-1] += len(block)
            writer.write(block)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", upstream)
        both = [asyncio.create_task(requests(reader, there[1])), asyncio.create_task(answers(there[0], writer))]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        for end in (writer, there[1]):
            end.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()


def _send(folder: str, seconds: float, counts: Any, port: Any) -> None:
    asyncio.run(_files(Path(folder), seconds, counts, port))


async def _files(folder: Path, seconds: float, counts: Any, port: Any) -> None:
    """Answers for the objects BUCKET/KEY that are files of the folder; the system sends them."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        counts[KINDS.index(request.method)] += 1
        await asyncio.sleep(seconds)
        path = folder / request.path.lstrip("/")
        if not path.is_file():
            return web.Response(status=404)
        wanted = request.http_range
        counts[-1] += len(range(path.stat().st_size)[wanted]) if request.method == "GET" else 0
        return web.FileResponse(path)

    app = web.Application()
    app.router.add_route("*", "/{key:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port.value = runner.addresses[0][1]
    await asyncio.Event().wait()


@dataclass
class LateStore:
    """A filesystem that fills it at once, where it answers late, what was asked of it, and the processes it is."""

    direct: pafs.FileSystem
    address: str
    counts: Any
    processes: Sequence[Any]

    def client(self) -> pafs.S3FileSystem:
        return s3(self.address)

    def asked(self) -> dict[str, int]:
        """Requests by kind, and `bytes` sent."""
        return dict(zip((*KINDS, "bytes"), self.counts, strict=True))

    def requests(self) -> int:
        return sum(self.counts[: len(KINDS)])

    def cpu_seconds(self) -> float:
        return sum(cpu_of(str(process.pid)) for process in self.processes)


def s3(address: str) -> pafs.S3FileSystem:
    return pafs.S3FileSystem(
        endpoint_override=address, scheme="http", access_key="any", secret_key="any", region="us-east-1",
        allow_bucket_creation=True, connect_timeout=60, request_timeout=60,
    )  # fmt: skip


@contextlib.contextmanager
def late_store(server: str, milliseconds: float) -> Iterator[LateStore]:
    """A store with an empty bucket that answers so much later. `server`: "moto", or "files", which is only filled by
    `direct` and read."""
    spawn = multiprocessing.get_context("spawn")
    counts, processes = spawn.Array("q", len(KINDS) + 1), []

    def started(target: Callable[..., None], *args: Any) -> int:
        port = spawn.Value("i", 0)
        processes.append(spawn.Process(target=target, args=(*args, port), daemon=True))
        processes[-1].start()
        while not port.value:
            if not processes[-1].is_alive():
                raise RuntimeError(f"the {server} server did not start: are the test extras installed?")
            time.sleep(0.05)
        return port.value

    with tempfile.TemporaryDirectory() as folder:
        try:
            if server == "moto":
                upstream = started(_serve)
                late = started(_delay, upstream, milliseconds / 1e3, counts)
                direct: pafs.FileSystem = s3(f"127.0.0.1:{upstream}")
            else:
                late = started(_send, folder, milliseconds / 1e3, counts)
                direct = pafs.SubTreeFileSystem(folder, pafs.LocalFileSystem())
            direct.create_dir(BUCKET)
            yield LateStore(direct, f"127.0.0.1:{late}", counts, processes)
        finally:
            for process in processes:
                process.terminate()
                process.join()


# -- the stream --------------------------------------------------------------------------------------------------------


def streamed(zoo: Zoo, late: LateStore, passes: int, batch_size: int) -> Row:
    """One worker's stream: models a second and requests a window once the first windows have come."""
    order = plan([zoo], batch_size=batch_size).orders[0]
    skipped = 2 * order.window_steps  # steps of the first two windows: processes start, files are opened
    steps, models = 0, 0
    for batch in stream([zoo], batch_size=batch_size, last_epoch=passes - 1):
        assert torch.equal(rows_of(batch.theta_bP), batch.row_b)
        steps += 1
        if steps == skipped:
            ends, models = _Ends(late), 0
        models += len(batch.row_b)
    return ends.row(models, (steps - skipped) / order.window_steps)


class _Ends:
    """What was spent since it was made."""

    def __init__(self, late: LateStore) -> None:
        self.late, self.begun = late, self._now(late)

    @staticmethod
    def _now(late: LateStore) -> np.ndarray:
        own = time.process_time() + cpu_seconds()
        return np.array([time.monotonic(), late.requests(), own, late.cpu_seconds()])

    def row(self, models: int, windows: float) -> Row:
        seconds, requests, own, theirs = self._now(self.late) - self.begun
        return {
            "models_per_second": models / seconds,
            "requests_per_window": requests / windows,
            "cpu_ms": 1e3 * own / models,
            "server_cpu_ms": 1e3 * theirs / models,
            "windows": windows,
        }


def plain(zoo: Zoo, late: LateStore, passes: int, batch_size: int) -> Row:
    """The ranges that the stream asks for, window by window and as many at once, by pyarrow alone."""
    order = plan([zoo], batch_size=batch_size).orders[0]
    compared_G = np.zeros(len(zoo.layout.rows_G), bool)
    row_bytes, files = 4 * zoo.architecture.num_parameters, dict[str, Any]()

    def get(reads: ranges.Reads, those: Sequence[int]) -> bytes:
        file = reads.files[reads.file_N[those[0]]]
        begin = int(reads.offset_N[those[0]])
        length = int(reads.offset_N[those[-1]] + reads.rows_N[those[-1]] * row_bytes) - begin
        return files[file].read_at(length, begin)

    asked: list[Callable[[], bytes]] = []
    rows = Passing(zoo.architecture.num_parameters)
    for number in range(passes):
        for window in range(order.windows):
            reads = ranges.reads_of(zoo, rows.missing(order.window_spans(number, window, 0, 1)), compared_G)
            files |= {file: zoo.store.open(file) for file in reads.files if file not in files}
            asked += [partial(get, reads, those) for those in ranges.requests(reads, zoo.architecture.num_parameters)]
    for file in files.values():
        file.size()
    with ThreadPoolExecutor(WINDOWS_AHEAD * ranges.REQUESTS) as pool:
        ends = _Ends(late)
        for _ in pool.map(lambda one: one(), asked):
            pass
        return ends.row(passes * zoo.num_states, passes * order.windows)


def s3_stream(args: Namespace, server: str) -> list[Row]:
    """A zoo of CNN3 models in a bucket, in files as an import writes them, and compacted; and its ranges alone."""
    states, rows = (1_500 if args.quick else args.states), []
    arch = architecture("cnn3")
    with late_store(server, args.latency) as late, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        written = random_zoo(Path(folder) / "zoo", states, arch, IMPORTED)
        start_ray(2)
        try:
            for way in ("as imported", "compacted"):
                if way == "compacted":
                    compact(written.store)
                pafs.copy_files(written.store.root, f"{BUCKET}/{way[:2]}", destination_filesystem=late.direct)
                zoo = open_zoo(store(f"{BUCKET}/{way[:2]}", late.client()))
                files = f"{len({part.file for part in zoo.parts})} files"
                for what, measured in (("stream", streamed), ("gets alone", plain)):
                    found = measured(zoo, late, args.passes, args.batch_size)
                    rows.append({"way": f"{server}, {way}, {files}: {what}", "states": states, **found})
        finally:
            ray.shutdown()
    return rows


def cells(args: Namespace) -> Iterator[Cell]:
    key = {"states": args.states, "latency": args.latency, "passes": args.passes, "batch_size": args.batch_size}
    for server in args.servers:
        yield Cell(key | {"server": server}, partial(s3_stream, args, server))


TABLE = Table(
    (
        value("models", "states", "{:,.0f}".format),
        value("ms a request", "latency", "{:.0f}".format),
        value("models/s", "models_per_second", "{:,.0f}".format),
        value("requests a window", "requests_per_window", "{:.1f}".format),
        value("windows", "windows", "{:.0f}".format),
        value("CPU ms a model", "cpu_ms", "{:.2f}".format),
        value("the server's", "server_cpu_ms", "{:.2f}".format),
    ),
    by=lambda row: row["way"],
)
OPTIONS: Options = {
    "--servers": {"nargs": "+", "choices": ("moto", "files"), "default": ["moto", "files"]},
    "--states": {"type": int, "default": 12_800},
    "--latency": {"type": float, "default": 25.0, "help": "milliseconds before each request (%(default)s)"},
    "--passes": {"type": int, "default": 3},
    "--batch-size": {"type": int, "default": 64},
    "--folder": {"help": "where the zoo is written for the time (default: the system's)"},
}
PARTS = {"s3_stream": Part(cells, (TABLE,), OPTIONS)}
