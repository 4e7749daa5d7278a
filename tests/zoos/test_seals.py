"""Every file of a zoo is as it was written, or that is said: seals, `zoo check`, `zoo seal`."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distrecon.errors import UserError
from distrecon.images import load
from distrecon.nets import architecture
from distrecon.zoos import Zoo, open_zoo, row_groups, seals, write_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos import write as write_module
from distrecon.zoos.inspection import check
from distrecon.zoos.storage import store
from distrecon.zoos.write import seal_zoo
from tests.zoos.test_format import rewrite, unseal

PART = "states/part-00001.parquet"
ARCH = architecture("mlp", sizes=(64, 3, 10), activation="tanh")


def make(folder: Path, seed: int = 0) -> Zoo:
    """Eight models in four files, with images of its own."""
    whole = load("digits")
    theta_SP = torch.randn(8, ARCH.num_parameters, generator=torch.Generator().manual_seed(seed))
    ids, split = [f"m{i}" for i in range(8)], ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "PART_BYTES", 2 * 4 * ARCH.num_parameters)
        return write_zoo(folder, ARCH, theta_SP, model_id=ids, split=split, images=whole)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return make(tmp_path / "zoo")


@pytest.fixture(autouse=True)
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been compared yet."""
    monkeypatch.setattr(seals, "_compared", set())
    monkeypatch.setattr(row_groups, "_known", {})


def found(folder: Path) -> list[str]:
    """What opening and checking a zoo say is wrong with it."""
    try:
        return list(check(open_zoo(folder), sample=0).problems)
    except UserError as error:
        return [str(error)]


def test_every_file_is_sealed_and_nothing_is_wrong(zoo: Zoo) -> None:
    folder = Path(zoo.store.root)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files - {"zoo.json"} == zoo.sealed.keys()
    assert len(zoo.parts) == 4
    result = check(zoo)
    assert (result.problems, result.sealed, result.unsealed) == ((), 7, 0)


def test_a_seal_tells_the_content_and_its_size(tmp_path: Path) -> None:
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad:3"  # of "abc", FIPS 180-2
    assert seals.seal(b"abc") == expected
    (tmp_path / "file").write_bytes(b"abc")
    assert seals.seal_of(store(tmp_path), "file") == expected


