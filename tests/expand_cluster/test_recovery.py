"""Recoveries end to end, scores, and wrong requests."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from distrecon import config as configuration
from distrecon.errors import UserError
from distrecon.expand_cluster import (
    BlackBox,
    Recovery,
    RecoveryConfig,
    network,
    recover_network,
    score,
    synthetic_teacher,
)
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.recovery import _within_reach
from distrecon.expand_cluster.teachers import synthetic_problem
from distrecon.nets.activations import ACTIVATIONS


def settings(**values) -> RecoveryConfig:
    return configuration.replace(RecoveryConfig(), {k.replace("__", "."): v for k, v in values.items()})


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_small_teachers_are_recovered_exactly(name):
    weights = synthetic_teacher(8, 4, name, seed=3)
    result = recover_network(network(weights, name), 8, name, config=settings(students__count=5))
    metrics = score(result, weights)
    assert result.verified, result.reason
    assert result.layer_sizes == [4]
    assert metrics["recover/max_cosine_distance"] < 1e-12
    assert (metrics["recover/missing"], metrics["recover/excess"]) == (0, 0)


def test_several_outputs_wide_inputs_and_no_dependence_on_order():
    generator = torch.Generator().manual_seed(5)
    weights = [(torch.randn(6, 30, generator=generator).double() / 3, torch.randn(6, generator=generator).double())]
    weights.append((torch.randn(4, 6, generator=generator).double(), torch.randn(4, generator=generator).double()))
    data = torch.rand(50, 30, generator=generator, dtype=torch.float64)
    first = recover_network(network(weights, "tanh"), 30, "tanh", seed=1, config=settings(students__count=4), data=data)
    again = recover_network(network(weights, "tanh"), 30, "tanh", seed=1, config=settings(students__count=4), data=data)
    assert first.verified
    assert score(first, weights, data)["recover/max_cosine_distance"] < 1e-20
    assert first.metrics["recover/agreement"] == 1.0
    assert all(
        torch.equal(a, b) for x, y in zip(first.weights, again.weights, strict=True) for a, b in zip(x, y, strict=True)
    )
    torch.testing.assert_close(first(data), network(weights, "tanh")(data), rtol=0, atol=1e-12)


def test_a_float32_teacher_is_recovered_to_its_own_precision():
    weights = synthetic_teacher(8, 3, "tanh", seed=1)
    rounded = network([(w.float(), b.float()) for w, b in weights], "tanh")
    result = recover_network(lambda x: rounded(x.float()), 8, "tanh", config=settings(students__count=5))
    assert result.verified, result.reason
    assert result.layer_sizes == [3]
    assert 1e-20 < score(result, weights)["recover/max_cosine_distance"] < 1e-8


def test_two_neurons_that_noise_lets_do_the_work_of_one_become_one():
    weights = synthetic_problem(8, 3, "sigmoid", 70)
    rounded = network([(w.float(), b.float()) for w, b in weights], "sigmoid")
    config = settings(budget__attempts=1, students__count=5)
    result = recover_network(lambda x: rounded(x.float()), 8, "sigmoid", config=config)
    assert result.verified, result.reason
    assert result.layer_sizes == [3]


def test_the_automatic_rule_wants_two_batches_that_agree():
    weights = synthetic_teacher(8, 4, "tanh", seed=0)
    result = recover_network(network(weights, "tanh"), 8, "tanh", config=settings(students__batch=3))
    assert result.verified
    assert result.metrics["recover/students"] >= 6


def test_an_unknown_activation_is_found():
    weights = synthetic_teacher(6, 3, "softplus", seed=2)
    result = recover_network(network(weights, "softplus"), 6, "unknown", config=settings(students__count=4))
    assert result.verified
    assert result.activation == "softplus"


def test_what_is_no_such_network_is_called_unverified():
    result = recover_network(
        lambda x: (3 * x).sin().prod(1, keepdim=True), 2, "tanh", config=settings(budget__attempts=1)
    )
    assert not result.verified
    assert "relative error" in result.reason


def test_interrupted_recovery_resumes_with_the_same_result(tmp_path):
    weights, calls = synthetic_teacher(6, 4, "tanh", seed=7), 0
    config = settings(students__batch=3)
    straight = recover_network(network(weights, "tanh"), 6, "tanh", config=config)

    def stop(stage, value):
        nonlocal calls
        calls += stage == "size"
        if calls == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover_network(network(weights, "tanh"), 6, "tanh", config=config, progress=stop, stages=tmp_path)
    kept = sorted(tmp_path.glob("*.safetensors"))
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    resumed = recover_network(network(weights, "tanh"), 6, "tanh", config=config, stages=tmp_path)
    assert kept[0].stat().st_mtime_ns == written
    assert torch.equal(resumed.weights[0][0], straight.weights[0][0])
    with pytest.raises(UserError, match="other settings"):
        recover_network(network(weights, "tanh"), 6, "tanh", seed=1, config=config, stages=tmp_path)


def test_saved_networks_are_read_back_and_never_overwritten(tmp_path):
    weights = synthetic_teacher(3, 2, "g", seed=0)
    result = Recovery(weights, "g", True, "by hand")
    result.save(tmp_path / "net.safetensors")
    tensors = load_file(tmp_path / "net.safetensors")
    assert torch.equal(tensors["layer0.weight"], weights[0][0])
    with pytest.raises(UserError, match="never overwritten"):
        result.save(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "g"])
def test_scores_see_through_the_symmetries_and_nothing_else(name, generator):
    truth = [(torch.randn(4, 3, generator=generator).double(), torch.randn(4, generator=generator).double())]
    truth.append((torch.randn(3, 4, generator=generator).double(), torch.randn(3, generator=generator).double()))
    truth.append((torch.randn(2, 3, generator=generator).double(), torch.randn(2, generator=generator).double()))
    moved = [(w.clone(), b.clone()) for w, b in truth]
    for layer in range(2):
        (w, b), (w_next, b_next) = moved[layer], moved[layer + 1]
        order = torch.randperm(len(b), generator=generator)
        w, b, w_next = w[order], b[order], w_next[:, order]
        factor = torch.ones(len(b), dtype=torch.float64)
        if name in ("tanh", "sigmoid"):
            factor[0] = -1
        if name == "relu":
            factor = torch.rand(len(b), generator=generator, dtype=torch.float64) + 0.5
        if name == "sigmoid":
            b_next = b_next + w_next[:, 0]
        moved[layer] = factor[:, None] * w, factor * b
        moved[layer + 1] = w_next / factor, b_next
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(network(moved, name)(x), network(truth, name)(x))
    metrics = score(Recovery(moved, name, True, ""), truth, x)
    assert metrics["recover/max_cosine_distance"] < 1e-25
    assert metrics["recover/agreement"] == 1.0
    moved[0][0][0, 0] += 0.5
    assert score(Recovery(moved, name, True, ""), truth)["recover/max_cosine_distance"] > 1e-4


def test_scores_count_missing_and_excess_neurons():
    weights = synthetic_teacher(5, 4, "g", seed=0)
    (w, b), (a, c) = weights
    fewer = Recovery([(w[:3], b[:3]), (a[:, :3], c)], "g", False, "")
    more = Recovery(
        [(torch.cat([w, w[:1] * 0.3]), torch.cat([b, b[:1]])), (torch.cat([a, a[:, :1]], 1), c)], "g", False, ""
    )
    assert score(fewer, weights)["recover/missing"] == 1
    assert score(more, weights)["recover/excess"] == 1
    assert math.isclose(score(more, weights)["recover/size_overhead"], 0.25)


def good(x):
    return torch.tanh(x).sum(1, keepdim=True)


class Fickle:
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return good(x) + self.calls


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (lambda x: good(x) * float("nan"), {}, "not finite"),
        (lambda x: good(x)[:-1], {}, r"answered 160 queries with shape \[159, 1\], not \[160, O\]"),
        (lambda x: {"logits": good(x)}, {}, "answered with dict"),
        (lambda x: good(x[:, :2] @ x[0, :2]), {}, "raised at queries of shape"),
        (good, {"config": settings(budget__queries=300)}, "query budget of 300 is too small"),
        (good, {"config": settings(probes__count=10)}, "fewer than the students' .* unknowns"),
        (good, {"activation": "tahn"}, "did you mean 'tanh'"),
        (good, {"hidden_layers": 0}, "hidden_layers must be"),
        (good, {"outputs": "logits"}, "unknown outputs 'logits'"),
        (good, {"outputs": "probabilities"}, "not between 0 and 1"),
        (good, {"domain": (1, 0)}, "every low must be below its high"),
        (good, {"domain": 3}, "domain is \\(low, high\\)"),
        (good, {"domain": (-1, 1), "data": torch.full((4, 3), 2.0)}, "4 of 4 rows of data lie outside the domain"),
        (good, {"data": torch.full((4, 3), float("nan"))}, "data has values that are not finite"),
        (good, {"data": torch.zeros(4, 7)}, r"not \[Q, 3\]"),
    ],
)
def test_wrong_requests_name_the_problem(teacher, options, message):
    with pytest.raises(UserError, match=message):
        recover_network(teacher, 3, **{"activation": "tanh", **options})


@pytest.mark.parametrize("key", ["students.rho=0.5", "clustering.gamma=2", "warm_start.optimiser=sgd", "students.N=3"])
def test_wrong_settings_are_refused(key):
    with pytest.raises(UserError, match=key.split("=")[0].split(".")[-1]):
        configuration.replace(RecoveryConfig(), configuration.parse_assignments([key]))


def test_queries_are_counted_once_and_noise_tells_the_precision():
    box = BlackBox(good, 3)
    before, x = box.queries, torch.randn(20, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    first = box(x)
    assert box.queries == before + 20
    assert torch.equal(box(torch.cat([x, x])), torch.cat([first, first]))
    assert box.queries == before + 20
    assert box.noise < 1e-14
    assert 1e-9 < BlackBox(lambda x: good(x.float()), 3).noise < 1e-5


def test_configuration_round_trips():
    config = settings(students__count=7, clustering__gamma=0.5)
    assert configuration.replace(RecoveryConfig(), configuration.flatten(config)) == config
    assert dataclasses.is_dataclass(config)


def test_contradictions_farther_out_than_probes_learn_from_are_left():
    """At a hundred deviations and more only slopes show: probes drawn there would hide everything else."""
    eye_II = torch.eye(2, dtype=torch.float64)
    coordinates = Coordinates(eye_II, eye_II, torch.zeros_like(eye_II), 1.0, 0.0)
    near_QI = torch.tensor([[30.0, 40.0]], dtype=torch.float64)
    far_QI = torch.tensor([[3e6, 4e6]], dtype=torch.float64)
    kept_QI = _within_reach(torch.cat([far_QI, near_QI]), coordinates)
    assert torch.equal(kept_QI, near_QI)
    assert _within_reach(far_QI, coordinates) is None
    assert _within_reach(None, coordinates) is None
