"""The zoo on disk: what others can read, what is refused, what a crash leaves."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch

from distrecon.errors import UserError
from distrecon.nets import Architecture
from distrecon.nets.known import mlp
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.storage import store

ARCH = mlp((4, 3, 2))
IMAGES = {"name": "digits", "directory": None, "preprocessing": "none", "classes": ["a", "b"]}


def table(count: int, first: int = 0, arch: Architecture = ARCH, **changes) -> pa.Table:
    """States of `count` models, two epochs each; every weight tells its model, epoch and position."""
    names = [f"m{first + i // 2:03d}" for i in range(2 * count)]
    epochs = [1 + i % 2 for i in range(2 * count)]
    rows = {
        "model_id": names,
        "epoch": epochs,
        "split": [("train", "train", "val", "test")[int(n[1:]) % 4] for n in names],
        "theta_SP": torch.arange(2.0 * count)[:, None] + 2 * first + torch.linspace(0, 0.5, arch.num_parameters),
        "metrics": {m: [k + i / 100 for i in range(2 * count)] for k, m in enumerate(zoo_format.METRICS)},
        "config": [json.dumps({"lr": 1e-3})] * (2 * count),
    } | changes
    return zoo_format.states_table(arch, **rows)


def write(folder: Path, tables: list[pa.Table]) -> Zoo:
    where = store(folder)
    parts = [zoo_format.write_part(where, zoo_format.part_name(i), t) for i, t in enumerate(tables)]
    zoo_format.commit(where, name="made", arch=ARCH, image_set=IMAGES, parts=parts, origin={"kind": "test"})
    return open_zoo(folder)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """12 models in two parts, with row groups of three rows."""
    monkeypatch.setattr(zoo_format, "ROW_GROUP_BYTES", 3 * 4 * ARCH.num_parameters)
    return write(tmp_path / "zoo", [table(8), table(4, first=8)])


def test_pyarrow_alone_reads_it(zoo: Zoo) -> None:
    read = pq.read_table(f"{zoo.store.root}/states")
    assert read.schema.equals(zoo_format.schema(ARCH.num_parameters))
    assert isinstance(read.schema.field("weights").type, pa.FixedShapeTensorType)
    assert read.num_rows == zoo.num_states == 24
    weights = zoo_format.weights_array(read["weights"])
    by_key = {
        (m, e): w for m, e, w in zip(read["model_id"].to_pylist(), read["epoch"].to_pylist(), weights, strict=True)
    }
    assert by_key["m005", 2][0] == 11.0


def test_rows_weights_and_models_tell_the_same(zoo: Zoo) -> None:
    everything = zoo.models()
    assert everything.row_B.tolist() == list(range(24))
    assert torch.equal(zoo.weights(), everything.theta_BP)
    seen = []
    for split in zoo_format.SPLITS:
        models = zoo.models(split)
        assert len(models) == zoo.info["splits"][split]["states"]
        assert set(zoo.table(split)["split"].to_pylist()) == {split}
        assert torch.equal(models.theta_BP, everything.theta_BP[models.row_B])
        assert [everything.model_id[i] for i in models.row_B] == models.model_id
        assert models.theta_BP.dtype == torch.float32
        seen += models.row_B.tolist()
    assert sorted(seen) == list(range(24))
    number = everything.model_id.index("m003")
    assert everything.epoch_B[number] == 1
    assert everything.test_accuracy_B[number] == pytest.approx(1.06)
    assert everything.train_loss_B[number] == pytest.approx(3.06)


def test_row_groups_never_mix_splits_and_keep_models_together(zoo: Zoo) -> None:
    for part in zoo.parts:
        metadata = pq.ParquetFile(zoo.store.path(part.file)).metadata
        real = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        assert real == [rows for _, rows in part.row_groups()]
    for group in zoo.row_groups:
        part = zoo.parts[group.part]
        assert set(next(zoo_format.read_groups(zoo.store, part.file, [group.group]))["split"].to_pylist()) == {
            group.split
        }
    ids = zoo.table("train")["model_id"].to_pylist()
    assert ids == sorted(ids)


def test_rows_are_read_in_any_order(zoo: Zoo) -> None:
    rows_S = np.array([23, 0, 7, 7, 12, 1])
    assert torch.equal(torch.from_numpy(zoo.read_rows(rows_S)), zoo.weights()[rows_S])
    assert zoo.read_rows(np.array([], np.int64)).shape == (0, ARCH.num_parameters)


def test_samples_are_drawn_without_repeats_and_by_seed(zoo: Zoo) -> None:
    first, again, other = zoo.sample(9, seed=1), zoo.sample(9, seed=1), zoo.sample(9, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 9
    known = {tuple(row) for row in zoo.weights("train").tolist()}
    assert all(tuple(row) in known for row in first.tolist())
    with pytest.raises(UserError, match="13 states wanted, split 'train' has 12"):
        zoo.sample(13, seed=0)


def test_unknown_metrics_are_nan_not_zero(tmp_path: Path) -> None:
    metrics = {m: [None, 0.5] for m in zoo_format.METRICS}
    models = write(tmp_path, [table(1, metrics=metrics)]).models()
    assert models.train_loss_B.isnan().tolist() == [True, False]


def nan_at(row: int) -> torch.Tensor:
    theta_SP = torch.zeros(4, ARCH.num_parameters)
    theta_SP[row, 3] = float("nan")
    return theta_SP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta_SP": nan_at(3)}, "model 'm001', epoch 2: non-finite weights"),
        ({"split": ["train", "test", "val", "val"]}, "'m000' is both in 'train' and in 'test'"),
        ({"split": ["train", "train", "valid", "valid"]}, "unknown split 'valid'"),
        ({"epoch": [1, 1, 1, 2]}, "'m000': epoch 1 appears 2 times"),
        ({"theta_SP": torch.zeros(4, 5)}, "parameters a model"),
    ],
)
def test_states_that_make_no_zoo_are_refused(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        table(2, **changes)


def rewrite(folder: Path, **changes) -> None:
    content = json.loads((folder / "zoo.json").read_text()) | changes
    (folder / "zoo.json").write_text(json.dumps(content))


def unseal(folder: Path, **changes) -> None:
    """The zoo as versions before there were seals left it."""
    content = json.loads((folder / "zoo.json").read_text())
    del content["files"], content["footers"], content["sha256"]
    (folder / "zoo.json").write_text(json.dumps(content | changes, indent=1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rewrite(f, version=99), "format version 99.*update distrecon"),
        (lambda f: rewrite(f, format="other"), "does not describe a zoo"),
        (lambda f: (f / "zoo.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "zoo.json").unlink(), "is not a zoo"),
        (lambda f: (f / "states/part-00001.parquet").unlink(), "part-00001.parquet is missing"),
        (lambda f: os.truncate(f / "states/part-00001.parquet", 900), "part-00001.parquet is damaged"),
    ],
)
def test_a_broken_zoo_is_named(zoo: Zoo, damage, message: str) -> None:
    damage(Path(zoo.store.root))
    with pytest.raises(UserError, match=message) as error:
        open_zoo(zoo.store.root).table()
    assert "\n" not in str(error.value)


def test_no_folder_is_no_zoo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a zoo"):
        open_zoo(tmp_path / "nowhere")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = store(tmp_path)
    where.write("a/file", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        where.write("a/file", b"new and longer")
    assert os.listdir(tmp_path / "a") == ["file"]
    assert where.read("a/file") == b"old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/zoo\.json"):
        store(tmp_path / "file").write("zoo.json", b"{}")


ADDRESSES = {
    "pyarrow filesystem": lambda path: (path, pafs.LocalFileSystem()),
    "pyarrow subtree": lambda path: ("zoo", pafs.SubTreeFileSystem(os.path.dirname(path), pafs.LocalFileSystem())),
    "fsspec filesystem": lambda path: (path, pytest.importorskip("fsspec").filesystem("file")),
    "file URL": lambda path: (f"file://{path}", None),
    "fsspec URL": lambda path: (f"local://{path}", None),
}


@pytest.mark.parametrize("kind", ADDRESSES)
def test_any_filesystem_reads_and_writes(zoo: Zoo, kind: str) -> None:
    path, filesystem = ADDRESSES[kind](zoo.store.root)
    there = open_zoo(path, filesystem)
    assert torch.equal(there.weights(), zoo.weights())
    assert torch.equal(pickle.loads(pickle.dumps(there)).weights("val"), zoo.weights("val"))
    there.store.write("states/part-00009.parquet", b"content")
    assert Path(zoo.store.root, "states/part-00009.parquet").read_bytes() == b"content"


def test_an_unknown_kind_of_address_is_named() -> None:
    with pytest.raises(UserError, match="ftq://host/zoo"):
        open_zoo("ftq://host/zoo")


def test_importing_zoos_imports_neither_ray_nor_mlflow() -> None:
    code = "import distrecon.zoos.settings, sys; sys.exit(any(m in sys.modules for m in ('ray', 'mlflow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ray_data_reads_a_split(tiny_zoo: Zoo) -> None:
    rows = tiny_zoo.dataset("test", ["model_id", "weights"]).take_all()
    weights = torch.stack([torch.as_tensor(np.array(row["weights"])) for row in rows])
    expected = tiny_zoo.weights("test")
    assert len(rows) == len(expected)
    assert torch.equal(weights.sort(0).values, expected.sort(0).values)
