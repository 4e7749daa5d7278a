"""What a black box may be, faults of a box, and kept answers."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor

from distrecon.errors import UserError
from distrecon.expand_cluster import examination
from distrecon.expand_cluster.answers import Answers
from distrecon.expand_cluster.kept import HEADER, RECORD, KeptAnswers

W_IO = np.linspace(-1, 1, 6).reshape(3, 2)


def module(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)


FLOAT64 = module(torch.float64)


@pytest.mark.parametrize(
    ("box", "outputs", "dtype"),
    [
        (lambda x: x @ torch.from_numpy(W_IO), 2, torch.float64),
        (lambda x: x @ torch.from_numpy(W_IO).float(), 2, torch.float32),  # refuses float64
        (lambda x: np.tanh(x.astype(np.float64) @ W_IO), 2, torch.float64),  # refuses tensors
        (lambda x: [[float(sum(row))] for row in x], 1, torch.float64),
        (lambda x: x.sum(1), 1, torch.float64),
        (lambda x: x.sum(1).numpy() > 0, 1, torch.float64),
        (FLOAT64, 2, torch.float64),
        (module(torch.float32), 2, torch.float32),
        (module(torch.bfloat16), 2, torch.bfloat16),
        (lambda x: FLOAT64(x), 2, torch.float64),  # with a gradient
    ],
)
def test_every_kind_of_box_gives_one_row_a_query_in_float64(box, outputs, dtype):
    answers, x_QI = Answers(box, 3), torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double()
    y_QO = answers(x_QI)
    assert y_QO.shape == (16, outputs)
    assert y_QO.dtype == torch.float64
    assert not y_QO.requires_grad
    assert answers.dtype == dtype


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimators_are_asked_by_their_methods(generator):
    x_QI, y_Q = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 3
    queries_QI = torch.from_numpy(x_QI)
    classifier = MLPClassifier((4,), max_iter=5).fit(x_QI, y_Q)
    regressor, linear = (
        MLPRegressor(hidden_layer_sizes=(4,), max_iter=5).fit(x_QI, x_QI[:, 0]),
        LinearRegression().fit(x_QI, x_QI),
    )
    for method in (classifier.predict_proba, regressor.predict, linear.predict):
        expected = torch.from_numpy(method(x_QI)).reshape(40, -1)
        torch.testing.assert_close(Answers(method, 3)(queries_QI), expected, rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"MLPClassifier is not callable; give one of its methods, such as \.predict_proba"
    ):
        Answers(classifier, 3)
    named = MLPClassifier((4,), max_iter=5).fit(x_QI, np.array(["cat", "dog", "owl"])[y_Q])
    with pytest.raises(UserError, match=r"answers with .*not with numbers: ask it for scores or probabilities"):
        Answers(named.predict, 3)(queries_QI)


def test_a_box_cannot_change_the_queries_and_keeps_its_mode():
    dropout = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Dropout())
    x_QI = torch.ones(4, 3, dtype=torch.float64)
    assert not torch.equal(Answers(dropout, 3)(x_QI), Answers(dropout, 3)(x_QI))
    assert dropout.training
    Answers(lambda x: x.zero_(), 3)(x_QI)
    assert x_QI.eq(1).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (
            module(torch.float32),
            r"raised at queries of shape \[2, 5\] \(input_size=5\): RuntimeError: mat1 and mat2 shapes",
        ),
        (lambda x: {"logits": x}, r"answered with dict, not with numbers \[2, O\]"),
        (lambda x: x[:1], r"answered 2 queries with shape \[1, 5\], not \[2, O\]"),
        (lambda x: x[:, :, None], r"shape \[2, 5, 1\]"),
        (lambda x: x[:, :0], r"shape \[2, 0\]"),
        (lambda x: x * float("nan"), "2 of 2 queries with values that are not finite"),
        (lambda x: x.to(torch.complex64), "complex"),
        (7, "an? int is not callable"),
    ],
)
def test_what_is_no_answer_is_one_line(box, message):
    with pytest.raises(UserError, match=message) as caught:
        Answers(box, 5)(torch.zeros(2, 5, dtype=torch.float64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"input_size": 0}, {"max_rows": 0}, {"retries": -1}])
def test_settings_that_make_no_sense(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} must be at least"):
        Answers(torch.sum, **{"input_size": 3, **setting})


class Flaky:
    """Raises at the calls whose numbers are given."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.rows = set(bad), []

    def __call__(self, x):
        self.rows.append(len(x))
        if len(self.rows) in self.bad:
            raise ConnectionError("reset\nby peer")
        return x.sum(1)


def test_calls_are_split_and_repeated_after_growing_waits():
    box, waits = Flaky(2, 3, 4), []
    answers = Answers(box, 3, max_rows=4, retries=3, sleep=waits.append)
    y_QO = answers(torch.ones(10, 3, dtype=torch.float64))
    assert box.rows == [4, 4, 4, 4, 4, 2]
    assert waits == [1, 2, 4]
    assert answers.repeated == 3
    assert y_QO.tolist() == [[3.0]] * 10
    with pytest.raises(UserError, match=r"ConnectionError: reset by peer \(2 repetitions did not help\)"):
        Answers(Flaky(*range(9)), 3, retries=2, sleep=waits.append)(torch.ones(1, 3))
    Answers(Flaky(*range(1, 9)), 3, retries=8, sleep=waits.append)(torch.ones(1, 3))
    assert waits[-1] == 60


