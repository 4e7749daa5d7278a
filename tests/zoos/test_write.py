"""`write_zoo`: what is written comes back bit for bit; what makes no zoo is refused before anything is written."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import distrecon
from distrecon import UserError, write_zoo
from distrecon.images import ImageSet, LabelledImages
from distrecon.nets import architecture, evaluate
from distrecon.zoos import inspection
from distrecon.zoos import write as writing
from distrecon.zoos.storage import Store

ARCH = architecture("mlp", sizes=(4, 3, 2), activation="tanh")  # 23 parameters
THETA_SP = torch.arange(5 * 23, dtype=torch.float64).view(5, 23) / 7
IDS, SPLITS, EPOCHS = ["b", "a", "b", "c", "d"], ["test", "train", "test", "train", "val"], [1, 1, 2, 1, 1]


def write(path: Path, **changes):
    theta_SP = changes.pop("theta_SP", THETA_SP)
    return write_zoo(path, ARCH, theta_SP, **({"model_id": IDS, "split": SPLITS, "epoch": EPOCHS} | changes))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_comes_back(tmp_path: Path) -> None:
    zoo = write(
        tmp_path / "mine",
        train_accuracy=[1.0, 0.75, None, 0.5, 0.25],
        test_accuracy=torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5]),
        train_loss=np.array([3.0, 2.0, 1.0, 0.0, -1.0]),
        config=[{"lr": 0.1}, '{"lr": 0.2}', None, {}, {"lr": 0.5}],
    )
    assert (zoo.name, zoo.num_models, zoo.num_states, zoo.image_set) == ("mine", 4, 5, None)
    assert zoo.architecture == ARCH
    table = zoo.table()
    order = [1, 3, 4, 0, 2]  # split by split, the states of a model side by side
    assert table["model_id"].to_pylist() == [IDS[i] for i in order]
    assert table["epoch"].to_pylist() == [1, 1, 1, 1, 2]
    assert table["split"].to_pylist() == ["train", "train", "val", "test", "test"]
    assert torch.equal(zoo.weights(), THETA_SP.float()[order])
    assert table["train_accuracy"].to_pylist() == [0.75, 0.5, 0.25, 1.0, None]
    assert table["generalization_gap"].to_pylist() == [0.25, 0.0, -0.25, 0.5, None]
    assert table["train_loss"].to_pylist() == [2.0, 0.0, -1.0, 3.0, 1.0]
    assert [json.loads(c) for c in table["config"].to_pylist()] == [{"lr": 0.2}, {}, {"lr": 0.5}, {"lr": 0.1}, {}]
    assert zoo.info["splits"] == {
        "train": {"models": 2, "states": 2},
        "val": {"models": 1, "states": 1},
        "test": {"models": 1, "states": 2},
    }
    assert listing(tmp_path / "mine") == ["states/part-00000.parquet", "zoo.json"]
    assert inspection.check(zoo).problems == ()


def test_a_gap_that_is_given_stays(tmp_path: Path) -> None:
    zoo = write(tmp_path, train_accuracy=[1.0] * 5, test_accuracy=[0.5] * 5, generalization_gap=[0.25] * 5)
    assert zoo.table()["generalization_gap"].to_pylist() == [0.25] * 5


def test_large_zoos_have_several_files_and_each_model_is_in_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", 2 * 4 * 23)  # two states
    zoo = write(tmp_path)
    assert [part.rows for part in zoo.parts] == [2, 2, 1]  # b b | a c | d
    assert sum(sum(part.models.values()) for part in zoo.parts) == 4
    assert sorted(map(tuple, zoo.weights().tolist())) == sorted(map(tuple, THETA_SP.float().tolist()))
    assert inspection.check(zoo).problems == ()


def random_images() -> ImageSet:
    draw = torch.Generator().manual_seed(0)

    def part(count: int) -> LabelledImages:
        return LabelledImages(torch.randn(count, 1, 2, 2, generator=draw), torch.arange(count) % 2)

    return ImageSet("mine", part(6), part(4), part(8), ("off", "on"), "as drawn")


def test_an_image_set_of_your_own_is_stored_with_the_zoo(tmp_path: Path) -> None:
    images = random_images()
    accuracy_S = evaluate(ARCH, THETA_SP.float(), images.test.images, images.test.labels_Q).accuracy_B
    zoo = write(tmp_path, images=images, test_accuracy=accuracy_S)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(zoo.images(), part).images, getattr(images, part).images)
        assert torch.equal(getattr(zoo.images(), part).labels_Q, getattr(images, part).labels_Q)
    assert zoo.info["image_set"]["classes"] == ["off", "on"]
    found = inspection.check(zoo)
    assert (found.recomputed, found.problems) == (5, ())


def changed(row: int, value: float) -> torch.Tensor:
    theta_SP = THETA_SP.clone()
    theta_SP[row, 2] = value
    return theta_SP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta_SP": THETA_SP[:, :-1]}, "23 parameters a model"),
        ({"theta_SP": THETA_SP[:0], "model_id": [], "split": [], "epoch": []}, "at least one state"),
        ({"theta_SP": changed(2, float("nan"))}, "model 'b', epoch 2: non-finite weights"),
        ({"theta_SP": changed(3, 1e300)}, "model 'c', epoch 1: non-finite weights"),  # beyond float32
        ({"split": ["test", "train", "train", "train", "val"]}, "'b' is both in 'test' and in 'train'"),
        ({"split": ["test", "train", "test", "train", "valid"]}, "model 'd': unknown split 'valid'"),
        ({"split": SPLITS[:4]}, "split has 4 entries, the weights have 5 states"),
        ({"model_id": [*IDS, "e"]}, "model_id has 6 entries"),
        ({"model_id": [1, 2, 3, 4, 5]}, "model_id must be text, not 1"),
        ({"epoch": [1, 1, 1, 1, 1]}, "model 'b': epoch 1 appears 2 times"),
        ({"epoch": [1, 1, 2, 1, 1.5]}, "model 'd': epoch must be a whole number from 0, not 1.5"),
        ({"epoch": [1, 1, 2, 1, float("nan")]}, "model 'd': epoch must be"),
        ({"test_accuracy": [0.5] * 4}, "test_accuracy has 4 entries"),
        ({"test_accuracy": [0.5, 87.0, 0.5, 0.5, 0.5]}, "model 'a': impossible metrics .test_accuracy is 87.0"),
        ({"train_loss": [0.5, 0.5, 0.5, 0.5, float("inf")]}, "model 'd': non-finite metrics .train_loss is inf"),
        ({"train_loss": [0.5, 0.5, 0.5, 0.5, "low"]}, "model 'd': train_loss must be a number or None, not 'low'"),
        ({"config": [None, None, None, "lr=1", None]}, "model 'c': config must be a mapping or JSON, not 'lr=1'"),
        ({"test_acuracy": [0.5] * 5}, "unknown property 'test_acuracy'; did you mean 'test_accuracy'"),
        ({"images": "digit"}, "did you mean 'digits'"),
        ({"images": "digits"}, r"images of digits have shape \(1, 8, 8\), mlp reads \(4,\)"),
    ],
)
def test_what_makes_no_zoo_is_refused_and_nothing_is_written(tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "zoo", **changes)
    assert not (tmp_path / "zoo").exists()


def test_a_zoo_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "zoo.json").read_bytes()
    with pytest.raises(UserError, match="holds a zoo already"):
        write(tmp_path)
    assert (tmp_path / "zoo.json").read_bytes() == before
    (tmp_path / "other" / "unfinished").mkdir(parents=True)
    (tmp_path / "other" / "unfinished" / "origin.json").write_text('{"first_unit": 0, "origin": {"kind": "trained"}}')
    with pytest.raises(UserError, match="holds an unfinished zoo"):
        write(tmp_path / "other")
    (tmp_path / "other" / "unfinished" / "origin.json").write_text("{}")
    with pytest.raises(UserError, match=r"origin\.json \(delete its folder to begin anew\) is damaged"):
        write(tmp_path / "other")


def test_a_call_that_died_leaves_no_zoo_and_can_be_repeated(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "PART_BYTES", 2 * 4 * 23)
    real = Store.write

    def dies(self, name, content):
        if name == "zoo.json":
            raise KeyboardInterrupt
        real(self, name, content)

    monkeypatch.setattr(Store, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    monkeypatch.setattr(Store, "write", real)
    with pytest.raises(UserError, match="unfinished zoo"):
        distrecon.open_zoo(tmp_path)
    zoo = write(tmp_path, theta_SP=THETA_SP[:1], model_id=["x"], split=["train"], epoch=[0])
    assert zoo.num_states == 1
    assert listing(tmp_path) == ["states/part-00000.parquet", "zoo.json"]


def test_the_page_shows_it_as_it_is(tmp_path: Path, monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs/zoos.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert inspection.check(distrecon.open_zoo("zoos/mine")).recomputed == 20
