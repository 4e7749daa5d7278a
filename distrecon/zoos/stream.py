"""A deterministic stream of batches over Ray Data: what a training worker iterates over.

`order.py` says which rows each step takes; Ray Data's tasks read them, a window of several steps at a time, a few
windows ahead, and the batches arrive as tensors. One execution serves all epochs, so its start-up is paid once.

- The global batch of a step is the same rows in the same order whatever the number of workers.
- Within a pass every row appears once; memory is bounded by the window, whatever the zoo's size.
- Several zoos mix by weight: a weight is the number of passes over that zoo per epoch (1: every row once an epoch).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.zoos import format as zoo_format
from distrecon.zoos.models import Batch
from distrecon.zoos.order import Order, spans
from distrecon.zoos.zoo import Zoo

if TYPE_CHECKING:
    import ray.data

WINDOW_BYTES = 64 * 2**20  # of weights, all workers together: what a shuffle mixes and a reading task returns
WINDOWS_AHEAD = 2  # reading tasks in flight on each worker
WINDOWS_IN_MEMORY = 6  # being read, read, and in use, on each worker
READ_CPUS = 0.0  # reading starts even where training has taken all the processors


@dataclass(frozen=True)
class StreamPlan:
    """How the steps of every epoch are made up, computed alike on every worker."""

    orders: tuple[Order, ...]
    weights: tuple[float, ...]
    seed: int

    def steps(self, epoch: int) -> int:
        """Steps of an epoch (from 0), all zoos together."""
        return sum(high - low for low, high in self._ranges(epoch))

    def _ranges(self, epoch: int) -> list[tuple[int, int]]:
        """Per zoo, the steps of the epoch in its endless row of passes."""
        return [
            (floor(epoch * w * order.steps), floor((epoch + 1) * w * order.steps))
            for order, w in zip(self.orders, self.weights, strict=True)
        ]

    def first_step(self, zoo_index: int, epoch: int) -> int:
        """Where a zoo's endless row of passes stands when an epoch begins."""
        return self._ranges(epoch)[zoo_index][0]

    def schedule(self, epoch: int) -> np.ndarray:
        """Which zoo each step of the epoch takes its batch from, in a seeded random order."""
        counts = [high - low for low, high in self._ranges(epoch)]
        sequence = np.repeat(np.arange(len(counts)), counts)
        return np.random.default_rng([self.seed, 2, epoch]).permutation(sequence)


