"""Which of two recoveries is kept, what a seed changes, what is carried over between layers, what is pruned."""

import itertools

import pytest
import torch

from distrecon.expand_cluster import Recovery, network, recover_network
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.peel import _carry_over
from distrecon.expand_cluster.result import better
from distrecon.nets.activations import activation


def recovery(verified: bool, loss: float) -> Recovery:
    return Recovery([], "tanh", verified, "", [], {"recover/train_loss": loss})


@pytest.mark.parametrize(
    ("new", "old", "kept"),
    [
        ((False, 1e-3), None, "new"),
        ((False, 1e-3), (False, 1e-6), "old"),
        ((False, 1e-6), (False, 1e-3), "new"),
        ((True, 1e-3), (False, 1e-30), "new"),
        ((False, 1e-30), (True, 1e-3), "old"),
        ((True, 1e-3), (True, 1e-6), "new"),
    ],
)
def test_the_better_of_two_recoveries(new, old, kept):
    pair = {"new": recovery(*new), "old": recovery(*old) if old is not None else None}
    assert better(pair["new"], pair["old"]) is pair[kept]


def small_teacher():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(o, i, generator=generator).double(), torch.randn(o, generator=generator).double())
        for i, o in itertools.pairwise((3, 2, 1))
    ]


def test_another_seed_asks_other_queries_and_the_same_one_the_same():
    teacher = network(small_teacher(), "tanh")

    def asked(seed):
        rows = []

        def box(x_QI):
            rows.append(x_QI.clone())
            return teacher(x_QI)

        result = recover_network(box, 3, "tanh", seed=seed)
        return torch.cat(rows), result

    (first, one), (same, again), (other, third) = (asked(seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert all(torch.equal(a, b) for a, b in zip(sum(one.weights, ()), sum(again.weights, ()), strict=True))
    assert len(first) != len(other) or not torch.equal(first, other)
    assert one.verified
    assert third.verified


def test_what_is_carried_over_gives_the_next_layers_pre_activations_with_their_bias():
    """Where the shared activations are the students' own, the next matrix is the students' own, its bias too."""
    generator = torch.Generator().manual_seed(0)
    net = DenseNet((3, 4, 5, 2), activation("tanh"))
    theta_NP = torch.randn(2, net.num_parameters, generator=generator, dtype=torch.float64)
    inputs_QR = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    first_NHK = net.matrices(theta_NP)[0]
    for student in range(2):
        hidden_QH = torch.tanh(inputs_QR @ first_NHK[student, :, :-1].T + first_NHK[student, :, -1])
        smaller = DenseNet((4, 5, 2), activation("tanh"))
        carried_1P = _carry_over(net, theta_NP[student : student + 1], inputs_QR, hidden_QH)
        own = [matrix[student : student + 1] for matrix in net.matrices(theta_NP)[1:]]
        for found, expected in zip(smaller.matrices(carried_1P), own, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
            assert expected[..., -1].abs().min() > 0.01  # a bias that matters
