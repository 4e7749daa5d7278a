"""Which images a zoo keeps, how large its files are, which epochs it takes: by value, on cases worked by hand."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from distrecon.images import load
from distrecon.nets import architecture
from distrecon.zoos import datasets, open_zoo, ranges, tasks
from distrecon.zoos.importing import ImportOptions, import_zoo
from distrecon.zoos.order import Order
from distrecon.zoos.storage import store
from distrecon.zoos.write import _write_parts
from tests.zoos.kills import serially
from tests.zoos.test_format import ARCH, table

KEPT = {  # folder of the images, what was asked for -> whether they are put into the zoo
    ("here", None): True,
    ("here", False): False,
    (None, None): False,  # a set that comes with a package is everywhere
    (None, True): True,
}


@pytest.mark.parametrize(("folder", "asked"), KEPT)
def test_images_that_would_be_missed_elsewhere_are_kept(tmp_path: Path, folder, asked) -> None:
    found = datasets.entry(store(tmp_path / "zoo"), load("digits"), folder, asked)
    assert ("stored" in found) == KEPT[folder, asked]
    assert (tmp_path / "zoo/images/train.parquet").exists() == KEPT[folder, asked]


def test_very_many_images_are_left_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load("digits")
    pixels = sum(part.images.numel() for part in (images.train, images.validation, images.test))
    assert 176 * 2**20 < datasets.KEPT_PIXELS < 2**30  # all of CIFAR-10 are kept
    for limit, kept in ((pixels, True), (pixels - 1, False)):
        monkeypatch.setattr(datasets, "KEPT_PIXELS", limit)
        found = datasets.entry(store(tmp_path / f"{limit}"), images, "here", None)
        assert ("stored" in found) == kept


def test_files_are_filled_and_no_model_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of each model, room for three states: two models in each file."""
    monkeypatch.setattr("distrecon.zoos.write.PART_BYTES", 3 * 4 * ARCH.num_parameters)
    parts = _write_parts(store(tmp_path), table(8), ARCH.num_parameters)
    assert [part.rows for part in parts] == [4, 4, 4, 4]


@pytest.mark.parametrize(("epoch", "taken"), [(0, True), (7, True), (2**31, False)])
def test_epochs_are_counted_from_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, taken: bool) -> None:
    monkeypatch.setattr(tasks, "run", serially)
    arch = architecture("mlp", sizes=(4, 3, 2), activation="tanh")
    (tmp_path / "source").mkdir()
    for name in (f"a_epoch_{epoch}.pt", "b_epoch_1.pt"):
        torch.save(arch.unflatten(torch.ones(arch.num_parameters)), tmp_path / "source" / name)
    report = import_zoo(tmp_path / "source", tmp_path / "zoo", ImportOptions(activation="tanh"))
    assert [skip["reason"] for skip in report.skipped] == [f"impossible epoch ({epoch})"] * (not taken)
    assert sorted(open_zoo(tmp_path / "zoo").models().epoch_B.tolist()) == (
        [min(epoch, 1), max(epoch, 1)] if taken else [1]
    )


def test_a_passes_last_batch_is_what_is_left() -> None:
    """Ten rows in two lanes of five, two of each in a batch: 2 + 2, 2 + 2, 1 + 1."""
    order = Order(np.array([[0, 10]]), 4, 2, 2, (0,))
    assert [order.sizes(step) for step in range(order.steps)] == [[2, 2], [2, 2], [1, 1]]


def test_files_that_threads_open_at_once_are_no_more_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each thread has its own, whatever the others put out."""
    both = threading.Barrier(2)

    class Bucket:
        def open(self, file: str) -> str:
            both.wait(timeout=60)  # until another thread opens one
            return file

    monkeypatch.setattr(ranges, "OPEN", 1)
    monkeypatch.setattr(ranges, "_open", {})
    bucket = Bucket()
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda file: ranges._opened(bucket, file, None), ["a", "b"])] == ["a", "b"]
    assert len(ranges._open) == 1
