"""What a training step costs beside its arithmetic, measured here, and what follows for 1 to 64 GPUs.

    python -m benchmarks scaling [--quick] [--page docs/scaling.md]
    python -m benchmarks scaling --gpu-tflops 100 --network-gbit 200 ...     # another cluster, nothing measured again

Measured, with 1 and 2 processes of one thread: steps, the sum of gradients (gloo on loopback), reading and sharding the
zoo (Ray Data), checkpoints. The model puts a GPU's arithmetic and a cluster's network and storage, which are options
and not measured, in place of this machine's; what is software (bytes sent, bytes saved, processor time of reading) is
taken from the measurement.
"""

import json
import math
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Cell, Options, Part, Row, turns
from benchmarks.steps import stepper, training_of
from benchmarks.zoos import ARCH, random_zoo
from distrecon.autoencoder.reduction import BUCKET_BYTES
from distrecon.autoencoder.training import Training
from distrecon.nets import architecture

SIZES = {"demo": "cnn_small", "paper": "cnn3"}
BATCHES = {"demo": (16, 32, 64), "paper": (4, 8, 16)}
MESSAGES = (1_000, 100_000, 1_000_000, 20_000_000)  # numbers
PUBLISHED_STATES = 2_600_000  # of all published zoos together
WORKERS = (1, 2, 4, 8, 16, 32, 64)
MIB = 2**20


# -- measuring ---------------------------------------------------------------------------------------------------------


def step_time(training: Training, rank: int, world: int, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of a step with the whole sample as global batch, of which this worker holds its share (median)."""
    total = len(training.zoos[0].sample_BP)
    step = stepper(training, rank * total // world, (rank + 1) * total // world)
    step()  # fills the cache of the originals' outputs, once in a training
    return median(turns({"step": step}, repeats, clock)["step"])


def flops(size: str, models: int) -> float:
    """Floating-point operations of the matrix products and convolutions of one step, counted by PyTorch."""
    step = stepper(training_of(size == "paper", models))
    for _ in range(3):  # what a training does once is not counted
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def backward_flops(size: str, models: int) -> float:
    """Those of the autoencoder's own backward pass, during which its gradients are sent."""
    training = training_of(size == "paper", models)
    autoencoder, views_BP = training.autoencoder, training.zoos[0].sample_BP.repeat(2, 1)
    x = autoencoder.standardise(views_BP, 0)
    x_hat = autoencoder.coder.decode(autoencoder.coder.encode(x, 0), 0)
    with FlopCounterMode(display=False) as counter:
        x_hat.square().sum().backward()
    return float(counter.get_total_flops())


def worker(rank: int, world: int, folder: str, repeats: int) -> None:
    """One of the processes: what rank 0 saw is written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found: dict[str, Any] = {"steps": {}, "all_reduce": {}}
    for size in SIZES:
        training = training_of(size == "paper", BATCHES[size][-1])
        found["steps"][size] = step_time(training, rank, world, repeats, time.perf_counter)
    for numbers in MESSAGES:
        message = torch.ones(numbers)
        dist.barrier()
        sums = turns({"sum": lambda message=message: dist.all_reduce(message)}, 15, time.perf_counter)["sum"]
        found["all_reduce"][numbers] = median(sums)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's that drops its tensor late, when Python has ended, would abort


def alone(size: str, repeats: int) -> list[Row]:
    """What a training saves, its operations a model, and its step on one thread by batch."""
    training = training_of(size == "paper", 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "training.pt")
        seconds = turns({"save": lambda: torch.save(training.state_dict(), file)}, 5, time.perf_counter)["save"]
        saved = {"seconds": median(seconds), "bytes": file.stat().st_size}
    parameters = sum(p.numel() for p in training.autoencoder.parameters() if p.requires_grad)
    times = {
        str(b): step_time(training_of(size == "paper", b), 0, 1, repeats, time.process_time) for b in BATCHES[size]
    }
    operations = flops(size, BATCHES[size][0]) / BATCHES[size][0]
    backward = backward_flops(size, 2) / 2 / operations
    row = {"checkpoint": saved, "parameters": parameters, "flops_per_model": operations, "backward": backward}
    return [row | {"steps": times}]


def together(world: int, repeats: int) -> list[Row]:
    """Steps and sums of gradients of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (world, folder, repeats), nprocs=world)  # type: ignore[no-untyped-call]
        return [json.loads(Path(folder, "found.json").read_text())]


def reading(states: int) -> list[Row]:
    """Processor seconds a MiB of reading, shuffling and sharding, and MiB a second, with 1 and 2 workers."""
    import ray

    from benchmarks.pipeline import start_ray, streamed

    mib = states * ARCH.num_parameters * 4 / MIB
    with tempfile.TemporaryDirectory() as folder:
        zoo = Path(folder, "zoo")
        random_zoo(zoo, states)
        start_ray(4)
        try:
            found = {world: streamed(zoo, 2, world)[:2] for world in (1, 2)}
        finally:
            ray.shutdown()
    return [
        {"workers": world, "cpu_seconds_per_mib": cpu / mib, "mib_per_second": mib / wall}
        for world, (wall, cpu) in found.items()
    ]