def numbers(rows: int, start: int = 0):
    x_QI = torch.arange(start, start + 3 * rows, dtype=torch.float64).reshape(rows, 3)
    return x_QI, x_QI[:, :2].sin()


def test_kept_answers_come_back(tmp_path):
    kept, parts = KeptAnswers(tmp_path / "a" / "b", 3), [numbers(4), numbers(1, 50)]
    assert len(kept.rows()[0]) == 0
    for part in parts:
        kept.append(*part)
    with pytest.raises(UserError, match="another run is using it"):
        KeptAnswers(tmp_path / "a" / "b", 3)
    kept.close()
    again = KeptAnswers(tmp_path / "a" / "b", 3)
    for found, *expected in zip(again.rows(), *parts, strict=True):
        assert torch.equal(found, torch.cat(expected))
    again.append(*numbers(2, 90))
    again.close()
    assert len(KeptAnswers(tmp_path / "a" / "b", 3).rows()[0]) == 7


def test_a_record_torn_anywhere_is_cut_off_and_the_rest_stays(tmp_path):
    kept = KeptAnswers(tmp_path, 3)
    kept.append(*numbers(4))
    whole = (tmp_path / "answers.bin").stat().st_size
    kept.append(*numbers(2, 20))
    kept.close()
    data = (tmp_path / "answers.bin").read_bytes()
    for length in range(len(data)):
        (tmp_path / "answers.bin").write_bytes(data[:length])
        torn = KeptAnswers(tmp_path, 3)
        x_QI = torn.rows()[0]
        assert len(x_QI) == (4 if length >= whole else 0)
        torn.append(*numbers(1, 70))
        torn.close()
        last = KeptAnswers(tmp_path, 3)
        assert torch.equal(last.rows()[0][-1:], numbers(1, 70)[0])
        assert len(last.rows()[0]) == len(x_QI) + 1
        last.close()
    (tmp_path / "answers.bin").write_bytes(data + bytes(100))  # as after a power failure
    assert len(KeptAnswers(tmp_path, 3).rows()[0]) == 6


def test_damaged_and_foreign_answers_are_refused(tmp_path):
    file = tmp_path / "answers.bin"
    kept = KeptAnswers(tmp_path, 3)
    kept.append(*numbers(4))
    kept.append(*numbers(2, 20))
    kept.close()
    data = file.read_bytes()
    with pytest.raises(UserError, match="holds answers to queries of 3 inputs, not 4"):
        KeptAnswers(tmp_path, 4)
    for at in (
        HEADER.size,
        HEADER.size + RECORD.size + 9,
        len(data) - 1,
    ):  # a record's head, its numbers, the last byte
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UserError, match="damaged at byte"):
            KeptAnswers(tmp_path, 3)
    for content in (b"P" + data[1:], data[:24] + b"x" + data[25:], b"something else"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="does not hold kept answers"):
            KeptAnswers(tmp_path, 3)
        assert file.read_bytes() == content
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        KeptAnswers(file, 3)


WRITER = """
import sys, torch
from distrecon.expand_cluster.kept import KeptAnswers
kept = KeptAnswers(sys.argv[1], 3)
for number in range(1_000_000):
    kept.append(torch.full((50, 3), float(number)), torch.full((50, 2), float(-number)))
    print(number, flush=True)
"""


def test_what_was_kept_survives_a_kill(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            number = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        told = [number, *map(int, process.stdout.read().split())]
    x_QI, y_QO = KeptAnswers(tmp_path, 3).rows()
    assert len(x_QI) >= 50 * (told[-1] + 1)
    assert torch.equal(x_QI[:, 0], -y_QO[:, 0])
    assert torch.equal(x_QI[::50, 0], torch.arange(len(x_QI) // 50, dtype=torch.float64))


def test_another_black_box_is_refused_the_kept_answers_by_the_first_and_the_last(tmp_path):
    """Three kept queries; a box that answers one of the ends differently is told from the one that was asked."""
    x_QI = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    kept = KeptAnswers(tmp_path, 3)
    kept.append(x_QI[:3], x_QI[:3] @ torch.from_numpy(W_IO))
    kept.close()
    asked = []

    def box(moved):
        def answer(x):
            asked.extend(x[:, 0].tolist())
            return x @ torch.from_numpy(W_IO) + (x[:, :1] == moved)

        return answer

    for moved in (0.0, 6.0):
        with pytest.raises(UserError, match="answers a kept query differently"):
            examination._keeping(Answers(box(moved), 3), tmp_path, 3)
    same = examination._keeping(Answers(box(None), 3), tmp_path, 3)
    asked.clear()
    torch.testing.assert_close(same(x_QI), x_QI @ torch.from_numpy(W_IO))
    assert asked == [9.0]  # the only one that was not kept
