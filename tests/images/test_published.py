"""Image sets from tiny files of the exact published formats."""

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from distrecon.errors import UserError
from distrecon.images import IMAGE_SETS, ImageSet, load
from distrecon.images.files import resize

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder: Path, zipped: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for part, count in (("train", 40), ("t10k", 10)):
        images, labels = pixels(count, 28, 28), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            name = folder / f"{part}-{kind}-ubyte"
            if zipped:
                Path(f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                name.write_bytes(content)
        written[part] = images[:, None], labels
    return {"train": written["train"], "test": written["t10k"]}


def write_svhn(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for part, count in (("train", 40), ("test", 10)):
        images, labels = pixels(count, 3, 32, 32), np.arange(count) % 10
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(folder / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": stored})
        written[part] = images, labels
    return written


def write_cifar(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    (folder / "cifar-10-batches-bin").mkdir()
    parts = {}
    for name, count in [(f"data_batch_{i}", 8) for i in range(1, 6)] + [("test_batch", 10)]:
        images, labels = pixels(count, 3, 32, 32), np.arange(count, dtype=np.uint8) % 10
        rows = np.concatenate([labels[:, None], images.reshape(count, -1)], axis=1)
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(rows.tobytes())
        parts[name] = images, labels
    train = [parts[f"data_batch_{i}"] for i in range(1, 6)]
    return {
        "train": (np.concatenate([i for i, _ in train]), np.concatenate([labels for _, labels in train])),
        "test": parts["test_batch"],
    }


def write_stl(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for part, count in (("train", 20), ("test", 10)):
        images, labels = pixels(count, 3, 96, 96), np.arange(count, dtype=np.uint8) % 10
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes((labels + 1).tobytes())
        written[part] = images, labels
    return written


WRITERS: dict[str, tuple[Callable[..., dict], float, float, int]] = {  # writer, mean, deviation, size
    "mnist": (write_idx, 0.1307, 0.3081, 28),
    "fashion_mnist": (write_idx, 0.5, 0.5, 28),
    "svhn": (write_svhn, 0.5, 0.5, 32),
    "cifar10": (write_cifar, 0.5, 0.5, 32),
    "cifar10_28": (write_cifar, 0.5, 0.5, 28),
    "stl10": (write_stl, 0.5, 0.5, 32),
    "stl10_28": (write_stl, 0.5, 0.5, 28),
}


@pytest.mark.parametrize("name", WRITERS)
def test_images_and_labels_are_those_in_the_files(tmp_path: Path, name: str) -> None:
    writer, mean, deviation, size = WRITERS[name]
    written = writer(tmp_path)
    images = load(name, tmp_path)
    assert images.train.images.dtype == torch.float32
    assert len(images.classes) == 10

    def prepared(raw: np.ndarray) -> torch.Tensor:
        return (resize(torch.from_numpy(raw.copy()), size).float() / 255 - mean) / deviation

    raw, labels = written["test"]
    torch.testing.assert_close(images.test.images, prepared(raw))
    assert images.test.labels_Q.tolist() == labels.tolist()
    raw, labels = written["train"]
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(42))  # as torch's random_split
    both = torch.cat([images.train.images, images.validation.images])
    torch.testing.assert_close(both, prepared(raw)[order])
    assert torch.cat([images.train.labels_Q, images.validation.labels_Q]).tolist() == labels[order.numpy()].tolist()


def test_gzipped_idx_files_are_read_too(tmp_path: Path) -> None:
    written = write_idx(tmp_path, zipped=True)
    assert load("mnist", tmp_path).test.labels_Q.tolist() == written["test"][1].tolist()


def test_a_compressed_file_is_unpacked_as_far_as_its_header_says(tmp_path: Path) -> None:
    """30 MB behind the 40 labels that are promised: told, and never in memory."""
    write_idx(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.unlink()
    with gzip.open(f"{labels}.gz", "wb", compresslevel=1) as file:
        file.write(content)
        for _ in range(30):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        load("mnist", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_svhn_28_is_grey_as_pillow_makes_it(tmp_path: Path) -> None:
    raw, _ = write_svhn(tmp_path)["test"]
    images = load("svhn_28", tmp_path)
    grey = [np.asarray(Image.fromarray(i.transpose(1, 2, 0)).convert("L"))[2:30, 2:30] for i in raw]
    torch.testing.assert_close(images.test.images[:, 0], torch.from_numpy(np.stack(grey)).float() / 127.5 - 1)


def test_resizing_is_what_pillow_does() -> None:
    smooth = np.linspace(0, 255, 96).astype(np.uint8)[:, None, None] * np.ones((1, 96, 3), np.uint8)
    expected = np.asarray(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    found = resize(torch.from_numpy(smooth.transpose(2, 0, 1)[None].copy()), 32)[0]
    assert (found.int() - torch.from_numpy(expected.copy()).int()).abs().max() <= 1


def write_folders(folder: Path, size: int, count: int, suffix: str = ".jpg") -> None:
    for name, shade in (("Forest", 40), ("River", 200)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), (shade, shade, shade)).save(folder / name / f"{name}_{i}{suffix}")


def test_eurosat_is_read_from_its_class_folders_and_resized(tmp_path: Path) -> None:
    write_folders(tmp_path / "2750", 64, 10)
    images = load("eurosat", tmp_path)
    assert images.classes == ("Forest", "River")
    assert [len(p) for p in (images.train, images.validation, images.test)] == [14, 2, 4]
    assert images.train.images.shape[1:] == (3, 32, 32)
    for part in (images.train, images.validation, images.test):
        shades = torch.tensor([40.0, 200.0])[part.labels_Q] / 127.5 - 1
        torch.testing.assert_close(part.images.mean((1, 2, 3)), shades, atol=0.02, rtol=0)


def test_class_folders_with_their_own_parts(tmp_path: Path) -> None:
    write_folders(tmp_path / "train", 12, 10, ".png")
    write_folders(tmp_path / "test", 12, 3, ".png")
    images = load("folders", tmp_path)
    assert [len(p) for p in (images.train, images.validation, images.test)] == [18, 2, 6]
    assert torch.equal(images.test.images[0], torch.full((3, 12, 12), 40 / 127.5 - 1))


def test_arrays_in_one_piece_and_in_parts(tmp_path: Path) -> None:
    whole = pixels(20, 5, 5)
    np.save(tmp_path / "images.npy", whole)
    np.save(tmp_path / "labels.npy", np.arange(20) % 4)
    images = load("arrays", tmp_path)
    assert [len(p) for p in (images.train, images.validation, images.test)] == [14, 2, 4]
    rows = torch.cat([p.images for p in (images.train, images.validation, images.test)])
    expected = torch.from_numpy(whole)[:, None].float() / 127.5 - 1
    assert {tuple(r.flatten().tolist()) for r in rows} == {tuple(r.flatten().tolist()) for r in expected}
    parts = tmp_path / "parts"
    parts.mkdir()
    for part, count in (("train", 20), ("test", 5)):
        np.save(parts / f"{part}_images.npy", np.full((count, 6, 6, 3), 2.5, np.float32))
        np.save(parts / f"{part}_labels.npy", np.arange(count) % 2)
    images = load("arrays", parts)
    assert images.train.images.shape == (18, 3, 6, 6)
    assert torch.equal(images.test.images, torch.full((5, 3, 6, 6), 2.5))  # numbers that are no bytes stay
    assert images.preprocessing == "as given"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def unfit(path: Path) -> None:
    path.write_bytes(b"something else entirely, but long enough")


BROKEN = [  # set, writer, what is done to which file, what the message says
    ("mnist", write_idx, Path.unlink, "train-labels-idx1-ubyte", "needs train-labels-idx1-ubyte"),
    ("mnist", write_idx, truncate, "t10k-images-idx3-ubyte", "incomplete"),
    ("mnist", write_idx, unfit, "train-images-idx3-ubyte", "not an idx file"),
    ("svhn", write_svhn, truncate, "train_32x32.mat", "not SVHN's"),
    ("svhn", write_svhn, unfit, "test_32x32.mat", "not SVHN's"),
    ("cifar10", write_cifar, Path.unlink, "cifar-10-batches-bin/data_batch_4.bin", "needs data_batch_4.bin"),
    ("cifar10", write_cifar, truncate, "cifar-10-batches-bin/test_batch.bin", "incomplete"),
    ("stl10", write_stl, truncate, "train_X.bin", "incomplete"),
    ("stl10", write_stl, truncate, "test_y.bin", "3 labels for 10 images"),
]


@pytest.mark.parametrize(("name", "writer", "damage", "file", "message"), BROKEN)
def test_wrong_or_incomplete_files_are_named(
    tmp_path: Path, name: str, writer, damage, file: str, message: str
) -> None:
    writer(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=message) as error:
        load(name, tmp_path)
    assert Path(file).name in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    write_folders(tmp_path, 64, 3)
    unfit(tmp_path / "River/River_1.jpg")
    with pytest.raises(UserError, match=r"River_1\.jpg: not an image"):
        load("eurosat", tmp_path)


@pytest.mark.parametrize("name", [name for name in IMAGE_SETS if name != "digits"])
def test_a_directory_without_the_files_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load(name, tmp_path)
    with pytest.raises(UserError, match="needs the directory"):
        load(name)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "labels.npy", np.zeros(1, np.int64))
    with pytest.raises(UserError, match=r"images\.npy: not a plain \.npy array"):
        load("arrays", tmp_path)


def test_labels_of_no_class_and_files_without_images_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([77]))
    with pytest.raises(UserError, match="mnist has labels from 0 to 9, found 0 to 77"):
        load("mnist", tmp_path)
    for kind, shape in (("images-idx3", (0, 28, 28)), ("labels-idx1", (0,))):
        header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (tmp_path / f"t10k-{kind}-ubyte").write_bytes(header)
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([7]))
    with pytest.raises(UserError, match="mnist needs images in its training and in its test files"):
        load("mnist", tmp_path)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pixels(4, 5, 5))
    np.save(tmp_path / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(UserError, match="do not fit 3 labels"):
        load("arrays", tmp_path)


def test_digits_come_in_three_disjoint_parts() -> None:
    images: ImageSet = load("digits")
    assert [len(p) for p in (images.train, images.validation, images.test)] == [1000, 200, 597]
    assert float(images.train.images.min()) == -1
    assert float(images.train.images.max()) == 1
    rows = torch.cat([p.images.flatten(1) for p in (images.train, images.validation, images.test)])
    assert len(rows.unique(dim=0)) == 1797
    assert torch.equal(load("digits").test.images, images.test.images)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load("cifar-10")
