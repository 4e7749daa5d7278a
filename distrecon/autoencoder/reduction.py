"""Sums of the workers' gradients, sent in buckets while the backward pass is still computing others.

- A worker's losses are sums over its rows, divided by the global batch's size: gradients are added up, not averaged,
  and shares of any size weigh as they should.
- Parameters are sent in the order in which their gradients are complete. That is seen in the first step of every zoo,
  which sends the same buckets when it is over, so that a training that goes on from a checkpoint rounds as before.
- The sums have a process group of their own: others, of the contrastive loss, are asked for in the same backward pass.

torch's DistributedDataParallel does this for one module's call, all of whose parameters take part; here a step is
several calls of parts of a module, and a zoo's own parameters rest in the steps of others.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import cast
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from distrecon.autoencoder import distributed

BUCKET_BYTES = 8 * 2**20  # far above what a message costs whatever its size; the last one is waited for


class GradientSums:
    """`begin`, a backward pass, `finish`, in every step of every worker. One worker's are only handed on.

    `leaves` are the tensors that the backward pass gives gradients to; sums are of type `dtype`, messages of `sent`.
    """

    def __init__(self, leaves: Sequence[Tensor], dtype: torch.dtype, sent: torch.dtype) -> None:
        self.leaves, self.dtype, self.sent = list(leaves), dtype, sent
        self.buckets: dict[int, list[list[int]]] = {}  # per zoo, numbers of leaves
        self.zoo: int | None = None  # while a step is under way
        self.complete: dict[int, None] = {}  # this step's leaves, in the order of their gradients
        self.under_way: list[tuple[Tensor, dist.Work]] = []  # per bucket sent
        self.group = dist.new_group() if distributed.active() else None
        if self.group is not None:
            for i, leaf in enumerate(self.leaves):  # not by `self`: a leaf's hooks would keep all of this for ever
                leaf.register_post_accumulate_grad_hook(partial(_completed, ref(self), i))

    def begin(self, zoo: int) -> None:
        """Before the backward pass of a step on this zoo."""
        self.zoo, self.complete, self.under_way = zoo, {}, []
        self._take()

    def finish(self) -> list[Tensor | None]:
        """The sums over all workers in the order of the leaves, None for one in nobody's losses; leaves keep none.

        Raises RuntimeError if a leaf has a gradient that had none in the zoo's first step.
        """
        zoo, self.zoo = cast(int, self.zoo), None
        if self.group is None:
            return self._take()
        if zoo not in self.buckets:
            self.buckets[zoo] = self._agreed()
        buckets = self.buckets[zoo]
        if not self.complete.keys() <= set(chain(*buckets)):
            raise RuntimeError("a parameter has a gradient that had none in its zoo's first step")
        for bucket in buckets[len(self.under_way) :]:
            self._send(bucket)
        sums: list[Tensor | None] = [None] * len(self.leaves)
        for bucket, (message, work) in zip(buckets, self.under_way, strict=True):
            work.wait()
            parts = message.to(self.dtype).split([self.leaves[i].numel() for i in bucket])
            for i, part in zip(bucket, parts, strict=True):
                sums[i] = part.view(self.leaves[i].shape)
        self._take()
        self.under_way = []
        return sums

    def _take(self) -> list[Tensor | None]:
        gradients = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return gradients

    def completed(self, number: int) -> None:
        """Sends what this gradient completes; in the same order on all workers, so a bucket waits for those before."""
        if self.zoo is None:
            return
        self.complete[number] = None
        for bucket in self.buckets.get(self.zoo, [])[len(self.under_way) :]:
            if not all(i in self.complete for i in reversed(bucket)):  # the last is the last to come
                break
            self._send(bucket)

    def _send(self, bucket: Sequence[int]) -> None:
        """A gradient that is missing here counts as zero."""
        leaves = [self.leaves[i] for i in bucket]
        parts = [(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten() for leaf in leaves]
        message = torch.cat(parts).to(self.sent)
        work = dist.all_reduce(message, group=self.group, async_op=True)
        self.under_way.append((message, cast(dist.Work, work)))

    def _agreed(self) -> list[list[int]]:
        """Buckets of the leaves with a gradient on any worker, in the order seen, the same on all workers."""
        place_L = torch.full((len(self.leaves),), -1)
        place_L[[*self.complete]] = torch.arange(len(self.complete))
        place_L = place_L.to(self.leaves[0].device)
        dist.all_reduce(place_L, op=dist.ReduceOp.MAX, group=self.group)
        place = place_L.tolist()
        buckets: list[list[int]] = []
        size = BUCKET_BYTES
        for i in sorted((i for i, p in enumerate(place) if p >= 0), key=place.__getitem__):
            if size >= BUCKET_BYTES:
                buckets.append([])
                size = 0
            buckets[-1].append(i)
            size += self.leaves[i].numel() * self.sent.itemsize
        return buckets


def _completed(sums: ref[GradientSums], number: int, _: Tensor) -> None:
    alive = sums()
    if alive is not None:
        alive.completed(number)
