"""Queries drawn from a set of images: where they lie."""

import pytest
import torch

from distrecon.images.queries import _gaussian, _uniform


def test_uniform_queries_fill_the_images_range():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 4, 4, generator=draw) * 3 - 1
    images[0, 0, 0, :2] = torch.tensor([-1.0, 2.0])
    drawn = _uniform(images, 500, draw)
    assert drawn.shape == (500, 1, 4, 4)
    assert -1 <= float(drawn.min()) < -0.99
    assert 1.99 < float(drawn.max()) <= 2
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03)


def test_gaussian_queries_have_each_pixels_mean_and_deviation():
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(400, 2, generator=draw) * torch.tensor([1.0, 3.0]) + torch.tensor([5.0, -2.0])
    drawn = _gaussian(images, 20_000, draw)
    torch.testing.assert_close(drawn.mean(0), images.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), images.std(0), atol=0.06, rtol=0)
