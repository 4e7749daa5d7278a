"""Samplers by their moments, distances and supports."""

import pytest
import torch

from distrecon.autoencoder import samplers
from distrecon.errors import UserError


def cloud():
    draw = torch.Generator().manual_seed(3)
    return torch.randn(60, 2, 4, generator=draw) * torch.tensor([3.0, 1.0, 0.1, 0.0])


def _after_noise(*shape):
    """A sampler's generator once its noise is drawn, before it picks good models."""
    generator = torch.Generator().manual_seed(0)
    torch.randn(*shape, generator=generator)
    return generator


def test_joint_kde_stays_near_good_models_by_its_bandwidth():
    good = cloud()
    flat = good.flatten(1)
    unit = samplers.nearest_distance(flat)
    slow = sorted(min(float((a - b).norm()) for j, b in enumerate(flat) if j != i) for i, a in enumerate(flat))
    assert float(unit) == pytest.approx(slow[29], rel=1e-4)
    for bandwidth in (0.2, 1.0):
        drawn = samplers.sample("joint_kde", good, 4000, bandwidth).flatten(1)
        noise = drawn - flat[torch.randint(60, (4000,), generator=_after_noise(4000, 60))]
        assert noise.norm(dim=1).mean() == pytest.approx(float(bandwidth * unit), rel=0.05)
        assert noise[:, 3].abs().max() == 0  # no noise where good models do not vary
    assert samplers.sample("joint_kde", good, 5, 1.0, seed=1).shape == (5, 2, 4)


def test_gaussian_has_the_moments_of_the_good_models():
    good = cloud().flatten(1)
    drawn = samplers.sample("gaussian", good, 20000, 0.5)
    torch.testing.assert_close(drawn.mean(0), good.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), 0.25 * torch.cov(good.T), rtol=0.05, atol=0.08)


def test_isotropic_kde_has_equal_noise_in_all_directions():
    good = cloud().flatten(1)
    drawn = samplers.sample("isotropic_kde", good, 4000, 0.5)
    draw = torch.Generator().manual_seed(0)
    torch.randn(4000, 8, generator=draw)  # the sampler draws its noise first
    noise = drawn - good[torch.randint(60, (4000,), generator=draw)]
    assert noise.norm(dim=1).mean() == pytest.approx(float(0.5 * samplers.nearest_distance(good)), rel=1e-4)
    torch.testing.assert_close(noise.std(0) / noise.std(), torch.ones(8), rtol=0.05, atol=0)


def test_flat_kde_has_noise_of_the_given_shape_and_of_the_same_length():
    good = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    widths = torch.arange(1.0, 9.0)
    drawn = samplers.sample("flat_kde", good, 3000, 0.5, shape=lambda noise: widths * noise)
    centres = good[torch.randint(30, (3000,), generator=_after_noise(3000, 8))]
    noise = drawn - centres
    torch.testing.assert_close(noise.std(0) / noise.std(0)[0], widths, rtol=0.06, atol=0)
    length = noise.norm(dim=1).mean() / samplers.nearest_distance(good)
    assert float(length) == pytest.approx(0.5, rel=1e-4)
    isotropic = samplers.sample("isotropic_kde", good, 50, 0.5)
    assert torch.equal(
        samplers.sample("flat_kde", good, 50, 0.5), isotropic
    )  # of a coder that knows no flat directions


def test_interpolation_stays_between_two_good_models():
    good = torch.eye(5)
    drawn = samplers.sample("interpolation", good, 50, 1.0)
    assert ((drawn > 1e-9).sum(1) <= 2).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(50))
    assert (drawn.amax(1) >= 0.5).all()


def test_dimension_kde_breaks_dependence_and_joint_kde_keeps_it():
    line = torch.linspace(-1, 1, 200)[:, None].expand(-1, 2)
    apart = samplers.sample("dimension_kde", line, 2000, 0.1)
    together = samplers.sample("joint_kde", line, 2000, 0.1)
    assert torch.corrcoef(apart.T)[0, 1].abs() < 0.1
    assert torch.corrcoef(together.T)[0, 1] > 0.999


def test_samplers_say_what_they_need():
    with pytest.raises(UserError, match="did you mean 'gaussian'"):
        samplers.sample("gausian", torch.eye(5), 3)
    with pytest.raises(UserError, match="at least 3 good models"):
        samplers.sample("gaussian", torch.eye(2), 3)
