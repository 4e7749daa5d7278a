"""Streaming from an object store that answers late: moto's S3 server behind a proxy that waits before every request.

Server and proxy are processes of their own. The proxy counts requests by kind, so that it is known how many a window of
the stream costs. The machine's cores also run the server: models a second are a lower bound.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import torch

from benchmarks.harness import Cell, Options, Part, Row, Table, value
from benchmarks.pipeline import start_ray
from benchmarks.zoos import random_zoo, rows_of
from distrecon.nets import architecture
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos.compact import compact
from distrecon.zoos.storage import store
from distrecon.zoos.stream import plan, stream

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


def _delay(upstream: int, seconds: float, port: "Synchronized[int]", counts: "SynchronizedArray[int]") -> None:
    asyncio.run(_proxy(upstream, seconds, port, counts))


async def _proxy(upstream: int, seconds: float, port: Any, counts: Any) -> None:
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


@dataclass
class LateStore:
    """Where it answers, at once and late, and what was asked of the late one."""

    direct: str
    late: str
    counts: Any

    def client(self, endpoint: str) -> pafs.S3FileSystem:
        return pafs.S3FileSystem(
            endpoint_override=endpoint, scheme="http", access_key="any", secret_key="any", region="us-east-1",
            allow_bucket_creation=True,
        )  # fmt: skip

    def asked(self) -> dict[str, int]:
        return dict(zip(KINDS, self.counts, strict=True))


@contextlib.contextmanager
def late_store(milliseconds: float) -> Iterator[LateStore]:
    """An S3 server that answers so much later."""
    spawn = multiprocessing.get_context("spawn")
    ports = [spawn.Value("i", 0) for _ in range(2)]
    counts = spawn.Array("i", len(KINDS))
    server = spawn.Process(target=_serve, args=(ports[0],), daemon=True)
    proxy = None
    try:
        server.start()
        _wait(ports[0], server)
        proxy = spawn.Process(target=_delay, args=(ports[0].value, milliseconds / 1e3, ports[1], counts), daemon=True)
        proxy.start()
        _wait(ports[1], proxy)
        direct, late = (f"127.0.0.1:{port.value}" for port in ports)
        yield LateStore(direct, late, counts)
    finally:
        for process in (server, proxy):
            if process is not None and process.pid is not None:
                process.terminate()
                process.join()


def _wait(port: Any, process: Any) -> None:
    while not port.value:
        if not process.is_alive():
            raise RuntimeError("the server did not start: is moto installed?")
        time.sleep(0.05)


# -- the stream --------------------------------------------------------------------------------------------------------


def streamed(zoo: Zoo, late: LateStore, passes: int, batch_size: int) -> Row:
    """One worker's stream: models a second and requests a window once the first windows have come."""
    order = plan([zoo], batch_size=batch_size).orders[0]
    skipped = 2 * order.window_steps  # steps of the first two windows: processes start, files are opened
    start, asked, steps, models = 0.0, late.asked(), 0, 0
    for batch in stream([zoo], batch_size=batch_size, last_epoch=passes - 1):
        assert torch.equal(rows_of(batch.theta_bP), batch.row_b)
        steps += 1
        if steps == skipped:
            start, asked, models = time.monotonic(), late.asked(), 0
        models += len(batch.row_b)
    seconds, windows = time.monotonic() - start, (steps - skipped) / order.window_steps
    requests = sum(late.asked().values()) - sum(asked.values())
    return {"models_per_second": models / seconds, "requests_per_window": requests / windows, "windows": windows}


def s3_stream(args: Namespace) -> list[Row]:
    """A zoo of CNN3 models in a bucket, in files as an import writes them, and compacted."""
    states, rows = (1_500 if args.quick else args.states), []
    arch = architecture("cnn3")
    with late_store(args.latency) as late, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        written = random_zoo(Path(folder) / "zoo", states, arch, IMPORTED)
        start_ray(2)
        try:
            direct = late.client(late.direct)
            direct.create_dir(BUCKET)
            for way in ("as imported", "compacted"):
                if way == "compacted":
                    compact(written.store)
                pafs.copy_files(written.store.root, f"{BUCKET}/{way[:2]}", destination_filesystem=direct)
                zoo = open_zoo(store(f"{BUCKET}/{way[:2]}", late.client(late.late)))
                found = streamed(zoo, late, args.passes, args.batch_size)
                rows.append(
                    {"way": f"{way}, {len({part.file for part in zoo.parts})} files", "states": states, **found}
                )
        finally:
            ray.shutdown()
    return rows


def cells(args: Namespace) -> Iterator[Cell]:
    key = {"states": args.states, "latency": args.latency, "passes": args.passes, "batch_size": args.batch_size}
    yield Cell(key, lambda: s3_stream(args))


TABLE = Table(
    (
        value("models", "states", "{:,.0f}".format),
        value("ms a request", "latency", "{:.0f}".format),
        value("models/s", "models_per_second", "{:,.0f}".format),
        value("requests a window", "requests_per_window", "{:.1f}".format),
        value("windows", "windows", "{:.0f}".format),
    ),
    by=lambda row: row["way"],
)
OPTIONS: Options = {
    "--states": {"type": int, "default": 12_800},
    "--latency": {"type": float, "default": 25.0, "help": "milliseconds before each request (%(default)s)"},
    "--passes": {"type": int, "default": 3},
    "--batch-size": {"type": int, "default": 64},
    "--folder": {"help": "where the zoo is written for the time (default: the system's)"},
}
PARTS = {"s3_stream": Part(cells, (TABLE,), OPTIONS)}
