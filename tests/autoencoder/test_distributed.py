"""Any number of workers, with any split of the batch, gives the losses and gradients of one."""

import gc
import os
from typing import NamedTuple
from unittest import mock
from weakref import ref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distrecon.autoencoder import Batch, Training, ZooSample, distributed, reduction, training
from distrecon.images import load
from distrecon.nets import architecture
from tests.autoencoder.small import random_models, tiny

SIZE, STEPS = 6, 3
BUCKET_BYTES = 4000  # so that there are several
TRANSFORMER = {"model__kind": "transformer"}
NO_CONTRAST = TRANSFORMER | {"loss__terms": "S+B"}  # the projection has no gradient
FISHER = {
    "model__kind": "fisher_residual",
    "model__latent": 1,
    "model__fisher_models": 4,
    "model__fisher_queries": 3,
}


class Case(NamedTuple):
    """How a global batch of six models is split between two workers, and what they train."""

    split: list[tuple[int, int]]
    values: dict
    like_gpu: bool = False  # parameters as one vector
    zoos: int = 1  # by turns


CASES = {
    "half": Case([(0, 3), (3, 6)], TRANSFORMER),
    "uneven": Case([(0, 4), (4, 6)], TRANSFORMER),
    "empty": Case([(0, 6), (6, 6)], TRANSFORMER),
    "no contrast": Case([(0, 1), (1, 6)], NO_CONTRAST),
    "fisher": Case([(0, 2), (2, 6)], FISHER),
    "two zoos": Case([(0, 2), (2, 6)], FISHER, zoos=2),
    "vector, half": Case([(0, 3), (3, 6)], TRANSFORMER, like_gpu=True),
    "vector, uneven": Case([(0, 1), (1, 6)], TRANSFORMER, like_gpu=True),
    "vector, empty": Case([(0, 0), (0, 6)], TRANSFORMER, like_gpu=True),
}


def made(values: dict, zoos: int = 1) -> Training:
    """A training in float64."""
    arch, images = architecture("cnn_small"), load("digits")
    count = 48 if values is FISHER else STEPS * SIZE
    samples = [ZooSample(arch, random_models(arch, count, first_seed=100 * i), images) for i in range(zoos)]
    exact = {"optim__precision": "float64", "loss__lam": 0.1, "optim__clip": 0.0, "data__target_precision": "float64"}
    return Training(tiny(**exact | values), samples, 4)


def step(one: Training, number: int, first: int, end: int) -> dict[str, float]:
    """A step on these rows of the global batch."""
    rows, zoo = torch.arange(number * SIZE + first, number * SIZE + end), number % len(one.zoos)
    return one.step(Batch(0, number, zoo, rows, one.zoos[zoo].sample_BP[rows], SIZE, first))


def gradient(one: Training) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in one.parameters])


def train(values: dict, first: int, end: int, zoos: int = 1) -> dict:
    """Some steps on these rows of the global batch: losses, gradients, weights, scales."""
    one = made(values, zoos)
    losses, gradients = [], []
    for number in range(STEPS):
        losses.append(step(one, number, first, end))
        gradients.append(gradient(one))
    weights = torch.cat([p.detach().flatten() for p in one.autoencoder.parameters()])
    return {"losses": losses, "gradients": gradients, "weights": weights, "scales": one.scales}


def events(split: list[tuple[int, int]], rank: int) -> list[list[str]]:
    """What each step did in what order: a gradient complete, gradients sent, other sums."""
    one = made(TRANSFORMER)
    seen: list[str] = []
    for leaf in one.gradients.leaves:
        leaf.register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
    send, steps = dist.all_reduce, []

    def all_reduce(*args, **options):
        seen.append("sent" if options.get("async_op") else "sum")
        return send(*args, **options)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        for number in range(STEPS):
            step(one, number, *split[rank])
            steps.append([*seen])
            seen.clear()
    return steps


def trained(case: Case) -> str:
    return f"{case.zoos} {case.values}"


