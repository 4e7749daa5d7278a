"""Any number of workers, with any split of the batch, gives the losses and gradients of one."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers import this file by its path
from conftest import random_models, tiny

from distrecon.autoencoder import Batch, Training, ZooSample
from distrecon.images import load
from distrecon.nets import architecture

SIZE = 6
SPLITS = {1: [(0, 6)], 2: [(0, 3), (3, 6)], 3: [(0, 4), (4, 6), (6, 6)]}  # the last worker of three has no models


def train(rank: int, workers: int, folder: str) -> None:
    """Two steps on this worker's rows; writes its losses, gradients and weights."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{workers}", rank=rank, world_size=workers)
    arch, images = architecture("cnn_small"), load("digits")
    theta_BP = random_models(arch, 2 * SIZE)
    config = tiny(optim__precision="float64", loss__lam=0.1, optim__clip=0.0, data__target_precision="float64")
    training = Training(config, [ZooSample(arch, theta_BP, images)], total_steps=4)
    first, end = SPLITS[workers][rank]
    losses, gradients = [], []
    for step in range(2):
        rows = torch.arange(step * SIZE + first, step * SIZE + end)
        losses.append(training.step(Batch(0, step, 0, rows, theta_BP[rows], SIZE, first)))
        gradients.append(torch.cat([p.grad.flatten() for p in training.autoencoder.parameters()]))
    weights = torch.cat([p.detach().flatten() for p in training.autoencoder.parameters()])
    torch.save(
        {"losses": losses, "gradients": gradients, "weights": weights, "scales": training.scales},
        f"{folder}/{workers}-{rank}.pt",
    )
    if workers > 1:
        dist.destroy_process_group()


def test_workers_agree_with_one(tmp_path):
    train(0, 1, str(tmp_path))
    alone = torch.load(tmp_path / "1-0.pt")
    assert alone["losses"][0].keys() == {
        f"loss/{n}" for n in ("contrastive", "structural", "behavioral", "cycle", "total")
    }
    assert all(gradient.abs().max() > 1e-6 for gradient in alone["gradients"])
    for workers in (2, 3):
        mp.spawn(train, args=(workers, str(tmp_path)), nprocs=workers)
        for rank in range(workers):
            found = torch.load(tmp_path / f"{workers}-{rank}.pt")
            for step in range(2):
                for name, value in alone["losses"][step].items():
                    assert abs(found["losses"][step][name] - value) < 1e-9 * max(1, abs(value)), (workers, rank, name)
                torch.testing.assert_close(found["gradients"][step], alone["gradients"][step], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-6, atol=1e-7)
            for name, scale in alone["scales"][0].items():
                assert abs(found["scales"][0][name] / scale - 1) < 1e-9, (workers, rank, name)
