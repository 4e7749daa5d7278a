"""A deterministic stream of batches over Ray Data: what a training worker iterates over.

`order.py` says which rows each step takes; Ray Data's tasks read them, a window of several steps at a time, a few
windows ahead, and the batches arrive as tensors. One execution serves all epochs, so its start-up is paid once.

- The global batch of a step is the same rows in the same order whatever the number of workers.
- Within a pass every row appears once; memory is bounded by the window, whatever the zoo's size.
- Several zoos mix by weight: a weight is the number of passes over that zoo per epoch (1: every row once an epoch).
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.zoos import format as zoo_format
from distrecon.zoos import ranges
from distrecon.zoos.models import Batch
from distrecon.zoos.order import Order, rows_of, spans
from distrecon.zoos.rows import Held, Passing
from distrecon.zoos.zoo import Zoo

if TYPE_CHECKING:
    import ray.data

WINDOW_BYTES = 64 * 2**20  # of weights, all workers together: what a shuffle mixes and a reading task reads
WINDOWS_AHEAD = 2  # reading tasks in flight on each worker
ITEMS_IN_MEMORY = 6  # windows being read, read, and in use, on each worker
WINDOWS_PLANNED = 256  # by one execution of Ray Data, whose start costs some tenths of a second
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
        pieces_G2 = zoo.pieces(split)
        if not len(pieces_G2):
            raise UserError(f"{zoo.store}: no states in split {split!r}")
        window_steps = max(1, window_bytes // (4 * zoo.architecture.num_parameters * batch_size))
        orders.append(Order(pieces_G2, batch_size, shards, window_steps, (seed, 1, index)))
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
    memory: int = 0,
) -> Iterator[Batch]:
    """One worker's batches of the epochs first_epoch .. last_epoch (both included, counted from 0), in order.

    `batch_size` is the global one. Starting at an epoch gives exactly what an uninterrupted stream gives from there on.
    Shares of zoos that fit into `memory` bytes of this worker are kept when they have been read once; the batches are
    the same.
    Raises UserError as `plan` does, and for a zoo file that is missing or damaged.
    """
    steps = plan(
        zoos, batch_size=batch_size, split=split, shards=shards, seed=seed, weights=weights, window_bytes=window_bytes
    )
    for order in steps.orders:
        order.owned(rank, world_size)
    return _stream(list(zoos), steps, first_epoch, last_epoch, (rank, world_size), memory)


def _stream(
    zoos: list[Zoo], steps: StreamPlan, first_epoch: int, last_epoch: int, worker: tuple[int, int], memory: int
) -> Iterator[Batch]:
    sources = []
    for index, (zoo, order) in enumerate(zip(zoos, steps.orders, strict=True)):
        span = steps.first_step(index, first_epoch), steps.first_step(index, last_epoch + 1)
        share = np.concatenate([spans([]), *(order.lane_spans(lane) for lane in order.owned(*worker))])
        share_bytes = 4 * zoo.architecture.num_parameters * int(share[:, 1].sum())
        held = share_bytes <= memory
        memory -= held * share_bytes
        rows = Held(share, zoo.architecture.num_parameters) if held else Passing(zoo.architecture.num_parameters)
        sources.append(_batches(zoo, order, rows, span, worker))
    position = [steps.first_step(index, first_epoch) for index in range(len(zoos))]
    for epoch in range(first_epoch, last_epoch + 1):
        schedule = steps.schedule(epoch).tolist()
        for step, index in enumerate(schedule):
            size, offset = steps.orders[index].share(position[index] % steps.orders[index].steps, *worker)
            row_b, theta_bP = next(sources[index])
            position[index] += 1
            yield Batch(epoch, step, index, row_b, theta_bP, size, offset, step + 1 == len(schedule))


Window = tuple[int, int, int, int]  # pass, window, first step, step after the last


def _batches(
    zoo: Zoo, order: Order, rows: Held | Passing, span: tuple[int, int], worker: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(row_b, theta_bP) of each step in span[0] .. span[1] - 1 of the zoo's endless row of passes."""
    compared_G = np.zeros(len(zoo.layout.rows_G), bool)
    windows, after = itertools.tee(_windows(order, *span))
    next(after, None)
    while some := list(itertools.islice(windows, WINDOWS_PLANNED)):
        missing = [_missing(order, rows, window, worker) for window in some]
        blocks = _read_ahead(zoo, [spans_N2 for spans_N2 in missing if len(spans_N2)], compared_G, worker)
        for (number, window, first, last), spans_N2 in zip(some, missing, strict=True):
            if len(spans_N2):
                rows.put(spans_N2, next(blocks))
            steps = order.window(number, window, *worker)[first:last]
            rows.begin(steps)
            for step, row_b in enumerate(steps):
                yield torch.from_numpy(row_b), torch.from_numpy(rows.take(step))
            following = next(after, None)
            rows.end(spans([]) if following is None else order.window_spans(*following[:2], *worker))


