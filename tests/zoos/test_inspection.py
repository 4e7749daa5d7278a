"""Checking, describing and exporting a zoo."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch

from distrecon.errors import UserError
from distrecon.nets import Architecture
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos import format as zoo_format
from distrecon.zoos.inspection import check, describe, export
from distrecon.zoos.storage import store
from tests.zoos.test_format import rewrite as edit
from tests.zoos.test_format import unseal


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_a_sound_zoo_has_no_problems(tiny_zoo: Zoo) -> None:
    result = check(tiny_zoo, sample=40)
    assert result.problems == ()
    assert (result.states, result.recomputed) == (40, 40)


def rewrite(folder: Path, change, part: int = 0) -> None:
    """A part with its columns changed, written as any writer could."""
    file = folder / f"states/part-{part:05d}.parquet"
    metadata = pq.ParquetFile(file).metadata
    rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    table = pq.read_table(file)
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "weights"}
    columns["weights"] = zoo_format.weights_array(table["weights"]).copy()
    change(columns)
    columns["weights"] = zoo_format.weights_column(columns["weights"])
    changed = type(table).from_pydict({n: columns[n] for n in table.column_names}, schema=table.schema)
    with pq.ParquetWriter(file, table.schema) as writer:
        start = 0
        for size in rows:
            writer.write_table(changed.slice(start, size))
            start += size


def set_cell(column: str, value):
    return lambda columns: columns[column].__setitem__(0, value)


def copy_cell(columns) -> None:
    columns["model_id"][1], columns["epoch"][1] = columns["model_id"][0], columns["epoch"][0]


PROBLEMS = {
    "nan": (lambda f: rewrite(f, lambda c: c["weights"].__setitem__((0, 5), np.nan)), "non-finite weights"),
    "nameless": (lambda f: rewrite(f, set_cell("model_id", None)), "row group 0 has rows without model_id"),
    "no epoch": (lambda f: rewrite(f, set_cell("epoch", None)), "row group 0 has rows without epoch"),
    "split": (lambda f: rewrite(f, set_cell("split", "test")), "is of .'test', 'train'., not of 'train'"),
    "both": (lambda f: rewrite(f, set_cell("split", "test")), "is both in 'test' and in 'train'"),
    "again": (lambda f: rewrite(f, copy_cell), "appears again"),
    "accuracy": (
        lambda f: rewrite(f, set_cell("test_accuracy", 0.999)),
        r"accuracy 0.9990 is recorded, 0.* on digits",
    ),
    "weights": (lambda f: rewrite(f, lambda c: c["weights"].__setitem__(0, 0.3)), "is recorded"),
    "missing": (lambda f: (f / "states/part-00001.parquet").unlink(), "part-00001.parquet is missing"),
    "torn": (lambda f: os.truncate(f / "states/part-00001.parquet", 5000), "part-00001.parquet is damaged"),
    "stray": (lambda f: shutil.copy(f / "states/part-00000.parquet", f / "states/part-00009.parquet"), "not part of"),
    "count": (lambda f: edit(f, states=41), "says 41 states, the files have 40"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_is_found_and_named(copy: Path, name: str) -> None:
    damage, message = PROBLEMS[name]
    unseal(copy)
    damage(copy)
    result = check(open_zoo(copy), sample=40)
    assert any(re.search(message, problem) for problem in result.problems), result.problems
    assert all("\n" not in problem for problem in result.problems)


def test_a_zoo_whose_images_are_not_there_is_checked_without_them(copy: Path) -> None:
    unseal(copy, image_set={"name": "cifar10", "directory": None, "preprocessing": "", "classes": []})
    result = check(open_zoo(copy))
    assert (result.recomputed, result.problems) == (0, ())
    assert "cifar10 needs the directory" in result.note


def test_the_description_has_the_counts_and_a_histogram(tiny_zoo: Zoo) -> None:
    text = describe(tiny_zoo)
    assert "1,198 parameters, 40 tokens" in text
    assert "20 with 40 states, 0 excluded" in text
    assert "train 16, val 1, test 3" in text
    models = tiny_zoo.models()
    for epoch in (1, 3):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"epoch {epoch} ")]
        values = models.test_accuracy_B[models.epoch_B == epoch]
        assert [f"{values.mean():.3f}", f"{values.min():.3f}", f"{values.max():.3f}", "20"] == line.split()[-4:]
        bars = line.split("|")[1]
        assert [bar != " " for bar in bars] == (torch.histc(values, 20, 0, 1) > 0).tolist()


def test_a_description_names_a_file_that_is_missing(copy: Path) -> None:
    unseal(copy)
    (copy / "states/part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00001\.parquet is missing; the zoo lists it"):
        describe(open_zoo(copy))


def test_an_exported_model_is_the_row(tiny_zoo: Zoo, tmp_path: Path) -> None:
    models = tiny_zoo.models()
    name = models.model_id[7]
    for epoch, chosen in ((None, 3), (1, 1)):
        file = tmp_path / f"{chosen}.safetensors"
        assert export(tiny_zoo, name, file, epoch) == chosen
        (row,) = [i for i, m in enumerate(models.model_id) if m == name and models.epoch_B[i] == chosen]
        state = safetensors.torch.load_file(file)
        assert torch.equal(tiny_zoo.architecture.flatten(state), models.theta_BP[row])
        with safetensors.safe_open(file, "pt") as opened:
            assert Architecture.from_dict(json.loads(opened.metadata()["architecture"])) == tiny_zoo.architecture


@pytest.mark.parametrize(
    ("model", "epoch", "message"),
    [("tiny-0003", None, "did you mean 'tiny-000"), ("tiny-00003", 2, "has epochs 1, 3, not 2")],
)
def test_an_unknown_model_or_epoch_is_refused(tiny_zoo: Zoo, tmp_path: Path, model, epoch, message) -> None:
    with pytest.raises(UserError, match=message):
        export(tiny_zoo, model, tmp_path / "out.safetensors", epoch)
    assert not list(tmp_path.iterdir())


def test_export_overwrites_nothing(tiny_zoo: Zoo, tmp_path: Path) -> None:
    store(tmp_path).write("out.safetensors", b"mine")
    with pytest.raises(UserError, match="exists already"):
        export(tiny_zoo, "tiny-00003", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