def plan(
    zoos: Sequence[Zoo],
    *,
    batch_size: int,
    split: str = "train",
    shards: int = 16,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> StreamPlan:
    """The order of all steps. `shards` (virtual ones, at least one a worker) must divide the batch size.

    Raises UserError when they do not, when the split of a zoo is empty, or when the weights are not positive.
    """
    weights = tuple(weights) if weights is not None else (1.0,) * len(zoos)
    if len(weights) != len(zoos) or not zoos or min(weights) <= 0:
        raise UserError(f"one positive weight per zoo is needed: {len(zoos)} zoos, weights {list(weights)}")
    orders = []
    for index, zoo in enumerate(zoos):
        groups = [(g.first_row, g.rows) for g in zoo.groups_of(split)]
        if not groups:
            raise UserError(f"{zoo.store}: no states in split {split!r}")
        window_steps = max(1, window_bytes // (4 * zoo.architecture.num_parameters * batch_size))
        orders.append(Order(spans(groups), batch_size, shards, window_steps, (seed, 1, index)))
    return StreamPlan(tuple(orders), weights, seed)


def shard_rows(
    zoo: Zoo, *, batch_size: int, split: str = "train", shards: int = 16, rank: int = 0, world_size: int = 1
) -> Tensor:
    """All rows that `stream` gives to one worker, [S] int64, ascending: the same in every epoch."""
    order = plan([zoo], batch_size=batch_size, split=split, shards=shards).orders[0]
    return torch.from_numpy(np.concatenate([order.lane_rows(lane) for lane in order.owned(rank, world_size)]))


def stream(
    zoos: Sequence[Zoo],
    *,
    batch_size: int,
    first_epoch: int = 0,
    last_epoch: int,
    split: str = "train",
    shards: int = 16,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[Batch]:
    """One worker's batches of the epochs first_epoch .. last_epoch (both included, counted from 0), in order.

    `batch_size` is the global one. Starting at an epoch gives exactly what an uninterrupted stream gives from there on.
    Raises UserError as `plan` does, and for a zoo file that is missing or damaged.
    """
    steps = plan(
        zoos, batch_size=batch_size, split=split, shards=shards, seed=seed, weights=weights, window_bytes=window_bytes
    )
    for order in steps.orders:
        order.owned(rank, world_size)
    return _stream(list(zoos), steps, first_epoch, last_epoch, rank, world_size)


def _stream(
    zoos: list[Zoo], steps: StreamPlan, first_epoch: int, last_epoch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    sources = [
        _rows_of_zoo(
            zoo,
            order,
            (steps.first_step(index, first_epoch), steps.first_step(index, last_epoch + 1)),
            (rank, world_size),
        )
        for index, (zoo, order) in enumerate(zip(zoos, steps.orders, strict=True))
    ]
    position = [steps.first_step(index, first_epoch) for index in range(len(zoos))]
    for epoch in range(first_epoch, last_epoch + 1):
        schedule = steps.schedule(epoch)
        for step, index in enumerate(schedule.tolist()):
            order = steps.orders[index]
            owned, sizes = order.owned(rank, world_size), order.sizes(position[index] % order.steps)
            row_b, theta_bP = next(sources[index])
            position[index] += 1
            offset = sum(sizes[: owned.start])
            last = step + 1 == len(schedule)
            yield Batch(epoch, step, index, row_b, theta_bP, sum(sizes), offset, last)


def _rows_of_zoo(
    zoo: Zoo, order: Order, span: tuple[int, int], worker: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(row_b, theta_bP) of each step in span[0] .. span[1] - 1 of the zoo's endless row of passes."""
    rank, world_size = worker
    owned = order.owned(rank, world_size)
    items = _windows(order, *span)
    blocks = _read_ahead(zoo, order, items, worker)
    carry = _Carry(zoo.architecture.num_parameters)
    for _, window, first, last in items:
        begin = window * order.window_steps
        for step in range(begin + first, begin + last):
            count = sum(order.sizes(step)[owned.start : owned.stop])
            while carry.rows < count:
                carry.put(next(blocks))
            yield carry.take(count)


def _windows(order: Order, begin: int, end: int) -> list[tuple[int, int, int, int]]:
    """(pass, window, first step, step after the last) of each window that the steps begin .. end - 1 touch."""
    items = []
    step = begin
    while step < end:
        number, within = divmod(step, order.steps)
        window, first = divmod(within, order.window_steps)
        last = min(order.window_steps, order.steps - window * order.window_steps, first + end - step)
        items.append((number, window, first, last))
        step += last - first
    return items


def _read_ahead(
    zoo: Zoo, order: Order, items: list[tuple[int, int, int, int]], worker: tuple[int, int]
) -> Iterator[pa.Table]:
    """Ray Data's execution: one task per window, results in order, a bounded number of bytes ahead."""
    import ray.data

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        (number, window, first, last) = batch["item"][0]
        steps = order.window(int(number), int(window), *worker)[first:last]
        rows_S = np.concatenate(steps)
        return pa.table({"row": rows_S, "weights": zoo_format.weights_column(zoo.read_rows(rows_S))})

    window_bytes = 4 * zoo.architecture.num_parameters * order.batch_size * order.window_steps // worker[1]
    with ray.data.DataContext.current(_context(window_bytes)):
        dataset = ray.data.from_items(
            [{"item": list(item)} for item in items], override_num_blocks=len(items)
        ).map_batches(
            read,
            batch_size=1,
            num_cpus=READ_CPUS,
            compute=ray.data.TaskPoolStrategy(size=min(WINDOWS_AHEAD, len(items))),
        )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _context(window_bytes: int) -> "ray.data.DataContext":
    """Results in order, a few windows in memory at most, and no messages: a training run has hundreds of streams."""
    import ray.data
    from ray.data import ExecutionResources

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=WINDOWS_IN_MEMORY * max(window_bytes, 2**20)
    )
    context.raise_original_map_exception = True
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    return context


class _Carry:
    """Rows that have arrived and are not yet given out; blocks may come cut in other places than the steps."""

    def __init__(self, num_parameters: int) -> None:
        self.blocks: list[tuple[np.ndarray, np.ndarray]] = []
        self.rows = 0
        self.empty = np.empty(0, np.int64), np.empty((0, num_parameters), np.float32)

    def put(self, table: pa.Table) -> None:
        self.blocks.append((table["row"].to_numpy(), zoo_format.weights_array(table["weights"])))
        self.rows += table.num_rows

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next rows, as tensors of their own memory."""
        taken = [self.empty]
        self.rows -= count
        while count:
            rows, weights = self.blocks.pop(0)
            if len(rows) > count:
                self.blocks.insert(0, (rows[count:], weights[count:]))
            taken.append((rows[:count], weights[:count]))
            count -= min(count, len(rows))
        row_b, theta_bP = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
        return torch.from_numpy(row_b), torch.from_numpy(theta_bP)
