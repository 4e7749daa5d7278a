"""The map's coordinates against a plain eigendecomposition, and what it says of the share of variance."""

import numpy as np
import torch

from distrecon.autoencoder.latent_map import MODELS, latent_map


def test_coordinates_and_shares_are_those_of_the_covariance():
    draw = torch.Generator().manual_seed(0)
    scale_F = torch.tensor([5.0, 2.0, 0.5, 0.1])
    z_BF = 3 + torch.randn(200, 4, generator=draw) * scale_F
    other_BF = 3 + torch.randn(7, 4, generator=draw) * scale_F
    accuracy_B = torch.rand(207, generator=draw)
    made = latent_map({"train": (z_BF.view(200, 2, 2), accuracy_B[:200]), "new": (other_BF, accuracy_B[200:])})

    train, new = z_BF.double().numpy(), other_BF.double().numpy()
    variances, axes = np.linalg.eigh(np.cov(train.T))
    np.testing.assert_allclose(made["map/share"], variances[:-3:-1] / variances.sum(), rtol=1e-4)
    for name, rows in (("train", train), ("new", new)):
        expected = (rows - train.mean(0)) @ axes[:, :-3:-1]
        np.testing.assert_allclose(np.abs(made[f"map/{name}"][:, :2]), np.abs(expected), atol=1e-3)
    np.testing.assert_array_equal(made["map/new"][:, 2], accuracy_B[200:])


def test_large_sets_are_thinned_evenly_and_one_number_is_a_line():
    z_BF = torch.arange(3.0 * MODELS)[:, None]
    made = latent_map({"train": (z_BF, z_BF[:, 0])})["map/train"]
    assert made.shape == (MODELS, 3)
    assert (made[0, 2], made[-1, 2]) == (0, 3 * MODELS - 1)
    assert np.ptp(made[:, 1]) == 0
