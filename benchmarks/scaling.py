"""What a training step costs beside its arithmetic, measured here, and what follows for 1 to 64 GPUs.

    python benchmarks/scaling.py [--quick] [--out runs/scaling.json] [--page docs/scaling.md]
    python benchmarks/scaling.py --from runs/scaling.json --gpu-tflops 100 --network-gbit 200 ...

Measured, with 1 and 2 processes of one thread: steps, the sum of gradients (gloo on loopback), reading and sharding the
zoo (Ray Data), checkpoints. The model puts a GPU's arithmetic and a cluster's network and storage, which are arguments
and not measured, in place of this machine's; what is software (bytes sent, bytes saved, processor time of reading) is
taken from the measurement. `--page` replaces the tables between that page's markers.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.__main__ import BEGIN, END
from benchmarks.suite.harness import machine, turns
from benchmarks.suite.steps import _config, _random_images
from distrecon.autoencoder.model import ZooSample
from distrecon.autoencoder.training import Batch, Training
from distrecon.images import load
from distrecon.nets import architecture, initialise

SIZES = {"demo": "cnn_small", "paper": "cnn3"}
BATCHES = {"demo": (16, 32, 64), "paper": (4, 8, 16)}
PUBLISHED_STATES = 2_600_000  # of all published zoos together
WORKERS = (1, 2, 4, 8, 16, 32, 64)


# -- measuring -----------------------------------------------------------------------------------------------------


def build(size: str, count: int) -> Training:
    """A training of the demo's or the paper's autoencoder with contrastive, structural and behavioural loss."""
    arch = architecture(SIZES[size])
    theta_BP = initialise(arch, ["kaiming_normal"] * count, range(count))
    images = _random_images(arch) if size == "paper" else load("digits")
    return Training(_config(size == "paper"), [ZooSample(arch, theta_BP, images)], total_steps=1000)


def steps(training: Training, total: int, rank: int, world: int, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of a step with a global batch of `total` models, of which this worker holds its share (median)."""
    low, high = rank * total // world, (rank + 1) * total // world
    theta_bP = training.zoos[0].sample_BP[low:high]
    number = iter(range(10**9))

    def step() -> None:
        training.step(Batch(0, next(number), 0, torch.arange(low, high), theta_bP, total, low))

    step()  # fills the cache of the originals' outputs, once in a training
    return median(turns({"step": step}, repeats, clock)["step"])


