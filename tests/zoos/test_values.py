"""Training of zoos: every group, epoch and seed its own order; a single weight that is not finite excludes a model."""

import dataclasses

import pytest
import torch

from distrecon.nets import architecture, fit, initialise
from distrecon.nets.fit import OPTIMIZERS
from distrecon.zoos import train as train_module
from distrecon.zoos.settings import GridConfig, ImagesConfig, TrainingConfig, ZooConfig, groups, plan
from distrecon.zoos.train import Group, _Checkpoint, _keep_finite, _order_seed

SMALL = ZooConfig(
    name="small",
    images=ImagesConfig(limit=50),
    grid=GridConfig(initialisation=("uniform",), seeds=3),
    training=TrainingConfig(epochs=2, checkpoints=(1, 2), batch_size=50),
)


def test_groups_and_seeds_see_batches_in_orders_of_their_own() -> None:
    assert len({_order_seed(seed, group) for seed in range(3) for group in range(4)}) == 12
    assert _order_seed(1, 2) == _order_seed(1, 2)


def test_a_groups_own_order_is_the_one_it_is_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrecon.images import load

    given = []
    real = train_module.fit
    monkeypatch.setattr(train_module, "fit", lambda *a, **o: given.append(o["seed"]) or real(*a, **o))
    (models,) = groups(SMALL)
    arch, images = architecture("cnn_small"), load("digits", limit=50)
    for number in (0, 5):
        train_module._fit_group(Group(number, tuple(models)), SMALL, arch, images)
    assert given == [_order_seed(0, 0), _order_seed(0, 5)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_epochs_and_seeds_have_orders_of_their_own(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    arch = architecture("mlp", sizes=(4, 3, 2), activation="tanh")
    orders: list[list[int]] = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **o: orders.append((p := real(*a, **o)).tolist()) or p)

    def run(seed: int) -> list[list[int]]:
        orders.clear()
        theta_BP = initialise(arch, ["normal"], [0])
        inputs, labels_Q = torch.randn(40, 4), torch.arange(40) % 2
        list(fit(arch, theta_BP, inputs, labels_Q, epochs=3, lr_B=torch.ones(1), seed=seed, optimizer=optimizer))
        return list(orders)

    first = run(0)
    assert first == run(0)
    assert len({tuple(order) for order in [*first, *run(1)]}) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_weight_that_is_not_finite_excludes_its_model(value: float) -> None:
    arch = architecture("cnn_small")
    (models,) = groups(SMALL)
    known = torch.full((3,), 0.5)

    def checkpoint(epoch: int) -> _Checkpoint:
        return _Checkpoint(epoch, torch.zeros(3, arch.num_parameters), known, known, known)

    states = [checkpoint(1), checkpoint(2)]
    states[1].theta_BP[1, 7] = value
    table, excluded = _keep_finite(Group(0, tuple(models)), SMALL, arch, states)
    assert excluded == [{"model_id": models[1].model_id, "reason": "non-finite weights at epoch 2"}]
    assert table["model_id"].to_pylist() == [models[0].model_id] * 2 + [models[2].model_id] * 2


def test_models_of_another_seed_are_others() -> None:
    first, same, other = (plan(dataclasses.replace(SMALL, seed=seed)) for seed in (0, 0, 1))
    assert first == same
    assert not {m.seed for m in first} & {m.seed for m in other}