@pytest.mark.parametrize("flips", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(zoo: Zoo, flips: int) -> None:
    """Anywhere in the zoo's folder, `zoo.json` too, each place as likely as its size."""
    folder = Path(zoo.store.root)
    contents = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    draw = random.Random(1)
    missed = []
    places = draw.choices(list(contents), weights=[len(c) for c in contents.values()], k=flips - 50)
    for path in [*places, *[folder / "zoo.json"] * 50]:
        damaged, bit = bytearray(contents[path]), draw.randrange(8 * len(contents[path]))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        problems = found(folder)
        if not problems or any("\n" in text for text in problems):
            missed.append((path.name, bit, problems))
        path.write_bytes(contents[path])
    assert missed == []
    assert found(folder) == []


def overwrite(folder: Path, change) -> None:
    """A part written anew with other weights, by a writer that knows the format."""
    zoo = open_zoo(folder)
    part = zoo.parts[1]
    table = next(zoo_format.read_groups(zoo.store, part.file, [0]))
    columns = {name: table[name] for name in table.column_names}
    columns["weights"] = zoo_format.weights_column(change(zoo_format.weights_array(table["weights"])))
    zoo_format.write_part(zoo.store, part.file, type(table).from_pydict(columns, schema=table.schema))


DAMAGE = {
    "reversed": lambda f: overwrite(f, lambda w: w[:, ::-1].copy()),
    "zeroed": lambda f: overwrite(f, lambda w: w * 0),
    "another zoo's": lambda f: shutil.copy(Path(make(f.parent / "o", 1).store.root) / PART, f / "states"),
    "gone": lambda f: (f / PART).unlink(),
    "longer": lambda f: (f / PART).open("ab").write(b"PAR1"),
}  # fmt: skip


def without_lists(folder: Path) -> None:
    """As a zoo whose parts list no row groups: they are compared whole."""
    content = json.loads((folder / "zoo.json").read_text())
    del content["footers"], content["sha256"]
    (folder / "zoo.json").write_bytes(zoo_format.manifest(content))


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda zoo: zoo.weights(),
        lambda zoo: zoo.sample(3, seed=0),
        lambda zoo: list(zoo.tables("train", ["model_id"])),
        lambda zoo: zoo.models("train"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_not_believed(zoo: Zoo, name: str, whole: bool, read) -> None:
    DAMAGE[name](Path(zoo.store.root))
    if whole:
        without_lists(Path(zoo.store.root))
    with pytest.raises(UserError, match=r"part-00001\.parquet is (damaged|missing)"):
        read(open_zoo(zoo.store.root))
    assert any("part-00001.parquet is" in text for text in found(Path(zoo.store.root)))


def test_images_that_are_not_what_was_written_are_not_believed(zoo: Zoo) -> None:
    other = make(Path(zoo.store.root).parent / "other").store
    shutil.copy(other.path("images/validation.parquet"), zoo.store.path("images/test.parquet"))
    with pytest.raises(UserError, match=r"images/test\.parquet is damaged"):
        open_zoo(zoo.store.root).images()


def test_what_was_not_damaged_is_still_read(zoo: Zoo) -> None:
    DAMAGE["zeroed"](Path(zoo.store.root))
    assert len(open_zoo(zoo.store.root).weights("test")) == 2


def test_a_file_is_compared_once_in_a_process(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    without_lists(Path(zoo.store.root))
    zoo = open_zoo(zoo.store.root)
    read = []
    real = seals.seal_of
    monkeypatch.setattr(seals, "seal_of", lambda store, name: read.append(name) or real(store, name))
    first, again = zoo.weights(), open_zoo(zoo.store.root).weights()
    assert torch.equal(first, again)
    assert sorted(read) == [part.file for part in zoo.parts]


def test_what_is_read_from_an_unlisted_file_waits_until_it_is_compared(zoo: Zoo) -> None:
    """Nothing of it is handed on, however many row groups it has."""
    without_lists(Path(zoo.store.root))
    DAMAGE["zeroed"](Path(zoo.store.root))
    zoo, came = open_zoo(zoo.store.root), []
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        came.extend(group.part for group, _ in zoo.read(zoo.row_groups))
    assert set(came) == {0}


@pytest.fixture
def one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """Six models in one file, two in each row group."""
    monkeypatch.setattr(zoo_format, "ROW_GROUP_BYTES", 2 * 4 * ARCH.num_parameters)
    theta_SP = torch.randn(6, ARCH.num_parameters, generator=torch.Generator().manual_seed(0))
    return write_zoo(tmp_path / "one", ARCH, theta_SP, model_id=list("abcdef"), split=["train"] * 6)


def flip(zoo: Zoo, at: int) -> None:
    path = Path(zoo.store.path(zoo.parts[0].file))
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_is_read_is_verified_and_no_more(one_part: Zoo) -> None:
    zoo, entries_G = open_zoo(one_part.store.root), listed(one_part)
    flip(zoo, int(entries_G["after"][1]) - 1)  # the last byte of the second row group's weights
    assert zoo.read_rows(np.array([0, 5])).shape == (2, ARCH.num_parameters)
    assert [t.num_rows for t in zoo.tables(columns=["model_id", "epoch"])] == [6]
    with pytest.raises(UserError, match=r"is damaged: .* the weights of row group 1 is another"):
        zoo.read_rows(np.array([3]))
    assert found(Path(zoo.store.root)) == [
        "states/part-00000.parquet is damaged: it is not what was written there (its SHA-256 is another)"
    ]


def test_each_row_group_is_verified_once_in_a_process(one_part: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, real = [], row_groups.hashlib.sha256
    monkeypatch.setattr(row_groups.hashlib, "sha256", lambda *a: digests.append(len(a[0])) or real(*a))
    zoo = open_zoo(one_part.store.root)
    digests.clear()
    zoo.read_rows(np.array([0, 1, 4]))
    weights = 2 * 4 * ARCH.num_parameters
    assert digests[1:] == [weights, weights]  # of the footer before, whose list is kept
    zoo.read_rows(np.array([0, 3, 4]))
    assert digests[3:] == [weights]
    zoo.weights()
    assert len(digests) == 4


def test_what_was_verified_before_is_read_again_the_same_and_what_was_not_is_compared(one_part: Zoo) -> None:
    """Weights, ids and all columns of three row groups, in turn; then a bit of the last one's config."""

    def seen() -> list[list[bool]]:
        (known,) = row_groups._known.values()
        return known.seen_G2.tolist()

    whole = one_part.table()
    row_groups._known.clear()
    groups = one_part.row_groups
    assert [table for _, table in one_part.read(groups[:2], ["model_id"])][1]["model_id"].to_pylist() == ["c", "d"]
    assert seen() == [[False, True], [False, True], [False, False]]
    for _ in range(2):  # the weights are compared still, the other columns are not
        assert pa.concat_tables([table for _, table in one_part.read(groups[:2])]).equals(whole.slice(0, 4))
    assert seen() == [[True, True], [True, True], [False, False]]
    path = Path(one_part.store.path(one_part.parts[0].file))
    content, (known,) = bytearray(path.read_bytes()), row_groups._known.values()
    content[known.entries_G["after"][2]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="the SHA-256 of row group 2 is another"):
        one_part.table(columns=["model_id"])


def listed(zoo: Zoo) -> np.ndarray:
    zoo.weights()
    (known,) = row_groups._known.values()
    row_groups._known.clear()
    return known.entries_G


def test_a_part_lists_where_its_weights_lie(one_part: Zoo) -> None:
    """By hand: the float32 of the row group's two models, one after the other, at the place that is listed."""
    content = Path(one_part.store.path(one_part.parts[0].file)).read_bytes()
    entries_G, theta_SP = listed(one_part), one_part.weights()
    assert [entry["start"] for entry in entries_G] == [4, *entries_G["end"][:-1]]
    for group, (_, weights, after, _, sha, _) in enumerate(e.item() for e in entries_G):
        assert content[weights:after] == theta_SP[2 * group : 2 * group + 2].numpy().tobytes()
        assert sha == hashlib.sha256(content[weights:after]).digest()
    parquet = pq.ParquetFile(pa.BufferReader(content))
    assert int.from_bytes(content[-8:-4], "little") + 8 == int(one_part.parts[0].footer.rpartition(":")[2])
    assert parquet.metadata.num_row_groups == 3


def test_models_of_more_than_a_page_are_read_as_written(tmp_path: Path) -> None:
    arch = architecture("mlp", sizes=(600, 600, 10), activation="tanh")  # 1.5 MB a model: more than Parquet's page
    theta_SP = torch.randn(2, arch.num_parameters, generator=torch.Generator().manual_seed(0))
    zoo = write_zoo(tmp_path / "wide", arch, theta_SP, model_id=["a", "b"], split=["train"] * 2)
    assert torch.equal(zoo.weights(), theta_SP)
    decoded = pq.read_table(zoo.store.path(zoo.parts[0].file))["weights"]
    assert np.array_equal(zoo_format.weights_array(decoded), theta_SP.numpy())


def test_another_content_has_another_digest(tmp_path: Path) -> None:
    first, same, other = (make(tmp_path / f"{i}" / "zoo", seed) for i, seed in enumerate((0, 0, 1)))
    assert first.digest == same.digest != other.digest


def test_foreign_and_doubled_files_are_named(zoo: Zoo) -> None:
    folder = Path(zoo.store.root)
    for place in ("states/part-00009.parquet", "images/more.parquet"):
        (folder / place).write_bytes(b"")
    content = json.loads((folder / "zoo.json").read_text())
    rewrite(folder, parts=[*content["parts"], content["parts"][0]])
    with pytest.raises(UserError, match=r"zoo\.json is damaged, or was edited"):
        open_zoo(folder)
    unseal(folder)
    seal_zoo(folder)
    text = " ".join(found(folder))
    assert "part-00000.parquet is listed 2 times" in text
    assert "part-00009.parquet is not part of the zoo" in text
    assert "images/more.parquet is not part" in text


def test_parts_cannot_be_committed_twice(zoo: Zoo) -> None:
    with pytest.raises(UserError, match=r"part-00000\.parquet is listed twice"):
        zoo_format.commit(
            zoo.store, name="x", arch=ARCH, image_set=zoo.info["image_set"], parts=[*zoo.parts, zoo.parts[0]], origin={}
        )  # fmt: skip


def test_an_older_zoo_opens_and_can_be_sealed(zoo: Zoo) -> None:
    folder, weights = Path(zoo.store.root), zoo.weights()
    unseal(folder)
    older = open_zoo(folder)
    assert torch.equal(older.weights(), weights)
    result = check(older)
    assert (result.problems, result.sealed, result.unsealed) == ((), 0, 4)
    assert seal_zoo(folder) == 7
    assert open_zoo(folder).info == zoo.info
    assert seal_zoo(folder) == 0


def test_an_edited_zoo_is_refused_until_it_is_sealed_again(zoo: Zoo) -> None:
    folder = Path(zoo.store.root)
    rewrite(folder, name="renamed")
    with pytest.raises(UserError, match=r"zoo seal .*zoo accepts it"):
        open_zoo(folder)
    assert seal_zoo(folder) == 0
    assert open_zoo(folder).name == "renamed"
    DAMAGE["zeroed"](folder)
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged"):
        seal_zoo(folder)


BROKEN = {  # a key of zoo.json -> values that it cannot have
    "name": [None, 3],
    "architecture": [{}, [], {"kind": "chain"}],
    "image_set": [{}, {"name": 3}, {"name": "x", "directory": None, "preprocessing": "", "classes": [], "stored": "."}],
    "models": [-1, 1.5, "8", None],
    "states": [True, {}],
    "splits": [{}, {"train": 3}],
    "excluded": [None],
    "parts": [
        [{}], [3], {"a": 1}, [{"file": "../../secret.parquet", "group_rows": 1, "states": {}, "models": {}}],
        [{"file": "states/part-00000.parquet", "group_rows": 0, "states": {"train": 1}, "models": {"train": 1}}],
        [{"file": "states/part-00000.parquet", "group_rows": 1, "states": {"tuna": 1}, "models": {}}],
        [{"file": "states/part-00000.parquet", "group_rows": 1, "states": {"train": -1}, "models": {}}],
        [{"file": "/etc/passwd", "group_rows": 1, "states": {"train": 1}, "models": {}}],
    ],
    "version": ["1", None, 10**400],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BROKEN.items() for value in values])
def test_a_damaged_list_is_refused_in_one_line(zoo: Zoo, key: str, value) -> None:
    unseal(Path(zoo.store.root), **{key: value})
    with pytest.raises(UserError) as error:
        open_zoo(zoo.store.root).weights()
    assert "\n" not in str(error.value)
    assert "zoo" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '{"format": "distrecon-zoo"}', "\udcff", "NaN"])
def test_what_is_no_list_at_all_is_refused_in_one_line(zoo: Zoo, text: str) -> None:
    Path(zoo.store.root, "zoo.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"zoo\.json") as error:
        open_zoo(zoo.store.root)
    assert "\n" not in str(error.value)


def test_a_name_cannot_leave_its_folder(zoo: Zoo) -> None:
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(UserError, match="leads out"):
            zoo.store.read(name)
