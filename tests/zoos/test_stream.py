"""The stream over Ray Data: the right rows with the right weights, wherever it runs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distrecon.errors import UserError
from distrecon.nets.known import mlp
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.models import Batch
from distrecon.zoos.storage import store
from distrecon.zoos.stream import plan, shard_rows, stream

pytestmark = pytest.mark.usefixtures("ray_session")


def make(folder: Path, states: int, width: int, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """A zoo in two parts whose every weight vector tells its row."""
    arch = mlp((4, width, 2))
    monkeypatch.setattr(zoo_format, "ROW_GROUP_BYTES", 5 * 4 * arch.num_parameters)
    where, parts = store(folder), []
    for number, rows in enumerate(np.array_split(np.arange(states), 2)):
        table = zoo_format.states_table(
            arch,
            model_id=[f"m{row}" for row in rows],
            epoch=[1] * len(rows),
            split=["train"] * len(rows),
            theta_SP=torch.from_numpy(rows)[:, None].float().expand(-1, arch.num_parameters),
            metrics={m: [None] * len(rows) for m in zoo_format.METRICS},
            config=["{}"] * len(rows),
        )
        parts.append(zoo_format.write_part(where, zoo_format.part_name(number), table))
    images = {"name": "digits", "directory": None, "preprocessing": "", "classes": []}
    zoo_format.commit(where, name="made", arch=arch, image_set=images, parts=parts, origin={"kind": "test"})
    return open_zoo(folder)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    return make(tmp_path / "zoo", 101, 3, monkeypatch)


SETTINGS = {"batch_size": 16, "shards": 8, "seed": 3, "window_bytes": 2 * 16 * 4 * 23}  # windows of two steps


def check_weights(batch: Batch) -> None:
    assert batch.theta_bP.dtype == torch.float32
    assert torch.equal(batch.theta_bP, batch.row_b[:, None].float().expand_as(batch.theta_bP))


@pytest.mark.parametrize("workers", [3, 4])
def test_workers_share_the_same_global_batches(zoo: Zoo, workers: int) -> None:
    alone = list(stream([zoo], **SETTINGS, last_epoch=2))
    assert [b.step for b in alone] == [*range(7)] * 3
    assert [b.epoch for b in alone] == [0] * 7 + [1] * 7 + [2] * 7
    shares = [list(stream([zoo], **SETTINGS, last_epoch=2, rank=rank, world_size=workers)) for rank in range(workers)]
    for s, whole in enumerate(alone):
        check_weights(whole)
        parts = [share[s] for share in shares]
        assert torch.equal(torch.cat([p.row_b for p in parts]), whole.row_b)
        assert torch.equal(torch.cat([p.theta_bP for p in parts]), whole.theta_bP)
        assert [p.offset for p in parts] == np.cumsum([0, *(len(p.row_b) for p in parts)])[:-1].tolist()
        assert {p.global_size for p in parts} == {whole.global_size} == {len(whole.row_b)}
    for epoch in range(3):
        rows = torch.cat([b.row_b for b in alone if b.epoch == epoch])
        assert rows.sort().values.tolist() == list(range(101))
    for rank, share in enumerate(shares):
        own = shard_rows(zoo, batch_size=16, shards=8, rank=rank, world_size=workers)
        assert torch.equal(torch.cat([b.row_b for b in share if b.epoch == 1]).sort().values, own)


def test_continuing_from_an_epoch_gives_what_would_have_come(zoo: Zoo) -> None:
    whole = [b for b in stream([zoo], **SETTINGS, last_epoch=3) if b.epoch >= 2]
    rest = list(stream([zoo], **SETTINGS, first_epoch=2, last_epoch=3))
    assert len(rest) == len(whole) == 14
    for a, b in zip(whole, rest, strict=True):
        assert (a.epoch, a.step) == (b.epoch, b.step)
        assert torch.equal(a.row_b, b.row_b)


def test_zoos_mix_by_weight(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make(tmp_path / "other", 40, 5, monkeypatch)  # another architecture
    batches = list(stream([zoo, other], **SETTINGS, last_epoch=3, weights=[1, 1.5]))
    per_epoch = [[b for b in batches if b.epoch == epoch] for epoch in range(4)]
    for epoch, found in enumerate(per_epoch):
        assert [b.step for b in found] == list(range(len(found)))
        assert [b.last for b in found] == [False] * (len(found) - 1) + [True]
        rows = torch.cat([b.row_b for b in found if b.zoo == 0])
        assert rows.sort().values.tolist() == list(range(101)), epoch
    for batch in batches:
        check_weights(batch)
        assert batch.theta_bP.shape[1] == (zoo, other)[batch.zoo].architecture.num_parameters
    # one and a half passes an epoch: after two epochs each row came three times
    twice = torch.cat([b.row_b for b in per_epoch[0] + per_epoch[1] if b.zoo == 1])
    assert torch.bincount(twice).tolist() == [3] * 40
    assert sorted({b.zoo for b in per_epoch[0][:6]}) == [0, 1]  # interleaved, not one after the other
    rest = list(stream([zoo, other], **SETTINGS, first_epoch=1, last_epoch=1, weights=[1, 1.5]))
    assert [b.row_b.tolist() for b in rest] == [b.row_b.tolist() for b in per_epoch[1]]


def test_steps_are_known_without_reading(zoo: Zoo) -> None:
    steps = plan([zoo, zoo], batch_size=16, shards=8, weights=[1, 0.5])
    assert [steps.steps(epoch) for epoch in range(3)] == [7 + 3, 7 + 4, 7 + 3]


def test_it_runs_inside_tasks_that_hold_every_cpu(zoo: Zoo) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def rows(rank: int) -> list[int]:
        found = stream([zoo], **SETTINGS, last_epoch=0, rank=rank, world_size=2)
        return [row for batch in found for row in batch.row_b.tolist()]

    seen = ray.get([rows.remote(0), rows.remote(1)], timeout=120)
    assert sorted(seen[0] + seen[1]) == list(range(101))


def test_more_workers_than_rows_left_get_empty_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = make(tmp_path / "zoo", 9, 3, monkeypatch)
    shares = [list(stream([zoo], batch_size=8, shards=8, last_epoch=0, rank=r, world_size=8)) for r in range(8)]
    assert [[len(b.row_b) for b in share] for share in shares] == [[1, 0]] * 7 + [[1, 1]]
    assert shares[0][1].theta_bP.shape == (0, zoo.architecture.num_parameters)


def test_a_stream_can_be_left_early(zoo: Zoo) -> None:
    for batch in stream([zoo], **SETTINGS, last_epoch=50):
        if batch.epoch == 1:
            break
    assert len(list(stream([zoo], **SETTINGS, last_epoch=0))) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "12 is not a multiple of the 8 virtual shards"),
        ({"world_size": 9}, "worker 0 of 9: there are only 8 virtual shards"),
        ({"split": "val"}, "no states in split 'val'"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"weights": [0.0]}, "positive weight"),
        ({"weights": [1.0, 1.0]}, "positive weight"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(zoo: Zoo, changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream([zoo], **(SETTINGS | {"last_epoch": 0} | changes))


def test_a_damaged_part_is_named(zoo: Zoo) -> None:
    Path(zoo.store.root, "states/part-00001.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        list(stream([zoo], **SETTINGS, last_epoch=0))
