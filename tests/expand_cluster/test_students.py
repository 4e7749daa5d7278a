"""Groups of students trained at once by the first-order optimiser."""

import pytest
import torch

from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.warm_start import OPTIMISERS, Soap, warm_start
from distrecon.nets.activations import activation


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("broken", [torch.nan, 1e30])
def test_a_student_that_is_not_finite_stays_so_and_leaves_the_others_alone(optimiser, broken, generator):
    net = DenseNet((3, 6, 5, 2), activation("relu"))
    theta_NP = net.random(3, generator)
    x_QI = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    y_QO = net(net.random(1, generator), x_QI)[0]

    def trained(theta_NP):
        return warm_start(net, theta_NP, x_QI, y_QO, torch.Generator().manual_seed(1), optimiser, steps=60)

    alone_NP = trained(theta_NP[[0, 2]])
    theta_NP[1] *= broken
    found_NP = trained(theta_NP)
    assert not net.loss(found_NP, x_QI, y_QO)[1].isfinite()
    torch.testing.assert_close(found_NP[[0, 2]], alone_NP, rtol=1e-3, atol=1e-4)
    before_N, after_N = (net.loss(theta, x_QI, y_QO)[[0, 2]] for theta in (theta_NP, found_NP))
    assert (after_N < 0.5 * before_N).all()


def test_gradients_of_low_rank_with_units_that_are_off(generator):
    """For about one in five of these LAPACK's float32 eigenvectors do not converge, or are NaN."""

    def normal(*shape: int):
        return torch.randn(*shape, generator=generator)

    for rank in range(1, 9):
        for _ in range(5):
            on = torch.rand(2, 128, 1, generator=generator) < 0.5
            gradient = on * (3 * normal(2, 128, 1)).exp() * normal(2, 128, rank) @ normal(2, rank, 9)
            gradient /= gradient.abs().max()
            rule = Soap([gradient])
            (update,) = rule.updates([gradient])
            basis = rule.left_basis[0]
            unit = torch.eye(128).expand(2, -1, -1)
            torch.testing.assert_close(basis.transpose(1, 2) @ basis, unit, rtol=0, atol=1e-4)
            rotated = basis.transpose(1, 2) @ gradient @ gradient.transpose(1, 2) @ basis
            off_diagonal = rotated - rotated.diagonal(dim1=1, dim2=2).diag_embed()
            assert off_diagonal.abs().max() < 1e-4 * rotated.abs().max()
            assert update.isfinite().all()
