"""Epochs' means, and where a training goes on, without a cluster."""

import contextlib
from pathlib import Path

import pytest
import torch

from distrecon.cluster import training as training_module
from distrecon.cluster.training import AutoencoderRun, train_epochs
from distrecon.zoos.models import Batch


class Pretended:
    """A training whose losses are given; batches of other sizes."""

    def steps(self, batches):
        for epoch, sizes in enumerate(([6, 2], [4, 4])):
            for step, (size, loss) in enumerate(zip(sizes, (1.0, 5.0), strict=True)):
                last = step == 1
                yield (
                    Batch(epoch, step, 0, torch.arange(size), torch.zeros(size, 1), size, 0, last),
                    {"loss/total": loss},
                )


def test_an_epochs_losses_are_means_over_models_not_over_steps(monkeypatch):
    monkeypatch.setattr(training_module, "stream", lambda *arguments, **options: iter(()))
    found = dict(train_epochs(AutoencoderRun(), [], Pretended(), 1, 0, 1))
    assert found[1]["loss/total"] == pytest.approx((6 * 1 + 2 * 5) / 8)
    assert found[2]["loss/total"] == pytest.approx(3)
    assert (found[1]["data/rows"], found[2]["data/rows"]) == (8, 8)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_training_goes_on_after_its_checkpoints_epoch(tmp_path, monkeypatch, epoch):
    from ray import train

    class Checkpoint:
        @contextlib.contextmanager
        def as_directory(self):
            yield tmp_path

    class Training:
        def __init__(self, *arguments):
            self.state = None

        def load_state_dict(self, state):
            self.state = state

    class Steps:
        def steps(self, epoch):
            return 2

    torch.save({"training": {"steps_done": 7}, "epoch": epoch}, Path(tmp_path) / training_module.STATE)
    monkeypatch.setattr(train, "get_checkpoint", lambda: Checkpoint() if epoch else None)
    monkeypatch.setattr(training_module, "Training", Training)
    monkeypatch.setattr(training_module, "plan", lambda *arguments, **options: Steps())
    training, first = training_module._prepare(AutoencoderRun(), [])
    assert first == epoch + 1
    assert training.state == ({"steps_done": 7} if epoch else None)


# -- how many at once, and on what ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "expected"), [(2, 2), (None, 7)])
def test_as_many_trials_at_once_as_the_sweep_says_or_the_cluster_holds(monkeypatch, asked, expected):
    from ray import tune

    from distrecon.cluster import sweeps

    monkeypatch.setattr(sweeps, "concurrent", lambda sweep: 7)
    monkeypatch.setattr(tune.search.BasicVariantGenerator, "next_trial", lambda self: self.max_concurrent)
    sweep = type("Sweep", (), {"max_concurrent": asked})()
    assert sweeps.Variants(sweep, 0).next_trial() == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"node_type_mapping": {"10.0.0.1": "head", "10.0.0.2": "gpu"}, "active_nodes": {"gpu": 1}}, {"head", "gpu"}),
        ({"pending_launches": {"cpu": 1}}, {"cpu"}),
        ({}, set()),
        (None, set()),
    ],
)
def test_the_autoscalers_node_types_are_those_that_it_reports(monkeypatch, report, expected):
    import json

    from ray.experimental import internal_kv

    from distrecon.cluster.session import _node_types

    answer = None if report is None else json.dumps({"autoscaler_report": report}).encode()
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key: answer)
    assert _node_types(seconds=0.0) == expected