def cells(args: Namespace) -> Iterator[Cell]:
    repeats = 3 if args.quick else 9
    for size in SIZES:
        yield Cell({"what": "alone", "size": size}, partial(alone, size, repeats))
    for world in (1, 2):
        yield Cell({"what": "together", "processes": world}, partial(together, world, repeats))
    yield Cell({"what": "reading"}, partial(reading, 10_000 if args.quick else 100_000))


# -- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What the cluster is assumed to be. None of it was measured."""

    gpu_tflops: float = 40.0  # sustained by one GPU on this work, in 10^12 operations a second
    overhead_ms: float = 5.0  # of a step on a GPU that does not shrink with the batch: launches, Python
    gpus_per_node: int = 8
    cpus_per_gpu: float = 8.0
    link_gbyte: float = 200.0  # between the GPUs of a node
    network_gbit: float = 100.0  # of a node
    latency_us: float = 30.0  # of one message
    storage_mib: float = 500.0  # read or written a second, by all nodes together


@dataclass(frozen=True)
class Job:
    """One training: the autoencoder's cost from the measurement, and the zoo's."""

    flops_per_model: float
    gradient_bytes: float
    checkpoint_bytes: float
    model_bytes: float  # of one zoo model
    read_cpu_seconds: float  # for one zoo model
    states: int
    backward: float = 0.0  # share of the operations beside which gradients are sent


