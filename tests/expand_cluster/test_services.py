"""Recoveries through services that fail, cost, or are broken off: retries, kept answers, budgets."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from distrecon import config as configuration
from distrecon.errors import UserError
from distrecon.expand_cluster import RecoveryConfig, network, recover_network, synthetic_teacher
from tests.conftest import environment

TEACHER = synthetic_teacher(4, 3, "tanh", seed=1)
CONFIG = configuration.replace(RecoveryConfig(), {"students.count": 4})


class Counted:
    """A black box that keeps what it was asked, and raises at one call."""

    def __init__(self, raises_at=0, teacher=TEACHER):
        self.net, self.raises_at, self.rows, self.calls = network(teacher, "tanh"), raises_at, [], 0

    def __call__(self, x_QI):
        self.calls += 1
        if self.calls == self.raises_at:
            raise ConnectionError("gone")
        self.rows += [tuple(row) for row in x_QI.tolist()]
        return self.net(x_QI)


def recover(box, **options):
    return recover_network(box, 4, "tanh", config=CONFIG, **options)


def test_a_run_that_starts_again_pays_for_no_answer_twice(tmp_path):
    straight, first = Counted(), Counted(raises_at=40)
    result = recover(straight)
    with pytest.raises(UserError, match="ConnectionError: gone"):
        recover(first, answers=tmp_path)
    assert len(first.rows) > 500
    second = Counted()
    again = recover(second, answers=tmp_path)
    twice = [row for row in second.rows if row in set(first.rows)]
    repeated = set(straight.rows[:200]) & {row for row in straight.rows if straight.rows.count(row) > 1}
    assert len([row for row in twice if row not in repeated]) <= 2  # the first and the last, to know the box by
    assert torch.equal(again.weights[0][0], result.weights[0][0])
    assert again.verified
    third = Counted()
    assert recover(third, answers=tmp_path).verified
    assert len(third.rows) <= 2 + 2 * 16  # and those that tell whether answers repeat


def test_answers_of_another_box_are_refused(tmp_path):
    recover(Counted(), answers=tmp_path)
    with pytest.raises(UserError, match="answers a kept query differently"):
        recover(Counted(teacher=synthetic_teacher(4, 3, "tanh", seed=2)), answers=tmp_path)
    with pytest.raises(UserError, match="queries of 4 inputs, not 5"):
        recover_network(Counted(), 5, "tanh", answers=tmp_path)


SCRIPT = """
import os, signal, sys
from tests.expand_cluster.test_services import Counted, recover
box = Counted()
ask = box.net
def dies(x):
    if box.calls == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(x)
box.net = dies
recover(box, answers=sys.argv[1])
"""


def test_a_killed_run_goes_on_from_its_answers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment(), capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    before = os.path.getsize(tmp_path / "answers.bin")
    box = Counted()
    assert recover(box, answers=tmp_path).verified
    straight = Counted()
    recover(straight)
    assert len(box.rows) < len(straight.rows) - 500
    assert os.path.getsize(tmp_path / "answers.bin") > before


@pytest.mark.parametrize("queries", [2500, 4000, 6000])
def test_a_budget_that_runs_out_returns_what_there_is(queries):
    config = configuration.replace(CONFIG, {"budget.queries": queries})
    box = Counted()
    result = recover_network(box, 4, "tanh", config=config)
    assert len(set(box.rows)) <= queries
    assert result.metrics["recover/queries"] <= queries
    if not result.verified:
        assert f"the query budget of {queries} is too small" in result.reason
        assert torch.isfinite(result(torch.randn(5, 4, dtype=torch.float64))).all()


def test_faults_are_repeated_and_the_result_is_the_same(monkeypatch):
    monkeypatch.setattr("distrecon.expand_cluster.answers.FIRST_WAIT", 1e-3)
    faulty = Counted()
    ask, calls = faulty.net, 0

    def now_and_then(x_QI):
        nonlocal calls
        calls += 1
        if calls % 50 in (7, 8):
            raise TimeoutError("slow")
        return ask(x_QI)

    faulty.net = now_and_then
    result = recover(faulty, retries=2, max_rows=300)
    assert torch.equal(result.weights[0][0], recover(Counted(), max_rows=300).weights[0][0])
    assert calls > 60