def work(rank: int, folder: str) -> None:
    """Every case, as one of two workers."""
    torch.set_num_threads(1)
    reduction.BUCKET_BYTES = BUCKET_BYTES
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, case in CASES.items():
        with mock.patch.object(training, "computes_at_once", lambda device, case=case: not case.like_gpu):
            torch.save(train(case.values, *case.split[rank], case.zoos), f"{folder}/{name}-{rank}.pt")
    split = CASES["uneven"].split
    torch.save(events(split, rank), f"{folder}/events-{rank}.pt")
    torch.save(train(TRANSFORMER | {"optim__reduce": "bf16"}, *split[rank]), f"{folder}/bf16-{rank}.pt")
    made = mock.Mock(return_value=torch.arange(6.0).reshape(2, 3) + rank)
    values = distributed.from_first(made, (2, 3), torch.device("cpu"))
    torch.save({"values": values, "made": made.call_count}, f"{folder}/first-{rank}.pt")
    torch.save(is_let_go(), f"{folder}/let go-{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's that drops its tensor late, when Python has ended, would abort


def is_let_go() -> bool:
    """Whether nothing keeps a training that nobody uses any more."""
    one = made(TRANSFORMER)
    step(one, 0, 0, SIZE)
    gradients = ref(one.gradients)
    del one
    gc.collect()
    return gradients() is None


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A function: what a worker found."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return lambda name, rank: torch.load(folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def alone():
    """One worker's, by what is trained."""
    return {
        key: train(case.values, 0, SIZE, case.zoos) for key, case in {trained(c): c for c in CASES.values()}.items()
    }


def test_a_worker_alone_has_all_losses(alone):
    expected = {f"loss/{n}" for n in ("contrastive", "structural", "behavioral", "cycle", "total")}
    for name in ("half", "fisher", "two zoos"):
        assert set(alone[trained(CASES[name])]["losses"][0]) == expected
    for run in alone.values():
        assert all(each.abs().max() > 1e-6 for each in run["gradients"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_workers_agree_with_one(workers, alone, name, rank):
    found, one = workers(name, rank), alone[trained(CASES[name])]
    for number in range(STEPS):
        for key, value in one["losses"][number].items():
            assert abs(found["losses"][number][key] - value) < 1e-9 * max(1, abs(value)), key
        torch.testing.assert_close(found["gradients"][number], one["gradients"][number], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-7, atol=1e-9)
    for zoo, scales in enumerate(one["scales"]):
        for key, scale in scales.items():
            assert abs(found["scales"][zoo][key] / scale - 1) < 1e-9, key


def test_gradients_are_sent_while_others_are_computed(workers):
    """From the second step on; the contrastive loss's own sum is among them."""
    first, second, third = workers("events", 0)
    assert [first, second, third] == workers("events", 1)
    assert second == third
    last = len(first) - first[::-1].index("gradient")
    assert "sent" not in first[:last]
    assert first.count("sent") == second.count("sent") > 5
    begun, end = second.index("gradient"), len(second) - second[::-1].index("gradient")
    assert second[:begun].count("sent") == 0
    assert second[end:].count("sent") <= 2
    during = second[begun:end]
    assert during.index("sent") < during.index("sum")
    assert len(during) - during[::-1].index("sent") > during.index("sum")


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_keeps_a_training_that_is_over(workers, rank):
    assert workers("let go", rank)


def test_gradients_sent_in_bf16_are_as_good_as_that(workers, alone):
    """Half a unit in the eighth binary place for what each of the two sends, and for their sum."""
    one, exact = workers("bf16", 0), alone[trained(CASES["half"])]
    assert torch.equal(one["gradients"][0], workers("bf16", 1)["gradients"][0])
    assert one["gradients"][0].dtype == torch.float64
    error = (one["gradients"][0] - exact["gradients"][0]).norm() / exact["gradients"][0].norm()
    assert 2**-12 < error < 2**-8
    assert torch.equal(one["gradients"][0], one["gradients"][0].bfloat16().double())
    assert one["losses"][0] == pytest.approx(exact["losses"][0], rel=1e-9)


def test_only_the_first_worker_makes_what_all_need(workers):
    found = [workers("first", rank) for rank in range(2)]
    assert [each["made"] for each in found] == [1, 0]
    for each in found:
        assert torch.equal(each["values"], torch.arange(6.0).reshape(2, 3))
    alone = distributed.from_first(lambda: torch.ones(2), (2,), torch.device("cpu"))
    assert torch.equal(alone, torch.ones(2))