def step_terms(job: Job, cluster: Cluster, workers: int, batch: int) -> dict[str, float]:
    """Seconds of each part of one step with a global batch; sending, reading and storage run beside the arithmetic.

    Sum of gradients: rings inside the nodes and over them, each 2 (n - 1)/n times the bytes, and 2 (N - 1) messages for
    each bucket. `gradients` is what is waited for: what the backward pass does not cover, at least the last bucket.
    A checkpoint an epoch, waited for, is spread over the epoch's steps.
    """
    inside = min(cluster.gpus_per_node, workers)
    nodes = -(-workers // cluster.gpus_per_node)
    within = 2 * (inside - 1) / inside / (cluster.link_gbyte * 1e9)
    between = 2 * (nodes - 1) / nodes / (cluster.network_gbit * 1e9 / 8)
    epoch_steps = max(1, job.states // batch)
    arithmetic = batch / workers * job.flops_per_model / (cluster.gpu_tflops * 1e12)
    buckets = math.ceil(job.gradient_bytes / BUCKET_BYTES)
    sending = job.gradient_bytes * (within + between) + buckets * 2 * (workers - 1) * cluster.latency_us / 1e6
    return {
        "arithmetic": arithmetic,
        "overhead": cluster.overhead_ms / 1e3,
        "sending": sending,
        "gradients": max(sending - job.backward * arithmetic, sending / buckets),
        "checkpoint": job.checkpoint_bytes / (cluster.storage_mib * 2**20) / epoch_steps,
        "reading": batch / workers * job.read_cpu_seconds / cluster.cpus_per_gpu,
        "storage": batch * job.model_bytes / (cluster.storage_mib * 2**20),
    }


def step_seconds(terms: dict[str, float]) -> float:
    busy = sum(terms[name] for name in ("arithmetic", "overhead", "gradients", "checkpoint"))
    return max(busy, terms["reading"], terms["storage"])


# -- telling -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The rows by what they tell."""

    alone: dict[str, Row]  # by size
    together: dict[int, Row]  # by processes
    reading: dict[int, Row]  # by workers

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Measured":
        names = {"alone": "size", "together": "processes", "reading": "workers"}
        return cls(*({row[key]: row for row in rows if row["what"] == what} for what, key in names.items()))

    def job(self, size: str, states: int) -> Job:
        of_size, model_bytes = self.alone[size], _model_bytes(size)
        per_mib = max(row["cpu_seconds_per_mib"] for row in self.reading.values())
        gradients, saved = 4 * of_size["parameters"], of_size["checkpoint"]["bytes"]
        cpu_seconds = per_mib * model_bytes / MIB
        operations, backward = of_size["flops_per_model"], of_size["backward"]
        return Job(operations, gradients, saved, model_bytes, cpu_seconds, states, backward)


def _model_bytes(size: str) -> int:
    return 4 * architecture(SIZES[size]).num_parameters


def fitted(points: dict[str, float]) -> tuple[float, float]:
    """(fixed, per unit) of cost against size, by least squares."""
    slope, fixed = np.polyfit([float(b) for b in points], list(points.values()), 1)
    return float(fixed), float(slope)


def measured_table(found: Measured) -> str:
    """A line a quantity, a column a size."""
    fixed, per_number = fitted(found.together[2]["all_reduce"])
    columns = []
    for size, own in found.alone.items():
        start, per_model = fitted(own["steps"])
        one, two = (found.together[world]["steps"][size] for world in (1, 2))
        message, batch = max(fixed, 0) + per_number * own["parameters"], BATCHES[size][-1]
        saved = own["checkpoint"]
        column = {
            "measured here": size if size == "demo" else f"{size} size",
            "autoencoder's parameters": f"{own['parameters'] / 1e6:.2f} million",
            "operations a model": f"{own['flops_per_model'] / 1e9:.2f} x 10^9",
            "a step on one thread": f"{1e3 * start:.0f} ms + {1e3 * per_model:.1f} ms a model",
            "sum of gradients, 2 processes": f"{1e3 * message:.1f} ms",
            "global batch of the next rows": f"{batch} models",
            "its step, 1 process": f"{1e3 * one:.0f} ms",
            "its step, 2 processes": f"{1e3 * two:.0f} ms ({one / two:.2f} times faster)",
            "predicted from the parts": f"{1e3 * (one - per_model * batch / 2 + message):.0f} ms",
            "a checkpoint": f"{saved['bytes'] / MIB:.0f} MiB, {1e3 * saved['seconds']:.0f} ms",
        }
        for workers, row in found.reading.items():
            ms = 1e3 * row["cpu_seconds_per_mib"] * _model_bytes(size) / MIB
            column[f"reading a model, {workers} worker{'s' * (workers > 1)}"] = f"{ms:.3f} ms of one CPU"
        columns.append(column)
    lines = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


def model_table(job: Job, cluster: Cluster, per_gpu: int) -> str:
    """Weak scaling: `per_gpu` models on each GPU whatever their number."""
    lines = [
        "| GPUs | step, ms | arithmetic | sending | gradients | checkpoint | reading | storage | models/s | an epoch "
        "| limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for workers in WORKERS:
        terms = step_terms(job, cluster, workers, workers * per_gpu)
        seconds = step_seconds(terms)
        rate = workers * per_gpu / seconds
        shown = ("arithmetic", "sending", "gradients", "checkpoint", "reading", "storage")
        parts = [f"{1e3 * terms[k]:.2f}" for k in shown]
        epoch = f"{job.states / rate / 60:.1f} min"
        limit = max((name for name in terms if name != "sending"), key=lambda name: terms[name])
        lines.append(f"| {workers} | {1e3 * seconds:.1f} | {' | '.join(parts)} | {rate:,.0f} | {epoch} | {limit} |")
    return "\n".join(lines)


def batch_table(job: Job, cluster: Cluster, batch: int) -> str:
    """Strong scaling: the same global batch on all GPUs, gradients sent as they are and in bf16."""
    lines = [
        "| GPUs | arithmetic, ms | sending | waited for | times faster | sending in bf16 | waited for | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = step_seconds(step_terms(job, cluster, 1, batch))
    for workers in WORKERS[1:]:
        ways = [job, replace(job, gradient_bytes=job.gradient_bytes / 2)]
        terms = [step_terms(way, cluster, workers, batch) for way in ways]
        cells = [f"{1e3 * terms[0]['arithmetic']:.2f}"]
        for way in terms:
            cells += [
                f"{1e3 * way['sending']:.2f}",
                f"{1e3 * way['gradients']:.2f}",
                f"{alone / step_seconds(way):.1f}",
            ]
        lines.append(f"| {workers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_tables(jobs: Mapping[str, Job], cluster: Cluster, per_gpu: int) -> list[str]:
    """By size of autoencoder."""
    texts = []
    for size, job in jobs.items():
        texts += [f"**{size}** ({SIZES[size]})", model_table(job, cluster, per_gpu)]
        texts += [f"The same batch of {per_gpu} models on all GPUs together:", batch_table(job, cluster, per_gpu)]
    return texts


def tables(rows: Sequence[Row], args: Namespace) -> str:
    """What was measured, what is assumed, and the model of both sizes."""
    cluster, found = Cluster(**{name: getattr(args, name) for name in vars(Cluster())}), Measured.of(rows)
    assumed = (
        f"Assumed, not measured: {cluster.gpu_tflops:g} x 10^12 operations a second and {cluster.overhead_ms:g} ms "
        f"a step of fixed cost on each GPU; {cluster.gpus_per_node} GPUs a node with {cluster.link_gbyte:g} GB/s "
        f"between them, {cluster.network_gbit:g} Gbit/s a node, {cluster.latency_us:g} us a message; "
        f"{cluster.cpus_per_gpu:g} CPUs a GPU; {cluster.storage_mib:g} MiB/s of storage for all. "
        f"{args.models_per_gpu} models on each GPU, {PUBLISHED_STATES:,} states an epoch."
    )
    texts = [measured_table(found), assumed]
    jobs = {size: found.job(size, PUBLISHED_STATES) for size in SIZES}
    texts += model_tables(jobs, cluster, args.models_per_gpu)
    return "\n\n".join(texts)


OPTIONS: Options = {"--models-per-gpu": {"type": int, "default": 64}} | {
    f"--{name.replace('_', '-')}": {"type": type(default), "default": default, "help": "(assumed: %(default)s)"}
    for name, default in vars(Cluster()).items()
}
PARTS = {"scaling": Part(cells, tables, OPTIONS)}
