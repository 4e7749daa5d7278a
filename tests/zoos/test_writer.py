"""One writer at a time, whatever kills it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from distrecon.errors import UserError
from distrecon.zoos import format as zoo_format
from distrecon.zoos import importing as importing_module
from distrecon.zoos import open_zoo, tasks
from distrecon.zoos.importing import ImportOptions, import_zoo
from distrecon.zoos.inspection import check
from distrecon.zoos.storage import Store, store
from distrecon.zoos.train import ensure
from distrecon.zoos.write import seal_zoo
from distrecon.zoos.writer import writing
from tests.conftest import CHECKOUT, environment
from tests.zoos.kills import ZOO, content, serially, write_source
from tests.zoos.test_seals import make

EVERY = ImportOptions(activation="tanh")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "run", serially)
    monkeypatch.setattr(importing_module, "MODELS_PER_UNIT", 2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source")
    return tmp_path / "source"


def elsewhere(folder: Path) -> Store:
    """A store that is not this machine's disk, as far as anybody can see: it has no locks."""
    return store(folder.name, pafs.SubTreeFileSystem(str(folder.parent), pafs.LocalFileSystem()))


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


WRITERS = {
    "train": lambda zoo, source: ensure(ZOO, zoo),
    "import": lambda zoo, source: import_zoo(source, zoo, EVERY),
    "seal": lambda zoo, source: seal_zoo(zoo),
}


@pytest.mark.parametrize("name", WRITERS)
def test_who_comes_second_is_told_in_one_line_and_changes_nothing(tmp_path: Path, source: Path, name: str) -> None:
    zoo = tmp_path / "zoo"
    if name == "seal":
        make(zoo)
    with writing(store(zoo)):
        before = state(zoo)
        with pytest.raises(UserError, match="is being written by another process: wait") as error:
            WRITERS[name](zoo, source)
        assert state(zoo) == before
    assert "\n" not in str(error.value)
    WRITERS[name](zoo, source)


def test_a_process_that_dies_leaves_no_lock(tmp_path: Path) -> None:
    code = f"""
import os
from distrecon.zoos.storage import store
from distrecon.zoos.writer import writing
with writing(store({str(tmp_path)!r})):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 9
    with writing(store(tmp_path)):
        pass


def test_a_request_that_turns_out_wrong_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/one.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        import_zoo(tmp_path / "source", tmp_path / "zoo", EVERY)
    assert not (tmp_path / "zoo").exists()


def test_an_import_that_another_one_overtakes_commits_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a store without locks: the second import of the same source begins and ends while the first is at work."""
    zoo = tmp_path / "zoo"
    monkeypatch.setattr(
        importing_module, "store", lambda path: elsewhere(zoo) if str(path) == str(zoo) else store(path)
    )
    overtaken = []

    def overtake(done: int, total: int, seconds: float) -> None:
        if done == 4 and not overtaken:
            overtaken.append(import_zoo(source, zoo, EVERY))

    with pytest.raises(
        UserError, match="changed by another writer meanwhile, and this one has changed nothing"
    ) as error:
        import_zoo(source, zoo, EVERY, progress=overtake)
    assert "\n" not in str(error.value)
    assert (overtaken[0].models, overtaken[0].states) == (12, 24)  # the first one's finished units were kept
    opened = open_zoo(zoo)
    assert opened.num_states == len({row[:2] for row in content(zoo)}) == 24
    assert check(opened, sample=0).problems == ()


def test_an_append_that_another_one_overtakes_commits_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the old zoo's states are not there twice."""
    zoo = tmp_path / "zoo"
    import_zoo(source, zoo, ImportOptions(epochs=(1,), activation="tanh"))
    monkeypatch.setattr(
        importing_module, "store", lambda path: elsewhere(zoo) if str(path) == str(zoo) else store(path)
    )

    def overtake(done: int, total: int, seconds: float) -> None:
        if done == 12:  # all its units are written
            import_zoo(source, zoo, EVERY)

    with pytest.raises(UserError, match="changed by another writer"):
        import_zoo(source, zoo, EVERY, progress=overtake)
    assert open_zoo(zoo).num_states == len(content(zoo)) == 24
    assert check(open_zoo(zoo), sample=0).problems == ()


def test_two_commits_of_one_beginning(tmp_path: Path) -> None:
    zoo, where = make(tmp_path / "zoo"), elsewhere(tmp_path / "zoo")
    said = {"name": "x", "arch": zoo.architecture, "image_set": zoo.info["image_set"], "origin": {"kind": "x"}}
    with writing(where) as first, writing(where) as second:
        zoo_format.commit(where, **said, parts=zoo.parts[:2], writer=second)
        with pytest.raises(UserError, match="another writer"):
            zoo_format.commit(where, **said, parts=zoo.parts[:1], writer=first)
    assert len(open_zoo(where).parts) == 2


def test_an_append_that_dies_keeps_the_images_of_the_zoo(tmp_path: Path, source: Path) -> None:
    """Other images come with it: until it is committed the zoo has its own, afterwards only the new ones."""
    import numpy as np

    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "images.npy", np.full((20, 28, 28), number, np.uint8))
        np.save(tmp_path / name / "labels.npy", np.arange(20) % 10)
    given = [
        ImportOptions(epochs=epochs, activation="tanh", images="arrays", images_directory=str(tmp_path / name))
        for epochs, name in (((1,), "a"), (None, "b"))
    ]
    zoo = tmp_path / "zoo"
    import_zoo(source, zoo, given[0])
    before = open_zoo(zoo).images().test.images

    def die(done: int, total: int, seconds: float) -> None:
        if done == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        import_zoo(source, zoo, given[1], progress=die)
    assert open_zoo(zoo).images().test.images.equal(before)
    import_zoo(source, zoo, given[1])
    assert not open_zoo(zoo).images().test.images.equal(before)
    assert check(open_zoo(zoo)).problems == ()


@pytest.mark.parametrize("text", ["", "3", "{}", '{"first_unit": 0}', '{"first_unit": 0, "origin": 3}', "[" * 10**5])
def test_a_damaged_beginning_is_refused_in_one_line(tmp_path: Path, source: Path, text: str) -> None:
    folder = tmp_path / "zoo/unfinished"
    folder.mkdir(parents=True)
    (folder / "origin.json").write_text(text)
    with pytest.raises(UserError, match=r"origin\.json") as error:
        import_zoo(source, tmp_path / "zoo", EVERY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_with_two_at_once(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-m", "tests.zoos.kills", str(tmp_path), str(count), "1"]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["command"] for line in told] == ["import", "append", "train", "seal", "compact"], done.stderr
    assert [line["wrong"] for line in told] == [[]] * 5
    assert os.listdir(tmp_path / "zoo")
