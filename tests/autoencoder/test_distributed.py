"""Any number of workers, with any split of the batch, gives the losses and gradients of one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distrecon.autoencoder import Batch, Training, ZooSample
from distrecon.images import load
from distrecon.nets import architecture
from tests.autoencoder.small import random_models, tiny

SIZE = 6
SPLITS = {  # kind of coder, and how a global batch of six models is split between two workers
    "half": ("transformer", [(0, 3), (3, 6)]),
    "uneven": ("transformer", [(0, 4), (4, 6)]),
    "empty": ("transformer", [(0, 6), (6, 6)]),
    "fisher": ("fisher_residual", [(0, 2), (2, 6)]),
}
FISHER = {"model__latent": 1, "model__fisher_models": 4, "model__fisher_queries": 3}


def train(kind: str, first: int, end: int) -> dict:
    """Two steps on these rows of the global batch: losses, gradients, weights, scales."""
    arch, images = architecture("cnn_small"), load("digits")
    theta_BP = random_models(arch, 48 if kind != "transformer" else 2 * SIZE)
    config = tiny(
        optim__precision="float64",
        loss__lam=0.1,
        optim__clip=0.0,
        data__target_precision="float64",
        model__kind=kind,
        **(FISHER if kind != "transformer" else {}),
    )
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
    for name, (kind, split) in SPLITS.items():
        torch.save(train(kind, *split[rank]), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_workers_agree_with_one(tmp_path):
    alone = {kind: train(kind, 0, SIZE) for kind in ("transformer", "fisher_residual")}
    expected = {f"loss/{n}" for n in ("contrastive", "structural", "behavioral", "cycle", "total")}
    for run in alone.values():
        assert set(run["losses"][0]) == expected
        assert all(gradient.abs().max() > 1e-6 for gradient in run["gradients"])
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for name, (kind, _) in SPLITS.items():
        for rank in range(2):
            found, one = torch.load(tmp_path / f"{name}-{rank}.pt"), alone[kind]
            for step in range(2):
                for key, value in one["losses"][step].items():
                    assert abs(found["losses"][step][key] - value) < 1e-9 * max(1, abs(value)), (name, rank, key)
                torch.testing.assert_close(found["gradients"][step], one["gradients"][step], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found["weights"], one["weights"], rtol=1e-6, atol=1e-7)
            for key, scale in one["scales"][0].items():
                assert abs(found["scales"][0][key] / scale - 1) < 1e-9, (name, rank, key)
