"""Epochs' means, and where a training goes on, without a cluster."""

import contextlib
from pathlib import Path

import pytest
import torch

from distrecon import config as configuration
from distrecon.cluster import training as training_module
from distrecon.cluster.resources import ResourcesConfig, models_memory
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


@pytest.mark.parametrize(
    ("resources", "workers"),
    [
        ({}, 8),  # .9 CPUs each
        ({"cpus_per_worker": 4.0}, 2),
        ({"use_gpu": True}, 2),
        ({"use_gpu": True, "gpus_per_worker": 0.25}, 8),
        ({"cpus_per_worker": 64.0}, 1),  # none fits, and one asks
    ],
)
def test_the_workers_that_fit_on_a_node_share_a_quarter_of_its_memory(monkeypatch, resources, workers):
    import ray

    class Context:
        def get_node_id(self):
            return "this"

    has = {"CPU": 8.0, "GPU": 2.0, "memory": 64.0 * 2**30}
    nodes = [{"NodeID": "other", "Resources": {"CPU": 1.0}}, {"NodeID": "this", "Resources": has}]
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert models_memory(ResourcesConfig(**resources)) == 16 * 2**30 // workers


@pytest.mark.parametrize(("asked", "given"), [(None, 77), (0.0, 0), (0.5, 2**29)])
def test_a_training_keeps_as_many_models_as_its_settings_say(monkeypatch, asked, given):
    from ray import train

    class Stop(Exception):
        pass

    class Context:
        def get_world_rank(self):
            return 1

        def get_world_size(self):
            return 2

    def streamed(*arguments, **options):
        assert (options["memory"], options["rank"], options["world_size"]) == (given, 1, 2)
        raise Stop

    monkeypatch.setattr(train, "get_context", Context)
    monkeypatch.setattr(training_module, "models_memory", lambda resources: 77)
    monkeypatch.setattr(training_module, "_prepare", lambda run, zoos: (None, 1))
    monkeypatch.setattr(training_module, "stream", streamed)
    settings = configuration.flatten(AutoencoderRun()) | {"data.memory": asked}
    with pytest.raises(Stop):
        training_module.train_loop({"run": settings, "zoos": [], "artifacts": ""})


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
