"""The pictures' arrays: neurons in the teacher's order, signs and scales."""

import pytest
import torch

from distrecon.expand_cluster.diagnosis import Finding
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.shown import shown


def disguised(weights, order, factor_H):
    """The same network of one hidden layer with its neurons reordered and rescaled."""
    (w, b), (a, c) = weights
    return [((factor_H[:, None] * w)[order], (factor_H * b)[order]), ((a / factor_H)[:, order], c)]


@pytest.mark.parametrize(("activation", "factors"), [("tanh", [1, -1, -1]), ("relu", [2.0, 0.5, 3.0])])
def test_neurons_stand_beside_the_teachers(activation, factors):
    draw = torch.Generator().manual_seed(0)
    w, b, a = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((3, 4), (3,), (2, 3)))
    teacher = [(w, b), (a, torch.zeros(2, dtype=torch.float64))]
    found = disguised(teacher, [2, 0, 1], torch.tensor(factors, dtype=torch.float64))
    arrays = shown(Recovery(found, activation, True, ""), teacher)
    torch.testing.assert_close(torch.from_numpy(arrays["first_layer"]), w)
    torch.testing.assert_close(torch.from_numpy(arrays["first_layer_teacher"]), w)


def test_without_a_teacher_they_stand_as_they_are_and_a_missing_one_is_left_out():
    w = torch.eye(3, dtype=torch.float64)
    weights = [(w, torch.zeros(3).double()), (torch.ones(1, 3).double(), torch.zeros(1).double())]
    fewer = [(w[[2, 0]], torch.zeros(2).double()), (torch.ones(1, 2).double(), torch.zeros(1).double())]
    assert shown(Recovery(fewer, "tanh", False, ""))["first_layer"].tolist() == w[[2, 0]].tolist()
    arrays = shown(Recovery(fewer, "tanh", False, ""), weights)
    assert arrays["first_layer"].tolist() == arrays["first_layer_teacher"].tolist() == w[[0, 2]].tolist()


def test_the_verdict_is_told_with_what_was_found():
    findings = [Finding("smooth", "no kinks", "not relu"), Finding("quantised", "steps of .1", "goes on")]
    verified = Recovery([], "tanh", True, "all answers agree", findings=findings)
    assert shown(verified)["verdict"].tolist() == [
        "Verified: all answers agree",
        "smooth: no kinks; not relu",
        "quantised: steps of .1; goes on",
    ]
    assert shown(Recovery([], "tanh", False, "too few queries"))["verdict"].tolist() == [
        "Not verified: too few queries"
    ]
