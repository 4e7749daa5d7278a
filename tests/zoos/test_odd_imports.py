"""What a stranger's files may hold: each thing is skipped, counted and named, and everything else is imported."""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distrecon.errors import UserError
from distrecon.nets import architecture, initialise
from distrecon.zoos import importing as importing_module
from distrecon.zoos import open_zoo, tasks
from distrecon.zoos.checkpoints import read_state_dict
from distrecon.zoos.importing import ImportOptions, import_zoo
from distrecon.zoos.sources import metrics_of, whole
from tests.zoos.kills import serially
from tests.zoos.test_import import save, write_trial

ARCH = architecture("zoo_cnn")
TANH = ImportOptions(activation="tanh")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "run", serially)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    return ARCH.unflatten(initialise(ARCH, ["normal"], [seed])[0])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three sound models; what is odd comes beside them, and before them by name."""
    folder = tmp_path / "source"
    folder.mkdir()
    for seed in range(3):
        torch.save(state(seed), folder / f"net{seed}_epoch_1.pt")
    return folder


def changed(change) -> dict[str, torch.Tensor]:
    found = state()
    key = next(iter(found))
    return {**found, key: change(found[key])}


def legacy(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def packed(value: object) -> bytes:
    """A checkpoint whose records are compressed, as a bomb's are."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save(value, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return out.getvalue()


