"""Queries where students disagree."""

import torch

from distrecon import config as configuration
from distrecon.expand_cluster import RecoveryConfig, network, recover_network
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.probes import Committee
from distrecon.expand_cluster.teachers import synthetic_teacher
from distrecon.nets.activations import activation


def test_disagreement_is_the_variance_of_students_relative_to_their_size():
    net = DenseNet((2, 3, 1), activation("tanh"))
    generator = torch.Generator().manual_seed(0)
    theta_NP = net.random(4, generator)
    x_QI = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    found_Q = Committee(net, theta_NP, torch.eye(2, dtype=torch.float64)).disagreement(x_QI)
    for found, x_I in zip(found_Q, x_QI, strict=True):
        answers_N = torch.stack([net(theta_P[None], x_I[None])[0, 0, 0] for theta_P in theta_NP])
        torch.testing.assert_close(found, answers_N.var() / (1 + answers_N.mean() ** 2))
    same_NP = theta_NP[:1].expand(4, -1)
    assert Committee(net, same_NP, torch.eye(2, dtype=torch.float64)).disagreement(x_QI).abs().max() < 1e-20


def test_later_rounds_ask_where_students_disagree():
    """The width is too small at first, so that there is a second round; its queries are others than without."""
    teacher = network(synthetic_teacher(2, 4, "g"), "g")
    asked = {}
    for share in (0.0, 0.5):

        def counted(x_QI, share=share):
            asked.setdefault(share, []).append(x_QI)
            return teacher(x_QI)

        settings = {"students.count": 4, "students.width": 2, "budget.attempts": 2, "probes.disputed": share}
        config = configuration.replace(RecoveryConfig(), {**settings, "probes.count": 200})
        recover_network(counted, 2, "g", config=config)
    plain, disputed = (torch.cat(asked[share]) for share in (0.0, 0.5))
    first = len(plain) // 3
    assert torch.equal(plain[:first], disputed[:first])
    assert len(plain) == len(disputed)
    assert not torch.equal(plain, disputed)
