"""Batches are the same whether a share is held or streamed, by any number of workers, and however the files lie.

Without Ray: what its tasks would read is read here.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distrecon.errors import UserError
from distrecon.nets.known import mlp
from distrecon.zoos import Zoo, open_zoo, ranges, row_groups
from distrecon.zoos import format as zoo_format
from distrecon.zoos import stream as stream_module
from distrecon.zoos.compact import compact
from distrecon.zoos.inspection import check
from distrecon.zoos.storage import store
from distrecon.zoos.stream import plan, stream

ARCH = mlp((4, 3, 2))
ROW = 4 * ARCH.num_parameters
EVERYTHING = 2**30


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Instead of Ray's tasks; how many rows each read."""
    read: list[int] = []

    def directly(zoo: Zoo, wanted: list[np.ndarray], compared_G: np.ndarray, worker: object) -> Iterator[np.ndarray]:
        reader = stream_module._reader(zoo, wanted, compared_G) if wanted else None
        for item, spans_N2 in enumerate(wanted):
            read.append(int(spans_N2[:, 1].sum()))
            weights_RP = reader(item).copy()
            weights_RP.flags.writeable = False  # as what lies in Ray's object store
            yield weights_RP

    monkeypatch.setattr(stream_module, "_read_ahead", directly)
    return read


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """310 states of three splits in five parts, row groups of seven."""
    monkeypatch.setattr(zoo_format, "ROW_GROUP_BYTES", 7 * ROW)
    where, parts = store(tmp_path / "zoo"), []
    for number, rows in enumerate(np.array_split(np.arange(310), 5)):
        theta_SP = torch.randn(len(rows), ARCH.num_parameters, generator=torch.Generator().manual_seed(number))
        table = zoo_format.states_table(
            ARCH,
            model_id=[f"m{row}" for row in rows],
            epoch=[1] * len(rows),
            split=[("train", "train", "train", "val", "test")[row % 5] for row in rows],
            theta_SP=theta_SP,
            metrics={m: [None] * len(rows) for m in zoo_format.METRICS},
            config=["{}"] * len(rows),
        )
        parts.append(zoo_format.write_part(where, zoo_format.part_name(number), table))
    images = zoo_format.image_entry(None)
    zoo_format.commit(where, name="made", arch=ARCH, image_set=images, parts=parts, origin={"kind": "test"})
    return open_zoo(where)


def settings(batch_size: int = 16, lanes: int = 8, steps: int = 2) -> dict[str, int]:
    return {"batch_size": batch_size, "shards": lanes, "seed": 3, "window_bytes": steps * batch_size * ROW}


