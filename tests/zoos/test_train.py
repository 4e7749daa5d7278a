"""Training zoos: complete, reproducible, resumable, honest about models that diverged."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from distrecon import config as configuration
from distrecon.errors import UserError
from distrecon.images import load
from distrecon.nets import evaluate
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos.settings import DIGITS_ZOO, ZOOS, GridConfig, SplitConfig, ZooConfig, assign_splits, plan
from distrecon.zoos.train import ensure
from tests.zoos.conftest import TINY


def test_all_models_are_there_with_their_true_accuracies(tiny_zoo: Zoo) -> None:
    assert (tiny_zoo.num_models, tiny_zoo.num_states) == (20, 40)
    assert tiny_zoo.info["splits"] == {
        "train": {"models": 16, "states": 32},
        "val": {"models": 1, "states": 2},
        "test": {"models": 3, "states": 6},
    }
    models, images = tiny_zoo.models(), tiny_zoo.images()
    assert set(models.epoch_B.tolist()) == {1, 3}
    on_train = evaluate(tiny_zoo.architecture, models.theta_BP, images.train.images, images.train.labels_Q)
    on_test = evaluate(tiny_zoo.architecture, models.theta_BP, images.test.images, images.test.labels_Q)
    torch.testing.assert_close(models.train_accuracy_B, on_train.accuracy_B, rtol=0, atol=2e-3)
    torch.testing.assert_close(models.test_accuracy_B, on_test.accuracy_B, rtol=0, atol=2e-3)
    torch.testing.assert_close(models.train_loss_B, on_train.loss_B, rtol=1e-4, atol=1e-5)
    gap_B = models.train_accuracy_B - models.test_accuracy_B
    torch.testing.assert_close(models.generalization_gap_B, gap_B, rtol=0, atol=1e-6)
    assert models.test_accuracy_B[models.epoch_B == 3].mean() > models.test_accuracy_B[models.epoch_B == 1].mean() + 0.1


def test_every_epoch_of_every_model_has_metrics(tiny_zoo: Zoo) -> None:
    history = pq.read_table(f"{tiny_zoo.store.root}/history").to_pylist()
    assert Counter(row["epoch"] for row in history) == {1: 20, 2: 20, 3: 20}
    assert all(0 <= row["validation_accuracy"] <= 1 and row["train_loss"] > 0 for row in history)


def test_hyperparameters_are_kept_with_each_state(tiny_zoo: Zoo) -> None:
    configs = [json.loads(text) for text in tiny_zoo.table()["config"].to_pylist()]
    found = Counter((c["initialisation"], c["lr"]) for c in configs)
    assert found == {(kind, lr): 10 for kind in ("uniform", "kaiming_normal") for lr in (1e-3, 3e-3)}
    recorded = tiny_zoo.info["origin"]["config"]
    assert recorded | {"architecture.module": None} == configuration.flatten(TINY)
    assert "architecture.module" not in recorded  # known networks' zoos are called what they always were


def test_a_second_call_reuses_it(tiny_zoo: Zoo, tiny_folder: Path) -> None:
    before = (tiny_folder / "zoo.json").stat().st_mtime_ns
    calls = []
    again = ensure(TINY, tiny_folder, progress=lambda *call: calls.append(call))
    assert again.info == tiny_zoo.info
    assert not calls
    assert (tiny_folder / "zoo.json").stat().st_mtime_ns == before


def test_another_configuration_at_the_same_place_is_refused(tiny_folder: Path, ray_session: None) -> None:
    other = dataclasses.replace(TINY, seed=5)
    with pytest.raises(UserError, match=r"another configuration \(seed is 0 there, 5 wanted"):
        ensure(other, tiny_folder)


def begin_again(folder: Path, keep_groups: int) -> None:
    """The finished zoo as a killed training leaves it, with some groups done."""
    content = json.loads((folder / "zoo.json").read_text())
    (folder / "unfinished").mkdir()
    (folder / "unfinished/origin.json").write_text(json.dumps({"first_unit": 0, "origin": content["origin"]}))
    for number, part in enumerate(content["parts"]):
        if number < keep_groups:
            report = {"part": part, "excluded": []}
            (folder / f"unfinished/unit-{number:05d}.json").write_text(json.dumps(report))
        else:
            (folder / part["file"]).unlink()
    (folder / "zoo.json").unlink()


def test_an_interrupted_training_continues_with_what_is_missing(
    tiny_zoo: Zoo, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "zoo"
    shutil.copytree(tiny_folder, folder)
    begin_again(folder, keep_groups=2)
    with pytest.raises(UserError, match="unfinished zoo"):
        open_zoo(folder)
    with pytest.raises(UserError, match="another configuration"):
        ensure(dataclasses.replace(TINY, seed=5), folder)
    kept = (folder / "states/part-00000.parquet").stat().st_mtime_ns
    calls = []
    zoo = ensure(TINY, folder, progress=lambda *call: calls.append(call[:2]))
    assert calls == [(14, 20), (20, 20)]
    assert (folder / "states/part-00000.parquet").stat().st_mtime_ns == kept
    assert torch.equal(zoo.weights(), tiny_zoo.weights())
    assert zoo.table().drop(["weights"]).equals(tiny_zoo.table().drop(["weights"]))
    assert not (folder / "unfinished").exists()


def test_diverged_models_are_listed_and_left_out(ray_session: None, tmp_path: Path) -> None:
    grid = GridConfig(initialisation=("normal",), scale=(1.0, 1e18), lr=(1e-3,), seeds=3)
    config = dataclasses.replace(TINY, name="wild", grid=grid)
    zoo = ensure(config, tmp_path / "zoo")
    assert zoo.num_models == 3
    assert [e["reason"] for e in zoo.info["excluded"]] == ["non-finite weights at epoch 1"] * 3
    kept, excluded = set(zoo.table()["model_id"].to_pylist()), {e["model_id"] for e in zoo.info["excluded"]}
    assert len(kept | excluded) == 6
    with pytest.raises(UserError, match="every model of 'hopeless' diverged"):
        ensure(
            dataclasses.replace(config, name="hopeless", grid=dataclasses.replace(grid, scale=(1e18,))),
            tmp_path / "hopeless",
        )


def test_other_architectures_train_too(ray_session: None, tmp_path: Path) -> None:
    values = {"architecture.name": "mlp", "architecture.hidden": [12], "architecture.activation": "tanh"}
    config = configuration.replace(TINY, values | {"grid.seeds": 1, "name": "dense"})
    zoo = ensure(config, tmp_path / "zoo")
    assert zoo.architecture.num_parameters == 64 * 12 + 12 + 12 * 10 + 10
    assert zoo.models().test_accuracy_B.max() > 0.5


def test_the_grid_is_complete_and_each_combination_has_its_share_of_each_split() -> None:
    for config in ZOOS.values():
        models = plan(config)
        grid, shares = config.grid, config.split
        wanted = {"train": shares.train, "val": shares.val, "test": 1 - shares.train - shares.val}
        combinations = len(grid.initialisation) * len(grid.scale) * len(grid.lr) * len(grid.weight_decay)
        assert len(models) == combinations * grid.seeds
        assert len({m.model_id for m in models}) == len({m.seed for m in models}) == len(models)
        found = Counter((m.initialisation, m.scale, m.lr, m.weight_decay, m.split) for m in models)
        for (*_, split), count in found.items():
            assert abs(count - wanted[split] * grid.seeds) <= 1
        total = Counter(m.split for m in models)
        assert all(abs(total[split] - share * len(models)) <= 1 for split, share in wanted.items())


def test_initial_weights_do_not_depend_on_the_grouping() -> None:
    by_id = {m.model_id: m for m in plan(DIGITS_ZOO)}
    for model in plan(dataclasses.replace(DIGITS_ZOO, group_size=10)):
        assert by_id[model.model_id] == model


def test_splits_are_interleaved() -> None:
    names = assign_splits(100, SplitConfig())
    assert Counter(names) == {"train": 80, "val": 5, "test": 15}
    assert Counter(names[:20]) == {"train": 16, "val": 1, "test": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid.lr": []}, "grid.lr is empty"),
        ({"grid.lr": [0.0]}, "grid.lr must be above 0, not 0.0"),
        ({"grid.lr": [float("inf")]}, "grid.lr must be a finite number"),
        ({"grid.initialisation": ["kaiming"]}, "did you mean 'kaiming_"),
        ({"training.checkpoints": [4, 99]}, "training.checkpoints must be epochs from 1 to 3"),
        ({"training.checkpoints": [3, 1]}, "must rise"),
        ({"architecture.name": "cnn4"}, "did you mean 'cnn3'"),
        ({"architecture.hidden": [3]}, "is for mlp"),
        ({"images.name": "digit"}, "did you mean 'digits'"),
        ({"split.train": 0.9, "split.val": 0.2}, "split.train and split.val must be at most 1 together"),
        ({"grid.sedes": 3}, "did you mean 'grid.seeds'"),
    ],
)
def test_wrong_configurations_are_refused(values, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.replace(TINY, values, "zoo.yaml")


def test_the_shipped_digits_zoo_is_about_a_thousand_models() -> None:
    assert isinstance(DIGITS_ZOO, ZooConfig)
    assert 900 <= len(plan(DIGITS_ZOO)) <= 1100


def test_a_limit_keeps_the_same_training_images_every_time(tmp_path: Path) -> None:
    config = configuration.replace(TINY, {"images.limit": 60, "grid.seeds": 1})
    zoo = ensure(config, tmp_path / "zoo")
    few, whole = zoo.images(), load("digits")
    assert len(few.train) == 60
    assert len(few.validation) == len(whole.validation)
    assert len(few.test) == len(whole.test)
    assert torch.equal(load("digits", limit=60).train.images, few.train.images)
    assert not torch.equal(few.train.images, whole.train.images[:60])
    models = zoo.models()
    on_train = evaluate(zoo.architecture, models.theta_BP, few.train.images, few.train.labels_Q)
    torch.testing.assert_close(models.train_accuracy_B, on_train.accuracy_B, rtol=0, atol=2e-3)
    with pytest.raises(UserError, match=r"images\.limit is 60 there, None wanted"):
        ensure(configuration.replace(config, {"images.limit": None}), tmp_path / "zoo")
    with pytest.raises(UserError, match=r"images\.limit"):
        configuration.replace(config, {"images.limit": 0})