def exotic(kind: str) -> bytes:
    """A safetensors file of a type that torch may not have."""
    header = json.dumps({"a.weight": {"dtype": kind, "shape": [8], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def deep(levels: int) -> dict:
    inner: dict = {}
    for _ in range(levels):
        inner = {"model": inner}
    return inner


def quantised(weight: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


WIDE = torch.zeros(1).expand(1_000_000, 1_000_000)  # four terabytes, which its file does not hold

FILES = {  # name -> (what lies in the file, the reason that is given)
    "aa_stride.pt": (lambda: {"a.weight": WIDE, "a.bias": WIDE[0]}, "not plain tensors .* 4,000,000,000,000 bytes"),
    "aa_stride_zoo.pt": (lambda: changed(lambda w: torch.ones(1).expand(w.numel()).view(w.shape)), "not plain tensors"),
    "aa_stray.pt": (lambda: {"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3)}, "is missing from the state"),
    "sparse.pt": (lambda: changed(lambda w: w.to_sparse()), r"not plain tensors .*sparse"),
    "meta.pt": (lambda: changed(lambda w: w.to("meta")), r"not plain tensors .*meta|truncated or not"),
    "quantised.pt": (lambda: changed(quantised), "not plain|refused|truncated"),
    "float8.pt": (lambda: changed(lambda w: w.to(torch.float8_e4m3fn)), "holds torch.float8_e4m3fn"),
    "complex.pt": (lambda: changed(lambda w: w.to(torch.complex64)), "holds torch.complex64"),
    "strings.pt": (lambda: {"a": "b"}, "no state dict"),
    "numbers.pt": (lambda: {1: torch.zeros(1)}, "no state dict"),
    "list.pt": (lambda: [torch.zeros(3)], "no state dict"),
    "deep.pt": (lambda: deep(300), "no state dict"),
    "packed.pt": (lambda: packed({**state(), "bomb": torch.zeros(10**6)}), "its records are compressed"),
    "f8.safetensors": (lambda: exotic("F8_E8M0"), "not a safetensors file|is missing|holds torch"),
    "f4.safetensors": (lambda: exotic("F4"), "not a safetensors file"),
    "unheard.safetensors": (lambda: exotic("X9"), "not a safetensors file"),
    "huge.safetensors": (lambda: struct.pack("<Q", 2**60) + b"{}", "not a safetensors file"),
    "empty.safetensors": (lambda: b"", "not a safetensors file"),
    "folder_epoch_99999999999999.pt": (lambda: state(), r"impossible epoch \(99999999999999\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_odd_file_is_skipped_and_named(source: Path, tmp_path: Path, name: str) -> None:
    content, reason = FILES[name][0](), FILES[name][1]
    if isinstance(content, bytes):
        (source / name).write_bytes(content)
    else:
        torch.save(content, source / name)
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert (report.models, report.states) == (3, 3)
    (skip,) = report.skipped
    assert skip["file"] == name
    assert re.search(reason, skip["reason"]), skip
    assert "\n" not in skip["reason"]
    assert open_zoo(tmp_path / "zoo").num_states == 3
    with pytest.raises(UserError, match="--strict"):
        import_zoo(source, tmp_path / "strict", ImportOptions(activation="tanh", strict=True))


def test_the_architecture_is_that_of_most_files(source: Path, tmp_path: Path) -> None:
    other = architecture("mlp", sizes=(4, 3, 2))
    torch.save(other.unflatten(torch.zeros(other.num_parameters)), source / "aaa_first.pt")
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert open_zoo(tmp_path / "zoo").architecture == ARCH
    assert [skip["file"] for skip in report.skipped] == ["aaa_first.pt"]


def test_an_activation_that_is_not_known_is_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    for seed in range(30):
        torch.save(state(seed), tmp_path / f"source/net{seed}_epoch_1.pt")
    monkeypatch.setattr(importing_module, "MOST_PROBLEMS", 12)
    opened = []
    real = importing_module.read_state_dict
    monkeypatch.setattr(importing_module, "read_state_dict", lambda c, name: opened.append(name) or real(c, name))
    with pytest.raises(UserError, match="give --activation"):
        import_zoo(tmp_path / "source", tmp_path / "zoo")
    assert len(opened) == 12


# -- tables of properties ----------------------------------------------------------------------------------------------


def table(split: str = ",", end: str = "\n", point: str = ".", epoch: str = "5", first: str = "") -> str:
    rows = [("file", "epoch", "train_acc", "test_acc")]
    rows += [(f"net{i}_epoch_1", epoch, f"0{point}5", f"0{point}25") for i in range(3)]
    return first + "".join(split.join(row) + end for row in rows)


TABLES = {  # how people write them
    "plain": table(),
    "byte order mark": table(first="\ufeff"),
    "semicolons": table(";", "\r\n", ","),
    "tabs": table("\t"),
    "blanks": table(", "),
    "whole numbers with a point": table(epoch="5.0"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_people_write_them(source: Path, tmp_path: Path, name: str) -> None:
    (source / "table.csv").write_text(TABLES[name], encoding="utf-8", newline="")
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert (report.states, report.skipped) == (3, ())
    models = open_zoo(tmp_path / "zoo").models()
    assert models.epoch_B.tolist() == [5, 5, 5]
    assert models.test_accuracy_B.tolist() == [0.25] * 3
    assert models.generalization_gap_B.tolist() == [0.25] * 3


def test_a_table_without_accuracies_leaves_them_unknown(source: Path, tmp_path: Path) -> None:
    rows = "".join(f"net{i}_epoch_1,{i},\n" for i in range(3))
    (source / "table.csv").write_text("file,width,test_acc\n" + rows)
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert (report.states, report.skipped) == (3, ())
    zoo = open_zoo(tmp_path / "zoo")
    assert zoo.models().test_accuracy_B.isnan().all()
    assert sorted(json.loads(c)["width"] for c in zoo.table()["config"].to_pylist()) == ["0", "1", "2"]


def test_a_table_with_some_accuracies_misses_the_others(source: Path, tmp_path: Path) -> None:
    (source / "table.csv").write_text("file,test_acc\nnet0_epoch_1,.5\nnet1_epoch_1,\nnet2_epoch_1,.25\n")
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert report.reasons == {"missing metrics": 1}
    assert sorted(open_zoo(tmp_path / "zoo").models().test_accuracy_B.tolist()) == [0.25, 0.5]


def test_percentages_are_taken_where_that_is_said(source: Path, tmp_path: Path) -> None:
    rows = "".join(f"net{i}_epoch_1,75,50\n" for i in range(3))
    (source / "table.csv").write_text("file,train_acc,test_acc\n" + rows)
    with pytest.raises(UserError, match="nothing could be imported: 3 x impossible metrics"):
        import_zoo(source, tmp_path / "refused", TANH)
    report = json.loads((tmp_path / "refused/import_report.json").read_text())
    assert "--percent" in report["skipped"][0]["reason"]
    import_zoo(source, tmp_path / "zoo", ImportOptions(activation="tanh", percent=True))
    models = open_zoo(tmp_path / "zoo").models()
    assert models.test_accuracy_B.tolist() == [0.5] * 3
    assert models.generalization_gap_B.tolist() == [0.25] * 3


def test_other_json_beside_checkpoints_is_no_table(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"layers": 3, "lr": 0.1}))
    (source / "table.csv").write_text(TABLES["plain"])
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert report.states == 3
    assert [skip["file"] for skip in report.skipped] == ["config.json"]
    assert "names no checkpoint file" in report.skipped[0]["reason"]


@pytest.mark.parametrize("text", ["[", "{" * 50_000, "\ufeff"])
def test_a_table_that_cannot_be_read_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    (source / "table.json").write_text(text)
    with pytest.raises(UserError, match=r"table\.json") as error:
        import_zoo(source, tmp_path / "zoo", TANH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["x", 1.5, "1.5", True, [], {}, float("inf"), float("nan"), "1e999", -1, 2**31, None])
def test_an_odd_epoch_is_one_skip(source: Path, tmp_path: Path, value: object) -> None:
    rows = [{"file": f"net{i}_epoch_1", "epoch": 3} for i in range(3)]
    rows[1]["epoch"] = value
    (source / "table.json").write_text(json.dumps(rows))
    report = import_zoo(source, tmp_path / "zoo", TANH)
    assert report.states == (3 if value is None else 2)
    assert [skip["reason"].split(" (")[0] for skip in report.skipped] == ["impossible epoch"] * (value is not None)


ODD_METRICS = {
    "1e999": float("inf"),
    "400 digits": 10**400,
    "more than a float32": 1e300,
    "text": "good",
    "a list": [1],
    "an object": {"value": 1},
}


@pytest.mark.parametrize("name", ODD_METRICS)
@pytest.mark.parametrize("kind", ["tree", "table"])
def test_an_odd_metric_is_one_skip(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    odd = {"train_acc": 0.5, "test_acc": 0.5, "train_loss": ODD_METRICS[name]}
    if kind == "table":
        rows = [{"file": f"net{i}_epoch_1", "train_acc": 0.5, "test_acc": 0.5, "train_loss": 1} for i in range(3)]
        (source / "table.json").write_text(json.dumps([{**rows[0], **odd}, *rows[1:]]))
        report = import_zoo(source, tmp_path / "zoo", TANH)
        assert (report.states, len(report.skipped)) == (2, 1)
        return
    for number in range(3):
        trial = write_trial(tmp_path / "tree", number, epochs=(20,))
    lines = [json.dumps({**odd, "training_iteration": 20}) + "\n"]
    (trial / "result.json").write_text("".join(lines))
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert report.states == 2
    assert {skip["model_id"] for skip in report.skipped} == {trial.name}


def test_numbers_are_whole_however_they_are_written() -> None:
    assert [whole(value) for value in (7, 7.0, "7", "7.0", "7e0")] == [7] * 5


def test_metrics_by_hand() -> None:
    found = metrics_of({"train_acc": "0.75", "test_acc": 0.5, "train_loss": -999})
    assert found == {"train_accuracy": 0.75, "test_accuracy": 0.5, "generalization_gap": 0.25, "train_loss": None}


# -- trees -------------------------------------------------------------------------------------------------------------

TREES = {
    "params.json a number": (lambda t: (t / "params.json").write_text("5"), 3, "not a JSON object"),
    "params.json deep": (lambda t: (t / "params.json").write_text("[" * 10**5), 3, "not JSON"),
    "params.json a folder": (lambda t: (os.unlink(t / "params.json"), (t / "params.json").mkdir()), 3, None),
    "result.json deep": (lambda t: (t / "result.json").write_text('{"a":' * 10**5), 2, "missing metrics"),
    "result.json bytes": (lambda t: (t / "result.json").write_bytes(b"\xff\xfe\x00"), 2, "missing metrics"),
    "a loop of links": (lambda t: os.symlink(t, t / "loop"), 3, None),
    "no text": (lambda t: Path(os.fsdecode(bytes(t) + b"/\xff.pt")).write_bytes(b""), 3, "its name is not UTF-8"),
    "an odd type": (lambda t: save({"a.weight": WIDE}, t), 2, "not plain tensors"),
}


@pytest.mark.parametrize("name", TREES)
def test_an_odd_trial_breaks_nothing_off(tmp_path: Path, name: str) -> None:
    damage, states, reason = TREES[name]
    trials = [write_trial(tmp_path / "tree", number, epochs=(20,)) for number in range(3)]
    damage(trials[1])
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo", ImportOptions(activation="relu"))
    assert report.states == states
    reasons = [skip["reason"] for skip in report.skipped]
    assert any(reason in text for text in reasons) if reason else reasons == []
    assert {skip["model_id"] for skip in report.skipped} <= {trials[1].name}


def test_a_folder_that_goes_after_it_was_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [write_trial(tmp_path / "tree", number, epochs=(20,)) for number in range(3)]
    real = importing_module.import_unit

    def import_unit(*arguments):
        shutil.rmtree(trials[1])
        return real(*arguments)

    monkeypatch.setattr(importing_module, "import_unit", import_unit)
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert report.states == 2
    assert report.reasons == {"cannot be read": 1}


def test_links_in_circles_end(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    os.symlink("..", tmp_path / "a/b/up")
    os.symlink("me", tmp_path / "a/me")
    with pytest.raises(UserError, match="neither a Ray Tune tree"):
        import_zoo(tmp_path / "a", tmp_path / "zoo")


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({"trainset": 5}), b"\x80\x02" + b"(" * 1000])
def test_an_odd_dataset_costs_the_images_only(tmp_path: Path, content: bytes) -> None:
    write_trial(tmp_path / "tree", 0, epochs=(20,))
    (tmp_path / "tree/dataset.pt").write_bytes(content)
    report = import_zoo(tmp_path / "tree", tmp_path / "zoo")
    assert report.states == 1
    assert [skip["file"] for skip in report.skipped] == ["dataset.pt"]


def odd_datasets() -> dict[str, object]:
    images, labels = torch.zeros(30, 3, 8, 8), torch.arange(30) % 10
    return {
        "sparse": {"trainset": (images.to_sparse(), labels), "testset": (images, labels)},
        "scalars": {"trainset": (torch.tensor(1.0), torch.tensor(1)), "testset": (images, labels)},
        "negative labels": {"trainset": (images, labels - 20), "testset": (images, labels)},
        "none": {"trainset": None, "testset": None},
        "sizes": {"trainset": (images, labels), "testset": (images[:, :1], labels)},
    }


@pytest.mark.parametrize("name", [*odd_datasets()])
def test_an_odd_dataset_of_tensors_breaks_nothing_off(tmp_path: Path, name: str) -> None:
    write_trial(tmp_path / "tree", 0, epochs=(20,))
    torch.save(odd_datasets()[name], tmp_path / "tree/dataset.pt")
    assert import_zoo(tmp_path / "tree", tmp_path / "zoo").states == 1


# -- fuzzing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_checkpoints_are_refused_in_one_line_or_read(kind: str) -> None:
    """300 random damages: bits flipped, pieces cut out, zeroed, doubled. None hangs, or raises anything else."""
    plain = io.BytesIO()
    torch.save(state(), plain)
    whole_file = {
        "zip": plain.getvalue(),
        "legacy": legacy(state()),
        "safetensors": safetensors.torch.save(state()),
    }[kind]
    draw, refused, kept = random.Random(0), 0, 0
    for _ in range(300):
        damaged = bytearray(whole_file)
        # half of the damage in the first kilobyte, where the structure is
        at = draw.randrange(len(damaged) if draw.random() < 0.5 else min(1024, len(damaged)))
        length = draw.choice((1, 8, 500))
        how = draw.randrange(4)
        if how == 0:
            damaged[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del damaged[at : at + length]
        elif how == 2:
            damaged[at : at + length] = bytes(min(length, len(damaged) - at))
        else:
            damaged[at:at] = damaged[at : at + length]
        name = "x.safetensors" if kind == "safetensors" else "x.pt"
        try:
            found = read_state_dict(bytes(damaged), name)
        except UserError as error:
            refused += "\n" not in str(error)
        else:
            assert all(np.prod(v.shape) < 10**6 for v in found.values())
            kept += 1
    assert refused > 50
    assert refused + kept == 300