def batches(zoo: Zoo, workers: int = 1, memory: int = 0, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and weights of the global batches."""
    shares = [
        stream([zoo], **{**settings(), "last_epoch": 2, **options}, rank=rank, world_size=workers, memory=memory)
        for rank in range(workers)
    ]
    steps = zip(*shares, strict=True)
    return [(torch.cat([b.row_b for b in step]), torch.cat([b.theta_bP for b in step])) for step in steps]


def same(ours: list[tuple[torch.Tensor, torch.Tensor]], others: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    pairs = zip(ours, others, strict=True)
    return all(torch.equal(a, b) for mine, other in pairs for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("layout", ["row groups", "pieces", "an earlier version's", "compacted"])
@pytest.mark.parametrize("options", [settings(), settings(32, 4, 1), settings(16, 16, 5)], ids=str)
def test_held_or_streamed_by_any_number_of_workers(zoo: Zoo, layout: str, options: dict[str, int]) -> None:
    weights = zoo.weights()
    if layout == "pieces":
        zoo.info["piece_bytes"] = 20 * ROW
    order = plan([zoo], **options).orders[0]
    rows = [row_b for number in range(3) for w in range(order.windows) for row_b in order.window(number, w, 0, 1)]
    if layout == "an earlier version's":
        zoo.info["footers"] = {}
        zoo = Zoo(zoo.store, zoo.info)
    if layout == "compacted":
        assert compact(zoo.store) == (5, 1)
        zoo = open_zoo(zoo.store)
    for memory in (0, EVERYTHING):
        for workers in (1, 2, 4):
            found = batches(zoo, workers, memory, **options)
            for (row_b, theta_bP), wanted in zip(found, rows, strict=True):
                assert row_b.tolist() == wanted.tolist()
                assert torch.equal(theta_bP, weights[row_b])


@pytest.mark.parametrize("memory", [0, EVERYTHING])
def test_beginning_and_ending_within_a_pass(zoo: Zoo, memory: int) -> None:
    """One and a half passes an epoch: the second epoch begins within a pass, and within a window."""
    weights = zoo.weights()
    whole = list(stream([zoo], **settings(), last_epoch=3, weights=[1.5], memory=memory))
    rest = list(stream([zoo], **settings(), first_epoch=1, last_epoch=3, weights=[1.5], memory=memory))
    for a, b in zip([batch for batch in whole if batch.epoch], rest, strict=True):
        assert torch.equal(a.row_b, b.row_b)
        assert torch.equal(b.theta_bP, weights[b.row_b])


def test_what_is_held_is_read_once(zoo: Zoo, tasks: list[int]) -> None:
    states = zoo.info["splits"]["train"]["states"]
    batches(zoo, last_epoch=9, memory=EVERYTHING)
    assert sum(tasks) == states
    tasks.clear()
    batches(zoo, last_epoch=9)
    assert 9 * states < sum(tasks) <= 10 * states  # pieces at the windows' edges too are read once a pass at most


def test_memory_goes_to_the_zoos_that_fit(zoo: Zoo, tasks: list[int]) -> None:
    states = zoo.info["splits"]["train"]["states"]
    for memory, passes in ((2 * states * ROW, 2), (2 * states * ROW - 1, 1 + 3), (states * ROW - 1, 3 + 3)):
        tasks.clear()
        assert len(list(stream([zoo, zoo], **settings(), last_epoch=2, memory=memory))) == 2 * 3 * 12
        assert (passes - 1) * states < sum(tasks) <= passes * states


def test_more_windows_than_are_planned_at_once(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(zoo)
    monkeypatch.setattr(stream_module, "WINDOWS_PLANNED", 3)
    assert same(batches(zoo), expected)
    assert same(batches(zoo, memory=EVERYTHING), expected)


def test_batches_are_memory_of_their_own(zoo: Zoo) -> None:
    for memory in (0, EVERYTHING):
        for batch in stream([zoo], **settings(), last_epoch=1, memory=memory):
            assert torch.equal(batch.theta_bP, zoo.weights()[batch.row_b])
            batch.theta_bP.zero_()  # nothing that comes later notices


# -- the bytes that are read ---------------------------------------------------------------------------------------


def entry(zoo: Zoo, group: int) -> np.ndarray:
    """What its file's footer says of a row group."""
    part = zoo.parts[zoo.layout.part_G[group]]
    return row_groups.listed(zoo.store, part.file, part.footer)[zoo.layout.group_G[group]]


def flip(zoo: Zoo, group: int) -> str:
    """One bit of a row group's weights; its file."""
    file = zoo.parts[zoo.layout.part_G[group]].file
    path = Path(zoo.store.path(file))
    content = bytearray(path.read_bytes())
    content[int(entry(zoo, group)["weights"]) + 5] ^= 1
    path.write_bytes(content)
    return file


@pytest.mark.parametrize("memory", [0, EVERYTHING])
def test_every_row_group_is_compared_before_it_is_believed(zoo: Zoo, memory: int) -> None:
    for group in zoo.layout.of_split("train")[::5]:
        file = flip(zoo, group)
        with pytest.raises(UserError, match=rf"{file} is damaged: the SHA-256 of the weights at byte"):
            batches(zoo, last_epoch=0, memory=memory)
        flip(zoo, group)  # back
    assert batches(zoo, last_epoch=0)


def test_a_bit_that_flips_while_a_stream_runs_is_not_looked_for_again(zoo: Zoo) -> None:
    """What was compared once is believed, as of files that are read whole: a pass costs no second comparison."""
    found = stream([zoo], **settings(), last_epoch=1)
    first = [next(found) for _ in range(12)]
    flip(zoo, 0)
    assert len(first) + len(list(found)) == 2 * 12


@pytest.mark.parametrize(("damage", "message"), [("gone", "is missing"), ("short", "is damaged: it ends before")])
def test_a_file_that_is_missing_or_cut_short(zoo: Zoo, damage: str, message: str) -> None:
    path = Path(zoo.store.path(zoo.parts[2].file))
    content = path.read_bytes()
    assert row_groups.listed(zoo.store, zoo.parts[2].file, zoo.parts[2].footer) is not None  # it was whole before
    path.unlink()
    if damage == "short":
        path.write_bytes(content[: len(content) // 8])
    with pytest.raises(UserError, match=rf"part-00002\.parquet {message}"):
        batches(zoo, last_epoch=0)


def test_parts_of_another_zoo_are_not_read(zoo: Zoo) -> None:
    row_groups._known.clear()
    first, second = (Path(zoo.store.path(zoo.parts[n].file)) for n in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        batches(zoo, last_epoch=0)


def test_weights_are_where_the_footer_says(zoo: Zoo) -> None:
    weights = zoo.weights().numpy()
    for group in range(len(zoo.layout.rows_G)):
        offset = int(entry(zoo, group)["weights"])
        first, rows = zoo.layout.first_G[group], zoo.layout.rows_G[group]
        raw = Path(zoo.store.path(zoo.parts[zoo.layout.part_G[group]].file)).read_bytes()
        assert raw[offset : offset + rows * ROW] == weights[first : first + rows].tobytes()


def test_neighbours_are_one_request(zoo: Zoo) -> None:
    compared_G = np.ones(len(zoo.layout.rows_G), bool)
    compact(zoo.store)
    joined = open_zoo(zoo.store)
    spans_N2 = joined.layout.spans("train")
    reads = ranges.reads_of(joined, spans_N2[np.random.default_rng(0).permutation(len(spans_N2))], compared_G)
    assert len(reads.files) == 1
    found = ranges.requests(reads, ARCH.num_parameters)
    assert sorted(n for those in found for n in those) == list(range(len(reads.rows_N)))
    assert len(found) == 1


# -- compacting ----------------------------------------------------------------------------------------------------


def test_a_compacted_zoo_is_the_same_zoo(zoo: Zoo) -> None:
    digest, table, before = zoo.digest, zoo.table(), batches(zoo, 2)
    assert compact(zoo.store, file_bytes=150 * ROW) == (5, 3)
    again = open_zoo(zoo.store)
    assert again.digest == digest
    assert again.table().equals(table)
    assert torch.equal(again.rows("val"), zoo.rows("val"))
    assert same(batches(again, 2), before)
    assert check(again, sample=0).problems == ()
    assert sorted(zoo.store.names("states")) == sorted({part.file for part in again.parts})
    assert json.loads(zoo.store.read("zoo.json"))["version"] == 2
    assert compact(zoo.store) == (3, 1)  # and once more, into larger files
    assert open_zoo(zoo.store).digest == digest
    assert same(batches(open_zoo(zoo.store), 2), before)
    listing = zoo.store.read("zoo.json")
    assert compact(zoo.store) == (1, 1)  # nothing to do
    assert zoo.store.read("zoo.json") == listing


def test_other_content_gives_a_compacted_zoo_another_digest(zoo: Zoo) -> None:
    compact(zoo.store)
    joined = open_zoo(zoo.store)
    zoo_format.commit(
        zoo.store, name="made", arch=ARCH, image_set=zoo.info["image_set"], parts=joined.parts, origin={"kind": "else"}
    )
    assert open_zoo(zoo.store).digest != joined.digest


def test_a_damaged_zoo_is_not_compacted(zoo: Zoo) -> None:
    flip(zoo, 3)
    listing = zoo.store.read("zoo.json")
    with pytest.raises(UserError, match="damaged"):
        compact(zoo.store)
    assert zoo.store.read("zoo.json") == listing
    assert all(zoo.store.exists(part.file) for part in zoo.parts)


def test_an_unfinished_zoo_is_not_compacted(zoo: Zoo) -> None:
    zoo.store.write("unfinished/origin.json", json.dumps({"first_unit": 5, "origin": {"kind": "import"}}).encode())
    with pytest.raises(UserError, match="unfinished import"):
        compact(zoo.store)
    assert zoo.store.exists("unfinished/origin.json")
