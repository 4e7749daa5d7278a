"""A zoo is copied, and its images' files are gone: it opens and is evaluated as before."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from distrecon.errors import UserError
from distrecon.images import load
from distrecon.nets import architecture, evaluate, initialise
from distrecon.zoos import inspection, open_zoo, write_zoo

ARCH = architecture("zoo_cnn", in_channels=3, image_size=32, num_classes=10)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Few random images in CIFAR-10's binary layout."""
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = draw.integers(0, 256, (12, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path / "data"


def make(path: Path, images: Path, **options: object):
    theta_SP = initialise(ARCH, ["normal"] * 3, [0, 1, 2])
    test = load("cifar10", images).test
    accuracy_S = evaluate(ARCH, theta_SP, test.images, test.labels_Q).accuracy_B.tolist()
    names = {"model_id": ["a", "b", "c"], "split": ["train", "val", "test"], "test_accuracy": accuracy_S}
    return write_zoo(path, ARCH, theta_SP, images="cifar10", images_directory=str(images), **names, **options)


def same(found, wanted) -> bool:
    return all(
        torch.equal(getattr(found, part).images, getattr(wanted, part).images)
        and torch.equal(getattr(found, part).labels_Q, getattr(wanted, part).labels_Q)
        for part in ("train", "validation", "test")
    )


def test_a_copied_zoo_has_its_images(tmp_path: Path, cifar: Path) -> None:
    images = load("cifar10", cifar)
    make(tmp_path / "zoo", cifar)
    shutil.move(tmp_path / "zoo", tmp_path / "elsewhere")
    shutil.rmtree(cifar)
    zoo = open_zoo(tmp_path / "elsewhere")
    assert same(zoo.images(), images)
    assert (zoo.images().name, zoo.images().classes) == ("cifar10", images.classes)
    found = inspection.check(zoo)
    assert (found.recomputed, found.problems) == (3, ())
    sizes = [file.stat().st_size for file in (tmp_path / "elsewhere" / "images").iterdir()]
    assert sum(sizes) < 1.3 * 72 * 3072, "pixels that were bytes take more than one byte each"


def test_on_another_filesystem(tmp_path: Path, cifar: Path) -> None:
    """A zoo whose store is not this machine's disk, as an object store's is not."""
    images = load("cifar10", cifar)
    make(tmp_path / "zoo", cifar)
    shutil.rmtree(cifar)
    elsewhere = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert same(open_zoo("zoo", elsewhere).images(), images)


def test_images_that_were_left_where_they_lay_are_found_where_one_says(tmp_path: Path, cifar: Path) -> None:
    images = load("cifar10", cifar)
    make(tmp_path / "zoo", cifar, store_images=False)
    assert same(open_zoo(tmp_path / "zoo").images(), images)
    assert not (tmp_path / "zoo" / "images").exists()
    cifar.rename(tmp_path / "cifar10")
    with pytest.raises(UserError, match=r"its images, cifar10, are not in .*data: say where .* --images DIR"):
        open_zoo(tmp_path / "zoo").images()
    assert same(open_zoo(tmp_path / "zoo", images=tmp_path / "cifar10").images(), images)
    assert same(open_zoo(tmp_path / "zoo", images=tmp_path).images(), images), "its folder of the set's name"


def test_an_older_zoo_opens(tmp_path: Path, cifar: Path) -> None:
    """Arrays that lie in the zoo, as earlier versions wrote them, also when it is moved."""
    make(tmp_path / "zoo", cifar)
    shutil.rmtree(tmp_path / "zoo" / "images")
    (tmp_path / "zoo" / "images").mkdir()
    images = load("cifar10", cifar)
    for part in ("train", "validation", "test"):
        np.save(tmp_path / "zoo" / "images" / f"{part}_images.npy", getattr(images, part).images)
        np.save(tmp_path / "zoo" / "images" / f"{part}_labels.npy", getattr(images, part).labels_Q)
    manifest = tmp_path / "zoo" / "zoo.json"
    content = json.loads(manifest.read_text())
    content["image_set"] |= {"name": "arrays", "directory": "images"}
    del content["image_set"]["stored"], content["files"], content["sha256"]
    manifest.write_text(json.dumps(content))
    shutil.move(tmp_path / "zoo", tmp_path / "elsewhere")
    assert same(open_zoo(tmp_path / "elsewhere").images(), images)


def test_a_damaged_file_is_named(tmp_path: Path, cifar: Path) -> None:
    zoo = make(tmp_path / "zoo", cifar)
    file = tmp_path / "zoo" / "images" / "test.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"images/test.parquet is damaged"):
        zoo.images()
    file.unlink()
    with pytest.raises(UserError, match=r"images/test.parquet is missing"):
        zoo.images()