def _missing(order: Order, rows: Held | Passing, window: Window, worker: tuple[int, int]) -> np.ndarray:
    """The spans that have to be read for a window."""
    return spans([]) if rows.complete else rows.missing(order.window_spans(*window[:2], *worker))


def _windows(order: Order, begin: int, end: int) -> Iterator[Window]:
    """The windows that the steps begin .. end - 1 touch, one after the other."""
    step = begin
    while step < end:
        number, within = divmod(step, order.steps)
        window, first = divmod(within, order.window_steps)
        last = min(order.window_steps, order.steps - window * order.window_steps, first + end - step)
        yield number, window, first, last
        step += last - first


def _reader(zoo: Zoo, wanted: list[np.ndarray], compared_G: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that reads an item's rows, wherever it runs; `compared_G`: row groups that need not be compared."""
    if any(part.footer is None for part in zoo.parts):  # an earlier version's
        rows = [rows_of(spans_N2) for spans_N2 in wanted]
        return lambda item: zoo.read_rows(rows[item])
    reads = [ranges.reads_of(zoo, spans_N2, compared_G) for spans_N2 in wanted]
    store, num_parameters = zoo.store, zoo.architecture.num_parameters
    return lambda item: ranges.read(store, num_parameters, reads[item])


def _read_ahead(
    zoo: Zoo, wanted: list[np.ndarray], compared_G: np.ndarray, worker: tuple[int, int]
) -> Iterator[np.ndarray]:
    """weights[R, P] of the rows of each item, spans [N, 2], in order, by Ray Data: one task an item, a bounded number
    of bytes ahead. The arrays are Ray's, only to be read."""
    if not wanted:
        return
    import ray.data

    read = _reader(zoo, wanted, compared_G)

    def table(batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.table({"weights": zoo_format.weights_column(read(int(batch["id"][0])))})

    row_bytes = 4 * zoo.architecture.num_parameters
    with ray.data.DataContext.current(_context(max(int(of[:, 1].sum()) for of in wanted) * row_bytes)):
        items = [{"id": item} for item in range(len(wanted))]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            table,
            batch_size=1,
            num_cpus=READ_CPUS,
            compute=ray.data.TaskPoolStrategy(size=min(WINDOWS_AHEAD, len(wanted))),
        )
    try:
        arrived = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        blocks = (zoo_format.weights_array(block["weights"]) for block in arrived)
        for spans_N2 in wanted:
            weights_RP, count = next(blocks), int(spans_N2[:, 1].sum())
            while len(weights_RP) < count:  # Ray may cut what a task returns
                weights_RP = np.concatenate([weights_RP, next(blocks)])
            yield weights_RP
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _context(item_bytes: int) -> "ray.data.DataContext":
    """Results in order, a few windows in memory at most, and no messages: a training run has hundreds of streams."""
    import ray.data
    from ray.data import ExecutionResources

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=ITEMS_IN_MEMORY * max(item_bytes, 2**20)
    )
    context.raise_original_map_exception = True
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    return context
