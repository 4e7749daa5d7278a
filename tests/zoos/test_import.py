"""Importing zoos in the published layouts, with everything that can be wrong in them."""

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from distrecon.errors import UserError
from distrecon.nets import architecture, initialise
from distrecon.nets.known import mlp
from distrecon.zoos import importing as importing_module
from distrecon.zoos import open_zoo
from distrecon.zoos.importing import ImportOptions, import_zoo
from distrecon.zoos.inspection import check
from distrecon.zoos.storage import store

pytestmark = pytest.mark.usefixtures("ray_session")

EPOCHS = (20, 30, 40, 50)
NAMES = ("module_list.0", "module_list.4", "module_list.8", "module_list.13", "module_list.16")  # dropout in between


class CNN3(nn.Module):
    """The published CNN3: dropout modules between its layers shift the numbers in its names."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 15)):
            layers += [nn.Conv2d(before, after, 3), nn.MaxPool2d(2, 2), nn.ReLU(), nn.Dropout(0.0)]
        layers += [nn.Flatten(), nn.Linear(60, 20), nn.ReLU(), nn.Dropout(0.0), nn.Linear(20, 10)]
        self.module_list = nn.ModuleList(layers)


class Malicious:
    """What a stranger's pickle may do when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def states_of(seed: int, epochs: tuple[int, ...] = EPOCHS) -> dict[int, dict[str, torch.Tensor]]:
    """Different weights for every epoch of a model."""
    torch.manual_seed(seed)
    state = CNN3().state_dict()
    return {epoch: {name: value + epoch / 1000 for name, value in state.items()} for epoch in epochs}


def metrics_of(seed: int, epoch: int) -> dict[str, float]:
    generator = np.random.default_rng([seed, epoch])
    train, test, loss = generator.random(3).tolist()
    return {"train_acc": train, "test_acc": test, "train_loss": loss, "test_loss": 1.0}


WRAPPINGS = [  # how a state dict lies in its file
    lambda state: state,
    lambda state: {"model_state_dict": state, "epoch": 3},
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {"model": {f"module.model.{k}": v for k, v in state.items()}, "optimizer": {"lr": 0.1}},
]


