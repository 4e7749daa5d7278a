"""No credential is written or printed: not in reports, links, notes, requests, tags, errors or documents."""

import json
import re
from pathlib import Path

import pytest

from distrecon import zoo
from distrecon.console import WRONG_REQUEST
from distrecon.errors import UserError, printable, redact
from distrecon.files import plain, write_json, write_text
from distrecon.job import Request, prepare
from distrecon.record.folder import RunFolder
from distrecon.record.store import model_folder
from distrecon.record.tracking import Tracker
from distrecon.zoos.storage import store
from tests.conftest import environment

SECRET = "pl4nted-s3cret"

KEPT = [
    "http://127.0.0.1:5000/#/experiments/1", "s3://bucket/zoo?endpoint_override=host:9000&scheme=http&region=eu",
    "file:///home/a@b/mlruns", "/home/a@b:c/zoo", "mail me@home", "abfs://container@account.dfs.core.windows.net/zoo",
    "sqlite:////tmp/mlflow.db", "see https://example.org/a@b and c@d", "gs://anonymous@bucket/zoo",
]  # fmt: skip
HIDDEN = {
    f"http://user:{SECRET}@host:5000/x": "http://***@host:5000/x",
    f"s3://KEY:{SECRET}@bucket/zoo": "s3://***@bucket/zoo",
    f"s3://KEY:{SECRET}/with+slash/@bucket/zoo": "s3://***@bucket/zoo",
    f"https://{SECRET}@host/x": "https://***@host/x",
    f"postgresql+psycopg2://u:{SECRET}p@ss@host/db": "postgresql+psycopg2://***@host/db",
    f"could not reach 'mysql://u:{SECRET}@h/db' twice": "could not reach 'mysql://***@h/db' twice",
    f"s3://bucket/x?secret_key={SECRET}&region=eu": "s3://bucket/x?secret_key=***&region=eu",
    f"abfs://:{SECRET}@account/zoo": "abfs://***@account/zoo",
}


@pytest.mark.parametrize("text", KEPT)
def test_other_texts_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("text", HIDDEN)
def test_credentials_go(text: str) -> None:
    assert redact(text) == HIDDEN[text]
    assert redact(redact(text)) == HIDDEN[text]


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_what_the_environment_holds_goes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"401: {SECRET} is wrong") == "401: *** is wrong"


def test_all_that_is_written_is_without_them(tmp_path: Path) -> None:
    address = f"http://u:{SECRET}@host"
    write_json(tmp_path / "a.json", {address: [address, {"x": address}]})
    write_text(tmp_path / "b.html", f'<a href="{address}">')
    RunFolder(tmp_path / "run").journal("s").write("finished", trial="t", status="failed", error=f"at {address}")
    assert plain((address,)) == ["http://***@host"]
    assert all(SECRET not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("address", [a for a in HIDDEN if re.match(r"\w+://", a)])
def test_addresses_of_zoos_and_storage_hold_none(address: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="by the environment") as error:
        store(address)
    assert SECRET not in str(error.value)
    for arguments in (["info", address], ["check", address, "--json"], ["seal", address, "--verbose"]):
        assert zoo.main(arguments) == WRONG_REQUEST
    told = capsys.readouterr()
    assert SECRET not in told.out + told.err
    assert "***" in told.err
    with pytest.raises(UserError, match="by the environment"):
        prepare(Request(spaces=(), storage=address), "run", "tune")
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_a_run_leaves_or_says_holds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole recovery, recorded at an address with a password where nothing answers."""
    import subprocess
    import sys

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET + "2")
    address = f"http://somebody:{SECRET}@127.0.0.1:9"
    command = [sys.executable, "-m", "distrecon.recover", "--smoke", "--out", "run", "--json", "--verbose"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment(), "MLFLOW_TRACKING_URI": address}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["mlflow"] == "http://***@127.0.0.1:9"
    assert "MLflow   NOT COMPLETE: MLflow at http://***@127.0.0.1:9" in done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"report.html", "summary.json", "request.json"} <= {file.name for file in files}
    holding = [file for file in files if SECRET.encode() in file.read_bytes()]
    assert holding == []
    assert SECRET not in done.stdout + done.stderr


def test_links_and_notes_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://somebody:{SECRET}@host/mlflow")
    folder = RunFolder(tmp_path)
    tracker = Tracker(folder, ["s"], {})
    tracker._sent["s"] = {"offset": 3, "runs": {"t": "abc"}, "experiment": "1", "models": {}}
    assert tracker.run_url("s", "t") == "https://host/mlflow/#/experiments/1/runs/abc"
    assert tracker.viewer == "https://***@host/mlflow"
    tracker._save()
    assert SECRET not in folder.tracking.read_text()
    assert Tracker(folder, ["s"], {}).run_ids("s") == {"t": "abc"}  # and the store is known again
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"no://u:{SECRET}@host")
    with pytest.raises(UserError) as error:
        model_folder("abc")
    assert SECRET not in str(error.value)


def test_names_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2J\r\x07b\u202ec\x9b") == "a\\x1b[2J\\r\\x07b\\u202ec\\x9b"
    assert printable("Ähnlich ▁▂█ 日本") == "Ähnlich ▁▂█ 日本"
    assert zoo.main(["info", "no\x1b]0;title\x07such\nzoo"]) == WRONG_REQUEST
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert len(told.splitlines()) == 1
