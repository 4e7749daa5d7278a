"""The benchmark of black boxes: none is verified wrongly, and its judge sees what is wrong."""

import dataclasses
import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.black_boxes import Problem, dense, far_kink, weights
from benchmarks.box_cases import CASES, Case
from benchmarks.boxes import as_should, judge, solve
from distrecon.expand_cluster import Recovery, network

NAMES = {case.name: case for case in CASES}
SIZES = [6, 4, 2]


def result(layers, activation="tanh", **more):
    return Recovery(layers, activation, True, "by hand", **more)


@pytest.mark.parametrize("case", [case for case in CASES if case.small], ids=lambda case: case.name)
def test_small_boxes_are_answered_as_they_should_be(case):
    row = solve(case)
    assert not row["wrongly"], row
    assert row["as_should"], row


@pytest.mark.slow
def test_no_box_is_verified_wrongly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["boxes", "--json", "all.json"]) == 0
    rows = json.loads((tmp_path / "all.json").read_text())["boxes"]["rows"]
    assert len(rows) == len(CASES)
    assert not [row["box"] for row in rows if row["wrongly"]]
    capsys.readouterr()


def test_the_right_network_is_right_whatever_its_symmetries():
    problem = dense(SIZES, "tanh", seed=3)
    (w, b), (a, c) = weights(SIZES, 3)
    turned = torch.tensor([2, 0, 3, 1])
    found = judge(problem, result([(-w[turned], -b[turned]), (-a[:, turned], c)]))
    assert found["right"]
    assert found["off"] < 1e-12


@pytest.mark.parametrize("what", ["weight", "output", "missing", "extra", "nan"])
def test_a_wrong_network_is_wrong(what):
    problem = dense(SIZES, "tanh", seed=3)
    (w, b), (a, c) = weights(SIZES, 3)
    if what == "weight":
        w = w.clone()
        w[1, 2] += 1e-4
    if what == "output":  # one of two, and much the smaller
        problem = dataclasses.replace(
            problem, truth=lambda x: network(weights(SIZES, 3), "tanh")(x) * torch.tensor([1e9, 1.0])
        )
        a, c = a * torch.tensor([[1e9], [1.0 + 1e-4]]), c * torch.tensor([1e9, 1.0])
    if what == "missing":
        w, b, a = w[:3], b[:3], a[:, :3]
    if what == "extra":
        w, b, a = torch.cat([w, w[:1]]), torch.cat([b, b[:1]]), torch.cat([a / 1, 0 * a[:, :1]], 1)
    if what == "nan":
        c = c * float("nan")
    assert not judge(problem, result([(w, b), (a, c)]))["right"]


def test_a_kink_far_off_is_looked_for_where_it_is():
    problem = far_kink()
    (w, b), last = weights([8, 5, 3], 1)
    kept = [(w[1:], b[1:]), (last[0][:, 1:], last[1])]
    found = judge(problem, result(kept, "relu"))
    assert not found["right"]
    assert found["off"] > 1e-2
    near = dataclasses.make_dataclass("Range", ["lowest", "highest", "smallest_seen", "spread"])
    here = near([-10.0] * 8, [10.0] * 8, [1e-9], [1.0])
    assert judge(problem, result(kept, "relu", certificate=here))["off_inside"] < 1e-6


def test_a_wrong_verdict_counts_and_an_honest_one_does_not(monkeypatch):
    problem = dense(SIZES, "tanh", seed=3)
    wrong = result(weights(SIZES, 4), metrics={"recover/queries": 1})
    case = Case("by hand", "exact", lambda: problem)
    for verified in (True, False):
        wrong.verified = verified
        monkeypatch.setattr("benchmarks.boxes.recover_network", lambda *a, **k: wrong)
        row = solve(case)
        assert row["wrongly"] == verified
        assert not row["as_should"]
        assert as_should("unverified", row) != verified


def test_names_are_unique_and_every_case_can_be_made():
    assert len(NAMES) == len(CASES)
    for case in CASES:
        if case.small:
            assert isinstance(case.make(), Problem)