def write_trial(tree: Path, number: int, epochs: tuple[int, ...] = EPOCHS) -> Path:
    """One model as Ray Tune and the published trainable leave it."""
    trial = tree / f"NN_tune_trainable_a1b2c_{number:05d}_{number}_seed={number}_2021-05-05"
    trial.mkdir(parents=True)
    config = {"model::type": "CNN3", "model::nlin": "relu", "model::channels_in": 3, "optim::lr": 1e-4, "seed": number}
    (trial / "params.json").write_text(json.dumps(config))
    untrained = {"train_acc": -999, "train_loss": -999, "test_acc": 0.1, "training_iteration": 0}
    lines = [untrained] + [{**metrics_of(number, e), "training_iteration": e} for e in range(1, 51)]
    (trial / "result.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch, state in states_of(number, epochs).items():
        folder = trial / f"checkpoint_{epoch:06d}"
        folder.mkdir()
        torch.save(WRAPPINGS[number % len(WRAPPINGS)](state), folder / "checkpoints")
        torch.save({"param_groups": []}, folder / "optimizer")
    return trial


def check_identical(zoo_path: Path, models: int) -> None:
    """Every weight bit for bit, every metric, against what was written."""
    zoo = open_zoo(zoo_path)
    assert (zoo.num_models, zoo.num_states) == (models, models * len(EPOCHS))
    table = zoo.table()
    weights = zoo.weights()
    for i, row in enumerate(table.drop(["weights"]).to_pylist()):
        number = int(row["model_id"].split("_")[4])
        expected = torch.cat([v.flatten() for v in states_of(number)[row["epoch"]].values()])
        assert torch.equal(weights[i].view(torch.int32), expected.view(torch.int32))
        metrics = metrics_of(number, row["epoch"])
        assert row["train_accuracy"] == np.float32(metrics["train_acc"])
        assert row["test_accuracy"] == np.float32(metrics["test_acc"])
        assert row["train_loss"] == np.float32(metrics["train_loss"])
        assert row["generalization_gap"] == np.float32(metrics["train_acc"] - metrics["test_acc"])
        assert json.loads(row["config"])["seed"] == number
    assert [layer.name for layer in zoo.architecture.layers] == list(NAMES)
    assert (zoo.architecture.num_parameters, zoo.architecture.activation) == (10853, "relu")
    CNN3().load_state_dict(zoo.architecture.unflatten(weights[0]))  # exported models go back where they came from


def test_a_small_tree_is_imported_identically(tmp_path: Path) -> None:
    for number in range(8):
        write_trial(tmp_path / "tree", number)
    (tmp_path / "tree/config.json").write_text(json.dumps({"seed": {"grid_search": list(range(8))}}))
    calls = []
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo", progress=lambda *call: calls.append(call[:2]))
    assert (report.models, report.states, report.skipped) == (8, 32, ())
    assert calls == [(0, 8), (8, 8)]
    check_identical(tmp_path / "zoo", 8)
    splits = open_zoo(tmp_path / "zoo").info["splits"]
    assert [splits[s]["models"] for s in ("train", "val", "test")] == [7, 0, 1]


@pytest.mark.slow
def test_two_hundred_models_are_imported_identically(tmp_path: Path) -> None:
    for number in range(200):
        write_trial(tmp_path / "tree", number)
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert (report.models, report.states, report.skipped) == (200, 800, ())
    check_identical(tmp_path / "zoo", 200)


def save(content: object, trial: Path, epoch: int = 20) -> None:
    torch.save(content, trial / f"checkpoint_{epoch:06d}/checkpoints")


def with_weights(number: int, change) -> dict[str, torch.Tensor]:
    state = states_of(number)[20]
    change(state["module_list.4.weight"])
    return state


def other_width(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "module_list.16.weight": torch.zeros(7, 20), "module_list.16.bias": torch.zeros(7)}


def drop_metrics(trial: Path, **changes) -> None:
    lines = [json.loads(line) for line in (trial / "result.json").read_text().splitlines()]
    for line in lines:
        if line["training_iteration"] == 20:
            line.update(changes)
    (trial / "result.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def truncate(trial: Path) -> None:
    file = trial / "checkpoint_000020/checkpoints"
    file.write_bytes(file.read_bytes()[:20_000])


def double(trial: Path) -> None:
    again = trial.parent / "again" / trial.name
    again.mkdir(parents=True)
    (again / "params.json").write_text("{}")


PROBLEMS = {  # what is wrong with one model -> the reason, and how many states of the model are left
    "nan": (lambda t, m: save(with_weights(0, lambda w: w[0, 0].fill_(float("nan"))), t), "non-finite weights", 3),
    "exploded": (lambda t, m: save(with_weights(0, lambda w: w.mul_(1e9)), t), "exploded weights", 3),
    "truncated": (lambda t, m: truncate(t), "truncated or not a torch file", 3),
    "empty": (lambda t, m: (t / "checkpoint_000020/checkpoints").write_bytes(b""), "truncated or not", 3),
    "malicious": (lambda t, m: save({"model": Malicious(m)}, t), "refused: not tensors", 3),
    "malicious pickle": (
        lambda t, m: (t / "checkpoint_000020/checkpoints").write_bytes(pickle.dumps(Malicious(m))),
        "refused: not tensors",
        3,
    ),
    "a module": (lambda t, m: save(CNN3(), t), "refused: not tensors", 3),
    "shapes": (lambda t, m: save(other_width(states_of(0)[20]), t), "'module_list.16.weight' has shape", 3),
    "no state dict": (lambda t, m: save({"loss": 1.0}, t), "no state dict in it", 3),
    "integers": (lambda t, m: save({k: v.int() for k, v in states_of(0)[20].items()}, t), "holds torch.int32", 3),
    "no file": (lambda t, m: (t / "checkpoint_000020/checkpoints").unlink(), "no checkpoint file", 3),
    "no metrics": (lambda t, m: drop_metrics(t, training_iteration=99), "missing metrics (train_accuracy", 3),
    "unmeasured": (lambda t, m: drop_metrics(t, train_acc=-999), "missing metrics (train_accuracy", 3),
    "nan metric": (lambda t, m: drop_metrics(t, test_acc=float("nan")), "non-finite metrics (test_accuracy", 3),
    "percent": (lambda t, m: drop_metrics(t, test_acc=87.0), "impossible metrics (test_accuracy is 87.0", 3),
    "torn line": (
        lambda t, m: (t / "result.json").write_text((t / "result.json").read_text()[:-30]),
        "line 51 is not a result",
        3,
    ),
    "no results": (lambda t, m: (t / "result.json").unlink(), "missing metrics", 0),
    "duplicate": (lambda t, m: double(t), "duplicate id", 4),
    "activation": (
        lambda t, m: (t / "params.json").write_text('{"model::nlin": "tanh"}'),
        "another activation (tanh; the zoo has relu)",
        0,
    ),
}


@pytest.fixture(scope="module")
def damaged_import(ray_session: None, tmp_path_factory: pytest.TempPathFactory):
    """A tree with every problem in a model of its own between two sound ones; its report, zoo and trial names."""
    folder = tmp_path_factory.mktemp("damaged")
    marker, trials = folder / "executed", {}
    write_trial(folder / "tree", 0)
    for number, (name, (damage, _, _)) in enumerate(PROBLEMS.items(), start=1):
        trials[name] = write_trial(folder / "tree", number)
        damage(trials[name], marker)
    write_trial(folder / "tree", 99)
    report = import_zoo(folder / "tree", folder / "zoo")
    return report, open_zoo(folder / "zoo"), trials, marker


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_is_skipped_counted_and_listed(damaged_import, name: str) -> None:
    report, zoo, trials, _ = damaged_import
    _, reason, left = PROBLEMS[name]
    model_id = trials[name].name
    listed = [skip["reason"] for skip in report.skipped if skip["model_id"] == model_id]
    assert any(reason in text for text in listed), listed
    assert all("\n" not in text for text in listed)
    assert zoo.table(columns=["model_id"])["model_id"].to_pylist().count(model_id) == left


def test_nothing_malicious_ran_and_sound_models_are_complete(damaged_import) -> None:
    report, zoo, _, marker = damaged_import
    assert not marker.exists()
    assert zoo.num_states == report.states == 8 + sum(left for _, _, left in PROBLEMS.values())
    written = json.loads((Path(zoo.store.root) / "import_report.json").read_text())
    assert len(written["skipped"]) == len(report.skipped)
    assert written["reasons"]["refused"] == 3
    assert zoo.weights().isfinite().all()


def test_strict_stops_at_the_first_problem_and_a_sound_rerun_continues(tmp_path: Path) -> None:
    trials = [write_trial(tmp_path / "tree", number) for number in range(4)]
    truncate(trials[2])
    with pytest.raises(UserError, match=r"00002.*checkpoint_000020/checkpoints: truncated.*--strict"):
        import_zoo(tmp_path / "tree", tmp_path / "zoo", ImportOptions(strict=True))
    with pytest.raises(UserError, match="unfinished zoo"):
        open_zoo(tmp_path / "zoo")
    save(states_of(2)[20], trials[2])
    import_zoo(tmp_path / "tree", tmp_path / "zoo", ImportOptions(strict=True))
    check_identical(tmp_path / "zoo", 4)


def test_chosen_epochs_and_then_the_others_by_appending(tmp_path: Path) -> None:
    for number in range(6):
        write_trial(tmp_path / "tree", number)
    first = import_zoo(tmp_path / "tree", tmp_path / "zoo", ImportOptions(epochs=(20, 50)))
    assert (first.models, first.states, first.skipped) == (6, 12, ())
    before = open_zoo(tmp_path / "zoo").models()
    second = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert (second.models, second.states) == (6, 12)
    assert second.reasons == {"epoch 20 is already in the zoo": 6, "epoch 50 is already in the zoo": 6}
    check_zoo = open_zoo(tmp_path / "zoo")
    after = check_zoo.models()
    assert torch.equal(after.theta_BP[:12], before.theta_BP)  # appending never renumbers
    home: dict[str, set[str]] = {}
    for row in check_zoo.table(columns=["model_id", "split"]).to_pylist():
        home.setdefault(row["model_id"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in home.values())
    assert (check_zoo.num_models, check_zoo.num_states) == (6, 24)
    assert check(check_zoo).problems == ()
    third = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert third.states == 0
    assert torch.equal(open_zoo(tmp_path / "zoo").models().theta_BP, after.theta_BP)


class Killed(Exception):
    pass


def test_an_interrupted_import_continues_and_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write_trial(tmp_path / "tree", number)
    monkeypatch.setattr(importing_module, "MODELS_PER_UNIT", 2)

    def stop(done: int, total: int, seconds: float) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        import_zoo(tmp_path / "tree", tmp_path / "zoo", progress=stop)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "zoo/unfinished").glob("unit-*.json")}
    assert len(finished) >= 2
    with pytest.raises(UserError, match="with other options"):
        import_zoo(tmp_path / "tree", tmp_path / "zoo", ImportOptions(epochs=(20,)))
    calls = []
    import_zoo(tmp_path / "tree", tmp_path / "zoo", progress=lambda *call: calls.append(call[0]))
    assert calls[0] >= 4
    check_identical(tmp_path / "zoo", 6)


def test_a_folder_of_files_with_a_table(tmp_path: Path) -> None:
    source, arch = tmp_path / "source", mlp((4, 3, 2))
    source.mkdir()
    theta_BP = initialise(arch, ["normal"] * 4, range(4))
    rows = []
    for i, theta_P in enumerate(theta_BP):
        name = f"net{i // 2}_epoch_{10 * (i % 2 + 1)}"
        if i % 2:
            torch.save(arch.unflatten(theta_P), source / f"{name}.pt")
        else:
            safetensors.torch.save_file(arch.unflatten(theta_P), source / f"{name}.safetensors")
        rows.append({"file": name, "train_acc": 0.5 + i / 10, "test_acc": i / 10, "train_loss": i, "width": 3})
    with (source / "properties.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(UserError, match="give --activation"):
        import_zoo(source, tmp_path / "zoo")
    report = import_zoo(source, tmp_path / "zoo", ImportOptions(activation="tanh"))
    assert (report.models, report.states, report.skipped) == (2, 4, ())
    zoo = open_zoo(tmp_path / "zoo")
    table, models = zoo.table().to_pylist(), zoo.models()
    for row, theta_P in zip(table, models.theta_BP, strict=True):
        i = 2 * int(row["model_id"][3:]) + row["epoch"] // 10 - 1
        assert torch.equal(theta_P, theta_BP[i])
        assert row["test_accuracy"] == np.float32(i / 10)
        assert json.loads(row["config"]) == {"width": "3"}


def test_a_folder_of_files_with_a_json_table_and_ids(tmp_path: Path) -> None:
    arch = mlp((4, 3, 2))
    table = {
        f"{i}.pt": {"model_id": f"id{i}", "epoch": 7, "activation": "gelu", "train_acc": 1, "test_acc": 0.5}
        for i in (1, 2)
    }
    for i in (1, 2):
        torch.save(arch.unflatten(torch.full((arch.num_parameters,), float(i))), tmp_path / f"{i}.pt")
    (tmp_path / "table.json").write_text(json.dumps(table))
    import_zoo(tmp_path, tmp_path / "zoo")
    zoo = open_zoo(tmp_path / "zoo")
    assert zoo.architecture.activation == "gelu"
    assert sorted(zip(zoo.models().model_id, zoo.models().epoch_B.tolist(), strict=True)) == [("id1", 7), ("id2", 7)]
    assert zoo.models().train_loss_B.isnan().all()  # the table does not have it


def test_a_single_checkpoint(tmp_path: Path) -> None:
    arch = architecture("zoo_cnn")
    state = arch.unflatten(torch.arange(float(arch.num_parameters)) / 1000)
    torch.save({"model_state_dict": state}, tmp_path / "one.pt")
    report = import_zoo(tmp_path / "one.pt", tmp_path / "zoo", ImportOptions(activation="tanh"))
    zoo = open_zoo(tmp_path / "zoo")
    assert (report.states, zoo.architecture) == (1, arch)
    assert zoo.models().test_accuracy_B.isnan().all()
    with pytest.raises(UserError, match="names no image set"):
        zoo.images()


@pytest.mark.parametrize("kind", ["tensors", "TensorDataset"])
def test_images_that_come_with_a_zoo(tmp_path: Path, kind: str) -> None:
    write_trial(tmp_path / "tree", 0)
    images = {
        part: (torch.randn(n, 3, 32, 32), torch.arange(n) % 10) for part, n in (("trainset", 30), ("testset", 10))
    }
    content = {part: TensorDataset(*pair) if kind == "TensorDataset" else pair for part, pair in images.items()}
    torch.save({**content, "dataset_seed": 42}, tmp_path / "tree/dataset.pt")
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert report.skipped == ()
    found = open_zoo(tmp_path / "zoo").images()
    assert torch.equal(found.test.images, images["testset"][0])
    assert found.test.labels_Q.tolist() == images["testset"][1].tolist()
    assert len(found.train) + len(found.validation) == 30


def test_a_dataset_of_somebodys_class_is_refused_and_named(tmp_path: Path) -> None:
    write_trial(tmp_path / "tree", 0)
    torch.save({"trainset": Malicious(tmp_path / "executed")}, tmp_path / "tree/dataset.pt")
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert [skip["file"] for skip in report.skipped] == ["dataset.pt"]
    assert "refused" in report.skipped[0]["reason"]
    assert not (tmp_path / "executed").exists()


def empty_trial(folder: Path) -> None:
    (folder / "NN_tune_trainable_x").mkdir(parents=True)


def all_truncated(folder: Path) -> None:
    truncate(write_trial(folder, 0, epochs=(20,)))


def unknown_architecture(folder: Path) -> None:
    trial = write_trial(folder, 0, epochs=(20,))
    save({"a.weight": torch.zeros(3, 2, 7, 7), "a.bias": torch.zeros(3)}, trial)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: None, "there is nothing to import"),
        (lambda f: f.mkdir(), "neither a Ray Tune tree"),
        (empty_trial, "no checkpoint can be read: there is none"),
        (all_truncated, "no checkpoint can be read: .*truncated"),
        (unknown_architecture, "no known architecture has the weights a 3x2x7x7"),
    ],
)
def test_sources_without_a_model_are_refused(tmp_path: Path, prepare, message: str) -> None:
    prepare(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        import_zoo(tmp_path / "source", tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_other_models_are_not_put_into_a_zoo(tmp_path: Path) -> None:
    write_trial(tmp_path / "tree", 0)
    import_zoo(tmp_path / "tree", tmp_path / "zoo")
    arch = mlp((4, 3, 2))
    torch.save(arch.unflatten(torch.zeros(arch.num_parameters)), tmp_path / "other.pt")
    before = open_zoo(tmp_path / "zoo").info
    report = import_zoo(tmp_path / "other.pt", tmp_path / "zoo")
    assert report.states == 0
    assert "is missing from the state dict" in report.skipped[0]["reason"]
    assert open_zoo(tmp_path / "zoo").info == before
    assert not store(tmp_path / "zoo").exists("unfinished")
