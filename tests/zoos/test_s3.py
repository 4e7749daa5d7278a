"""Zoos in an S3 bucket: a real S3 client (pyarrow's) against moto's server on loopback."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from distrecon.errors import UserError
from distrecon.zoos import Zoo, open_zoo
from distrecon.zoos.build import report_name
from distrecon.zoos.format import part_name
from distrecon.zoos.inspection import check
from distrecon.zoos.storage import store
from distrecon.zoos.stream import stream
from distrecon.zoos.train import ensure
from tests.zoos.conftest import TINY

moto = pytest.importorskip("moto.server", reason="moto is not installed")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, request: pytest.FixtureRequest) -> tuple[str, pafs.S3FileSystem]:
    """A new bucket's name, and a client."""
    client = pafs.S3FileSystem(
        endpoint_override=endpoint, scheme="http", access_key="any", secret_key="any", region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip
    name = request.node.name.replace("_", "-")[:60].strip("-")
    client.create_dir(name)
    return name, client


def test_a_zoo_trained_into_a_bucket_equals_the_local_one(tiny_zoo: Zoo, bucket: tuple[str, pafs.S3FileSystem]) -> None:
    name, client = bucket
    zoo = ensure(TINY, store(f"{name}/zoos/tiny", client))
    assert torch.equal(zoo.weights(), tiny_zoo.weights())
    assert zoo.info["splits"] == tiny_zoo.info["splits"]
    assert not check(zoo).problems
    there, here = ([batch.row_b for batch in stream([z], batch_size=16, last_epoch=0)] for z in (zoo, tiny_zoo))
    assert torch.equal(torch.cat(there), torch.cat(here))
    assert zoo.dataset("test", ["model_id"]).count() == tiny_zoo.info["splits"]["test"]["states"]
    with pytest.raises(UserError, match=r"another configuration \(seed is"):
        ensure(dataclasses.replace(TINY, seed=5), store(f"{name}/zoos/tiny", client))


def test_an_interrupted_training_continues_in_the_bucket(tiny_zoo: Zoo, bucket: tuple[str, pafs.S3FileSystem]) -> None:
    name, client = bucket
    where = store(f"{name}/tiny", client)

    class Stop(Exception):
        pass

    def after_one_group(done: int, *_: object) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        ensure(TINY, where, progress=after_one_group)
    with pytest.raises(UserError):
        open_zoo(f"{name}/tiny", client)
    done = [part for number in range(3) if where.exists(report_name(number)) and (part := part_name(number))]
    assert done
    times = {part: client.get_file_info(where.path(part)).mtime for part in done}
    zoo = ensure(TINY, where)
    assert torch.equal(zoo.weights(), tiny_zoo.weights())
    assert {part: client.get_file_info(where.path(part)).mtime for part in done} == times


def test_an_address_with_its_endpoint_needs_no_client(
    tiny_zoo: Zoo,
    tiny_folder: Path,
    endpoint: str,
    bucket: tuple[str, pafs.S3FileSystem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, client = bucket
    pafs.copy_files(str(tiny_folder), f"{name}/copied", destination_filesystem=client)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    zoo = open_zoo(f"s3://{name}/copied?endpoint_override={endpoint}&scheme=http&region=us-east-1")
    assert torch.equal(zoo.weights("val"), tiny_zoo.weights("val"))
    with pytest.raises(UserError, match="nowhere"):
        open_zoo(f"s3://{name}/nowhere?endpoint_override={endpoint}&scheme=http&region=us-east-1")
