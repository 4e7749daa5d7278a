"""Files that people write or that get damaged, at random: every reader reads one, or refuses it in one line."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from distrecon import status
from distrecon.cluster.space import read_space
from distrecon.errors import UserError
from distrecon.kinds import KINDS
from distrecon.kinds.autoencoder import autoencoder_folder, zoo_folder
from distrecon.nets import architecture
from distrecon.zoos import open_zoo, write_zoo
from distrecon.zoos.inspection import check, describe, facts
from distrecon.zoos.sources import find, metrics_of, problem
from distrecon.zoos.storage import store
from tests.zoos.test_format import unseal

FUZZ = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def damaged(data: DataObject, tree: Any) -> Any:
    """A copy in which something, anywhere, is another value, or gone."""
    tree = copy.deepcopy(tree)
    if not isinstance(tree, dict | list) or not tree or data.draw(st.integers(0, 5)) == 0:
        return data.draw(JSON)
    keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = data.draw(st.sampled_from(keys))
    if data.draw(st.integers(0, 7)) == 0:
        del tree[key]
    else:
        tree[key] = damaged(data, tree[key])
    return tree


def read_or_refused(read) -> Any:
    """What was read; None where it was refused, which must be by a UserError of one printable line."""
    try:
        return read()
    except UserError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 2000
    return None


# -- zoos -------------------------------------------------------------------------------------------------------------

ARCH = architecture("mlp", sizes=(4, 3, 2), activation="tanh")
THETA_SP = torch.randn(6, ARCH.num_parameters, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "zoo"
    write_zoo(folder, ARCH, THETA_SP, model_id=list("abcdef"), split=["train"] * 4 + ["val", "test"])
    unseal(folder)  # what is sealed is refused by its SHA-256 alone
    return folder


@FUZZ
@given(data=st.data())
def test_a_damaged_list_of_a_zoo(zoo: Path, data: DataObject) -> None:
    content = json.loads((zoo / "zoo.json").read_text())
    other = zoo.parent / "other"
    other.mkdir(exist_ok=True)
    if not (other / "states").exists():
        (other / "states").symlink_to(zoo / "states")
    (other / "zoo.json").write_text(json.dumps(damaged(data, content)))

    def read() -> None:
        opened = open_zoo(other)
        facts(opened)
        assert opened.weights().shape[1:] == (opened.architecture.num_parameters,)
        describe(opened)
        check(opened, sample=0)

    read_or_refused(read)


@pytest.mark.parametrize("where", ["footer", "anywhere"])
def test_a_damaged_part_of_a_zoo_without_seals(zoo: Path, tmp_path: Path, where: str) -> None:
    """Without seals a changed weight cannot be known; everything else is refused, or as it was."""
    part = "states/part-00000.parquet"
    whole = (zoo / part).read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    (tmp_path / "states").mkdir()
    (tmp_path / "zoo.json").write_bytes((zoo / "zoo.json").read_bytes())
    draw, refused = random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        at = draw.randrange(footer if where == "footer" else 0, len(whole))
        how = draw.randrange(3)
        if how == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            content[at : at + 8] = draw.randbytes(8)
        else:
            del content[at : at + draw.choice((1, 8, 200))]
        (tmp_path / part).write_bytes(content)
        found = read_or_refused(lambda: open_zoo(tmp_path).weights())
        refused += found is None
        assert found is None or found.shape == THETA_SP.shape
        read_or_refused(lambda: check(open_zoo(tmp_path), sample=0))
    assert refused > 20


# -- tables of properties ---------------------------------------------------------------------------------------------


def states_of(folder: Path) -> None:
    source = find(store(folder))
    for model in source.models():
        for state in source.states(model):
            assert state.file
            if hasattr(state, "metrics"):
                problem(state.metrics)


@FUZZ
@given(data=st.data())
def test_a_damaged_table_of_properties(tmp_path_factory: pytest.TempPathFactory, data: DataObject) -> None:
    folder = tmp_path_factory.mktemp("table")
    rows = [{"file": f"net{i}_epoch_1", "epoch": 3, "train_acc": 0.5, "test_acc": 0.25, "lr": 0.1} for i in range(2)]
    for i in range(2):
        (folder / f"net{i}_epoch_1.pt").write_bytes(b"")
    if data.draw(st.booleans()):
        (folder / "table.json").write_text(json.dumps(damaged(data, rows)))
    else:
        lines = ["file,epoch,train_acc,test_acc", "net0_epoch_1,3,.5,.25", "net1_epoch_1,4,.5,.25"]
        number = data.draw(st.integers(0, 2))
        lines[number] = data.draw(st.text(max_size=20) | st.just(lines[number] + ',"'))
        (folder / "table.csv").write_text("\n".join(lines), errors="replace")
    read_or_refused(lambda: states_of(folder))


@FUZZ
@given(entry=st.dictionaries(st.sampled_from(["train_acc", "test_acc", "train_loss"]), JSON))
def test_metrics_are_numbers_or_refused(entry: dict[str, Any]) -> None:
    try:
        found = metrics_of(entry)
    except (ValueError, TypeError, OverflowError):
        return
    assert all(value is None or isinstance(value, float) for value in found.values())
    if problem(found) is None:
        assert all(value is None or abs(value) < 1e38 for value in found.values())
        assert all(found[name] is None or 0 <= found[name] <= 1 for name in ("train_accuracy", "test_accuracy"))


# -- space files ------------------------------------------------------------------------------------------------------

SPACE = {
    "name": "sweep",
    "kind": "autoencoder",
    "metric": "reconstruct/agreement",
    "mode": "max",
    "scheduler": "fifo",
    "max_concurrent": 2,
    "samples": 2,
    "base": {"optim.epochs": 3, "model.latent": 16, "tasks.seed": 1},
    "space": {"loss.terms": {"grid": ["C+S", "C+S+B"]}, "optim.lr": {"loguniform": [1e-4, 1e-2]}},
}


@FUZZ
@given(data=st.data())
def test_a_damaged_space_file(tmp_path_factory: pytest.TempPathFactory, data: DataObject) -> None:
    file = tmp_path_factory.mktemp("space") / "space.yaml"
    file.write_text(yaml.safe_dump(damaged(data, SPACE)))
    read_or_refused(lambda: read_space(file, KINDS))


TEXTS = [
    "[" * 5000,
    "name: 2026-13-45",
    "a: &a [*a]",
    "? [1]\n: 2",
    "name: !!int ''",
    "!!python/name:os.system",
    "\x00",
]


@pytest.mark.parametrize("text", TEXTS)
def test_odd_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=r"space\.yaml") as error:
        read_space(tmp_path / "space.yaml", KINDS)
    assert "\n" not in str(error.value)


# -- run folders ------------------------------------------------------------------------------------------------------

SUMMARY = {
    "sweeps": [{"kind": "autoencoder", "name": "s", "best": "00000", "trials": []}],
    "zoos": {"z": {"path": "zoos/z"}},
}
EVENTS = [
    {
        "event": "sweep",
        "time": 1.0,
        "kind": "autoencoder",
        "metric": "reconstruct/agreement",
        "mode": "max",
        "trials": 2,
    },
    {"event": "started", "time": 2.0, "trial": "00000", "config": {"optim.lr": 0.1}},
    {"event": "metrics", "time": 3.0, "trial": "00000", "epoch": 1, "metrics": {"reconstruct/agreement": 0.5}},
    {"event": "finished", "time": 4.0, "trial": "00000", "status": "completed", "error": None},
]


@FUZZ
@given(data=st.data())
def test_a_damaged_run_folder(tmp_path_factory: pytest.TempPathFactory, data: DataObject) -> None:
    folder = tmp_path_factory.mktemp("run")
    which = data.draw(st.integers(0, 2))
    parts = [{"command": "tune", "format": 1}, SUMMARY, EVENTS]
    parts[which] = damaged(data, parts[which])
    (folder / "request.json").write_text(json.dumps(parts[0]))
    (folder / "summary.json").write_text(json.dumps(parts[1]))
    (folder / "models/s/00000").mkdir(parents=True)
    (folder / "models/s/00000/autoencoder.json").write_text("{}")
    (folder / "sweeps/s").mkdir(parents=True)
    lines = parts[2] if isinstance(parts[2], list) else [parts[2]]
    (folder / "sweeps/s/journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read_or_refused(lambda: autoencoder_folder(folder))
    read_or_refused(lambda: zoo_folder(str(folder)))
    assert status.main([str(folder)]) in (0, 1, 2)
