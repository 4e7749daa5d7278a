"""Fixtures that all floors share."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


CHECKOUT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """For commands of this checkout that record in the MLflow store of their working directory."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": ""}


def run_command(folder: Path, name: str, *arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """`python -m distrecon.NAME ARGUMENTS` in a folder."""
    command = [sys.executable, "-m", f"distrecon.{name}", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks files that need the Ray session or the smoke run, so that they and the others can run side by side."""
    shared = {item.path for item in items if {"ray_session", "smoke"} & set(getattr(item, "fixturenames", ()))}
    for item in items:
        if item.path in shared:
            item.add_marker("ray")


@pytest.fixture(scope="session", autouse=True)
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands that a test runs in this process record in a store of the test session, unless the test names one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")
        yield


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """A finished `distrecon.tune --smoke`: the folder it was started in, its run folder, its process."""
    folder = tmp_path_factory.mktemp("smoke")
    done = run_command(folder, "tune", "--smoke", "--out", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, folder / "out", done


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray session of two CPUs for all tests that need one."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
