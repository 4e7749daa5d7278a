"""Distributed training: the same losses however many workers share the batch, checkpoints, crashes."""

import dataclasses
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
from ray._private.state import actors

from distrecon import config
from distrecon.cluster.scoring import score_autoencoder
from distrecon.cluster.training import AutoencoderRun, train_autoencoder
from distrecon.errors import UserError
from distrecon.kinds import KINDS
from distrecon.zoos.settings import SMOKE_ZOO
from distrecon.zoos.train import ensure


@pytest.fixture(scope="module")
def zoo(ray_session, tmp_path_factory):
    return ensure(SMOKE_ZOO, tmp_path_factory.mktemp("zoo") / "smoke")


def small_run(**changes):
    values = {**KINDS["autoencoder"].smoke, "optim.batch_size": 16, "resources.cpus_per_worker": 0.3, **changes}
    return config.replace(AutoencoderRun(), values)


def losses_by_epoch(result):
    """Of the epochs whose checkpoints were kept (the last two), in order."""
    return [
        {key: value for key, value in metrics.items() if key.startswith("loss/")}
        for _, metrics in result.best_checkpoints
    ]


def train(run, zoo, folder, name="run"):
    return train_autoencoder(run, [zoo], str(folder), name)


def final_state(folder, name="run"):
    """The training state of the last checkpoint."""
    last = max((folder / name).glob("checkpoint_*/training.pt"), key=os.path.getmtime)
    return torch.load(last, weights_only=True)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_workers(zoo, tmp_path):
    states = {}
    for workers in (1, 2, 4):
        run = small_run(**{"resources.num_workers": workers, "optim.epochs": 7})
        result = train(run, zoo, tmp_path, f"w{workers}")
        states[workers] = losses_by_epoch(result), final_state(tmp_path, f"w{workers}")
    reference, state = states[1]
    assert state["training"]["steps_done"] > 20
    for workers in (2, 4):
        losses, other = states[workers]
        for mine, theirs in zip(reference, losses, strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert theirs[key] == pytest.approx(value, rel=1e-4), (workers, key)
        for name, tensor in state["training"]["autoencoder"].items():
            torch.testing.assert_close(other["training"]["autoencoder"][name], tensor, rtol=1e-3, atol=1e-4)


def test_in_process_training_reports_and_leaves_everything(zoo, tmp_path):
    run = small_run(**{"resources.num_workers": 0})
    result = train(run, zoo, tmp_path)
    assert result.metrics["epoch"] == 2
    metrics = score_autoencoder(run, zoo, f"{tmp_path}/run")
    assert 0 <= metrics["reconstruct/agreement"] <= 1
    artifacts = {path.name for path in (tmp_path / "run" / "artifacts").iterdir()}
    probes = {"probes.json", "probes.safetensors"}
    assert artifacts == {"autoencoder.json", "autoencoder.safetensors", "arrays.npz", "generated.safetensors"} | probes
    stored = json.loads((tmp_path / "run" / "artifacts" / "autoencoder.json").read_text())
    assert "resources.num_workers" not in stored["config"]


@pytest.mark.slow
def test_scoring_finds_the_trainings_workers_gone(zoo, tmp_path):
    """Two workers trained; while the autoencoder is scored, one place is taken and nothing else is reserved."""
    run = small_run(**{"resources.num_workers": 2, "resources.cpus_per_worker": 0.9, "optim.epochs": 1})
    train(run, zoo, tmp_path)
    deadline = time.monotonic() + 60  # what is free is told to this process a moment after the training let it go
    while ray.available_resources().get("CPU", 0.0) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(score_autoencoder, run, zoo, f"{tmp_path}/run")
        free, working = [], set()
        while not scoring.done():
            free.append(ray.available_resources().get("CPU", 0.0))
            working |= {a["ActorID"] for a in actors().values() if a["ActorClassName"] == "RayTrainWorker"
                        and a["State"] == "ALIVE"}  # fmt: skip
            time.sleep(0.05)
    assert "generate/accuracy_mean" in scoring.result()
    assert not working
    assert min(free) == pytest.approx(2 - 0.8)


def test_scoring_says_what_is_wrong_with_the_models(zoo, tmp_path):
    """Not what is wrong with a Ray task."""
    with pytest.raises(UserError, match="holds no autoencoder"):
        score_autoencoder(small_run(), zoo, str(tmp_path))


@pytest.mark.slow
def test_a_training_goes_on_from_its_last_epoch_with_the_same_result(zoo, tmp_path):
    """Two epochs in one go, and one epoch, then a restart for the second, end at the same weights."""
    whole = small_run(**{"resources.num_workers": 1, "optim.schedule": "constant", "optim.warmup": 0.0})
    half = dataclasses.replace(whole, optim=dataclasses.replace(whole.optim, epochs=1))
    train(whole, zoo, tmp_path, "whole")
    train(half, zoo, tmp_path, "parts")
    assert final_state(tmp_path, "parts")["epoch"] == 1
    train(whole, zoo, tmp_path, "parts")
    one, two = final_state(tmp_path, "whole"), final_state(tmp_path, "parts")
    assert one["epoch"] == two["epoch"] == 2
    for name, tensor in one["training"]["autoencoder"].items():
        torch.testing.assert_close(two["training"]["autoencoder"][name], tensor, rtol=0, atol=0)