def flops(size: str, count: int) -> float:
    """Floating-point operations of the matrix products and convolutions of one step, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    training = build(size, count)
    steps(training, count, 0, 1, 1, time.process_time)
    with FlopCounterMode(display=False) as counter:
        batch = Batch(0, 9, 0, torch.arange(count), training.zoos[0].sample_BP, count, 0)
        training.step(batch)
    return float(counter.get_total_flops())


def all_reduce_seconds(numbers: int, repeats: int = 15) -> float:
    message = torch.ones(numbers)
    dist.barrier()
    return median(turns({"sum": lambda: dist.all_reduce(message)}, repeats, time.perf_counter)["sum"])


def worker(rank: int, world: int, folder: str, quick: bool) -> None:
    """One of the processes: what rank 0 saw is written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world)
    found: dict[str, Any] = {"steps": {}, "all_reduce": {}}
    for size in SIZES:
        total = BATCHES[size][-1]
        training = build(size, total)
        found["steps"][size] = steps(training, total, rank, world, 3 if quick else 9, time.perf_counter)
    for numbers in (1_000, 100_000, 1_000_000, 20_000_000):
        found["all_reduce"][numbers] = all_reduce_seconds(numbers)
    if rank == 0:
        Path(folder, f"world{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def checkpoint(size: str, folder: Path) -> dict[str, float]:
    training = build(size, 2)
    file = folder / "training.pt"
    seconds = median(turns({"save": lambda: torch.save(training.state_dict(), file)}, 5, time.perf_counter)["save"])
    parameters = sum(p.numel() for p in training.autoencoder.parameters() if p.requires_grad)
    return {"seconds": seconds, "bytes": file.stat().st_size, "parameters": parameters}


def reading(folder: Path, quick: bool) -> dict[str, Any]:
    """Processor seconds a MiB of reading, shuffling and sharding, and MiB a second, with 1 and 2 workers.

    All workers live to the end, so that their processor time is not lost from the sum.
    """
    import ray

    from benchmarks import zoo_stream

    states = 10_000 if quick else 100_000
    zoo_stream.make(folder / "zoo", states)
    mib = states * zoo_stream.ARCH.num_parameters * 4 / 2**20
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    found = {}
    for world in (1, 2):
        workers = [zoo_stream.Worker.remote(str(folder / "zoo"), rank, world, 64) for rank in range(world)]
        ray.get([w.run.remote(0, 0) for w in workers])  # starts the reading processes
        start, cpu = time.monotonic(), zoo_stream.cpu_seconds()
        ray.get([w.run.remote(1, 2) for w in workers])
        wall, cpu = time.monotonic() - start, zoo_stream.cpu_seconds() - cpu
        found[str(world)] = {"cpu_seconds_per_mib": cpu / (2 * mib), "mib_per_second": 2 * mib / wall}
    ray.shutdown()
    return found


def measure(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"quick": quick, "machine": machine(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["checkpoint"] = {size: checkpoint(size, folder) for size in SIZES}
        found["alone"] = {
            size: {b: steps(build(size, b), b, 0, 1, 3 if quick else 9, time.process_time) for b in BATCHES[size]}
            for size in SIZES
        }
        found["flops_per_model"] = {size: flops(size, BATCHES[size][0]) / BATCHES[size][0] for size in SIZES}
        for world in (1, 2):
            mp.spawn(worker, (world, name, quick), nprocs=world)  # type: ignore[no-untyped-call]
            found[f"world{world}"] = json.loads((folder / f"world{world}.json").read_text())
        found["reading"] = reading(folder, quick)
    found["load_after"] = os.getloadavg()[0]
    return json.loads(json.dumps(found))  # keys as the file has them


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


def step_terms(job: Job, cluster: Cluster, workers: int, batch: int) -> dict[str, float]:
    """Seconds of each part of one step with a global batch; reading and storage run beside the arithmetic.

    Sum of gradients: rings inside the nodes and over them, each 2 (n - 1)/n times the bytes, and 2 (N - 1) messages.
    A checkpoint an epoch, waited for, is spread over the epoch's steps.
    """
    inside = min(cluster.gpus_per_node, workers)
    nodes = -(-workers // cluster.gpus_per_node)
    within = 2 * (inside - 1) / inside / (cluster.link_gbyte * 1e9)
    between = 2 * (nodes - 1) / nodes / (cluster.network_gbit * 1e9 / 8)
    epoch_steps = max(1, job.states // batch)
    return {
        "arithmetic": batch / workers * job.flops_per_model / (cluster.gpu_tflops * 1e12),
        "overhead": cluster.overhead_ms / 1e3,
        "gradients": job.gradient_bytes * (within + between) + 2 * (workers - 1) * cluster.latency_us / 1e6,
        "checkpoint": job.checkpoint_bytes / (cluster.storage_mib * 2**20) / epoch_steps,
        "reading": batch / workers * job.read_cpu_seconds / cluster.cpus_per_gpu,
        "storage": batch * job.model_bytes / (cluster.storage_mib * 2**20),
    }


def step_seconds(terms: dict[str, float]) -> float:
    busy = sum(terms[name] for name in ("arithmetic", "overhead", "gradients", "checkpoint"))
    return max(busy, terms["reading"], terms["storage"])


def job_of(found: dict[str, Any], size: str, states: int) -> Job:
    saved = found["checkpoint"][size]
    model_bytes = 4 * architecture(SIZES[size]).num_parameters
    per_mib = max(entry["cpu_seconds_per_mib"] for entry in found["reading"].values())
    return Job(
        found["flops_per_model"][size], 4 * saved["parameters"], saved["bytes"], model_bytes,
        per_mib * model_bytes / 2**20, states,
    )  # fmt: skip


# -- telling -------------------------------------------------------------------------------------------------------


def fitted(points: dict[str, float]) -> tuple[float, float]:
    """(fixed, per unit) of cost against size, by least squares."""
    slope, fixed = np.polyfit([float(b) for b in points], list(points.values()), 1)
    return float(fixed), float(slope)


def measured_table(found: dict[str, Any]) -> str:
    lines = [
        "| measured here | demo | paper size |",
        "| --- | --- | --- |",
    ]

    def row(what: str, values: list[str]) -> None:
        lines.append(f"| {what} | {values[0]} | {values[1]} |")

    sizes, sums = list(SIZES), found["world2"]["all_reduce"]
    fixed, per_number = fitted(sums)
    row("autoencoder's parameters", [f"{found['checkpoint'][s]['parameters'] / 1e6:.2f} million" for s in sizes])
    row("operations a model", [f"{found['flops_per_model'][s] / 1e9:.2f} x 10^9" for s in sizes])
    fits = {s: fitted(found["alone"][s]) for s in sizes}
    row("a step on one thread", [f"{1e3 * fits[s][0]:.0f} ms + {1e3 * fits[s][1]:.1f} ms a model" for s in sizes])
    messages = {s: max(fixed, 0) + per_number * found["checkpoint"][s]["parameters"] for s in sizes}
    row("sum of gradients, 2 processes", [f"{1e3 * messages[s]:.1f} ms" for s in sizes])
    row("global batch of the next rows", [f"{BATCHES[s][-1]} models" for s in sizes])
    one, two = found["world1"]["steps"], found["world2"]["steps"]
    row("its step, 1 process", [f"{1e3 * one[s]:.0f} ms" for s in sizes])
    row("its step, 2 processes", [f"{1e3 * two[s]:.0f} ms ({one[s] / two[s]:.2f} times faster)" for s in sizes])
    halved = {s: one[s] - fits[s][1] * BATCHES[s][-1] / 2 + messages[s] for s in sizes}
    row("predicted from the parts", [f"{1e3 * halved[s]:.0f} ms" for s in sizes])
    saved = found["checkpoint"]
    row("a checkpoint", [f"{saved[s]['bytes'] / 2**20:.0f} MiB, {1e3 * saved[s]['seconds']:.0f} ms" for s in sizes])
    read = found["reading"]
    for world in ("1", "2"):
        per_model = [
            1e3 * read[world]["cpu_seconds_per_mib"] * 4 * architecture(a).num_parameters / 2**20
            for a in SIZES.values()
        ]
        row(f"reading a model, {world} worker{'s' * (world > '1')}", [f"{ms:.3f} ms of one CPU" for ms in per_model])
    return "\n".join(lines)


def model_table(found: dict[str, Any], cluster: Cluster, size: str, per_gpu: int, states: int) -> str:
    """Weak scaling: `per_gpu` models on each GPU whatever their number."""
    job = job_of(found, size, states)
    lines = [
        "| GPUs | step, ms | arithmetic | gradients | checkpoint | reading | storage | models/s | an epoch | limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for workers in WORKERS:
        terms = step_terms(job, cluster, workers, workers * per_gpu)
        seconds = step_seconds(terms)
        rate = workers * per_gpu / seconds
        parts = [f"{1e3 * terms[k]:.2f}" for k in ("arithmetic", "gradients", "checkpoint", "reading", "storage")]
        epoch = f"{states / rate / 60:.1f} min"
        limit = max(terms, key=lambda name: terms[name])
        lines.append(f"| {workers} | {1e3 * seconds:.1f} | {' | '.join(parts)} | {rate:,.0f} | {epoch} | {limit} |")
    return "\n".join(lines)


def page(found: dict[str, Any], cluster: Cluster, per_gpu: int) -> str:
    assumed = (
        f"Assumed, not measured: {cluster.gpu_tflops:g} x 10^12 operations a second and {cluster.overhead_ms:g} ms "
        f"a step of fixed cost on each GPU; {cluster.gpus_per_node} GPUs a node with {cluster.link_gbyte:g} GB/s "
        f"between them, {cluster.network_gbit:g} Gbit/s a node, {cluster.latency_us:g} us a message; "
        f"{cluster.cpus_per_gpu:g} CPUs a GPU; {cluster.storage_mib:g} MiB/s of storage for all. {per_gpu} models on "
        f"each GPU, {PUBLISHED_STATES:,} states an epoch."
    )
    load = f"{found['machine']['processor']}, torch {found['machine']['torch']}, load {found['load']:.1f}"
    parts = [f"{load} before and {found['load_after']:.1f} after.", measured_table(found), assumed]
    for size in SIZES:
        parts += [f"**{size}** ({SIZES[size]})", model_table(found, cluster, size, per_gpu, PUBLISHED_STATES)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
    parser.add_argument("--from", dest="measured", type=Path, help="an earlier measurement instead of a new one")
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--models-per-gpu", type=int, default=64)
    for name, default in vars(Cluster()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    cluster = Cluster(**{name: getattr(args, name) for name in vars(Cluster())})
    found = json.loads(args.measured.read_text()) if args.measured else measure(args.quick)
    if not args.measured:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
    text = page(found, cluster, args.models_per_gpu)
    print(text)
    if args.page:
        head, rest = args.page.read_text().split(BEGIN)
        args.page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
