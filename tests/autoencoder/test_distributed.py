"""Any number of workers, with any split of the batch, gives the losses and gradients of one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distrecon.autoencoder import Batch, Training, ZooSample
from distrecon.images import load
from distrecon.nets import architecture
from tests.autoencoder.small import random_models, tiny

SIZE = 6
SPLITS = {  # of a global batch of six models between two workers
    "half": [(0, 3), (3, 6)],
    "uneven": [(0, 4), (4, 6)],
    "empty": [(0, 6), (6, 6)],
}


def train(first: int, end: int) -> dict:
    """Two steps on these rows of the global batch: losses, gradients, weights, scales."""
    arch, images = architecture("cnn_small"), load("digits")
    theta_BP = random_models(arch, 2 * SIZE)
    config = tiny(optim__precision="float64", loss__lam=0.1, optim__clip=0.0, data__target_precision="float64")
    training = Training(config, [ZooSample(arch, theta_BP, images)], total_steps=4)
    losses, gradients = [], []
    for step in range(2):
        rows = torch.arange(step * SIZE + first, step * SIZE + end)
        losses.append(training.step(Batch(0, step, 0, rows, theta_BP[rows], SIZE, first)))
        gradients.append(torch.cat([p.grad.flatten() for p in training.autoencoder.parameters()]))
    weights = torch.cat([p.detach().flatten() for p in training.autoencoder.parameters()])
    return {"losses": losses, "gradients": gradients, "weights": weights, "scales": training.scales}


def work(rank: int, folder: str) -> None:
    """Every split, as one of two workers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, split in SPLITS.items():
        torch.save(train(*split[rank]), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_workers_agree_with_one(tmp_path):
    alone = train(0, SIZE)
    expected = {f"loss/{n}" for n in ("contrastive", "structural", "behavioral", "cycle", "total")}
    assert set(alone["losses"][0]) == expected
    assert all(gradient.abs().max() > 1e-6 for gradient in alone["gradients"])
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for name in SPLITS:
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            for step in range(2):
                for key, value in alone["losses"][step].items():
                    assert abs(found["losses"][step][key] - value) < 1e-9 * max(1, abs(value)), (name, rank, key)
                torch.testing.assert_close(found["gradients"][step], alone["gradients"][step], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-6, atol=1e-7)
            for key, scale in alone["scales"][0].items():
                assert abs(found["scales"][0][key] / scale - 1) < 1e-9, (name, rank, key)
