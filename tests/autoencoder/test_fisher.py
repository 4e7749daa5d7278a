"""The behavioural linear map against slow float64 references."""

import numpy as np
import pytest
import torch

from distrecon.autoencoder import Training, ZooSample, fisher
from distrecon.autoencoder.config import ModelConfig
from distrecon.errors import UserError
from distrecon.nets import architecture
from tests.autoencoder.small import random_models, tiny

ARCH = architecture("mlp", sizes=(4, 3, 3), activation="tanh")
CONFIG = ModelConfig(latent=1, fisher_models=5, fisher_queries=6, fisher_temperature=1.5, fisher_ridge=0.1)


@pytest.fixture(scope="module")
def case():
    """Models, their mean and deviation, inputs."""
    draw = torch.Generator().manual_seed(0)
    theta_BP = 2 * random_models(ARCH, 40).double()
    std_P = 0.5 + torch.rand(ARCH.num_parameters, generator=draw, dtype=torch.float64)
    return theta_BP, theta_BP.mean(0), std_P, torch.randn(6, 4, generator=draw, dtype=torch.float64)


def slow_metric(theta_BP, std_P, inputs):
    """mean_j of J^T (diag p - p p^T) J over its mean diagonal, plus ridge I, one model and input at a time."""
    count = ARCH.num_parameters
    total_PP = torch.zeros(count, count, dtype=torch.float64)
    for theta_P in theta_BP:
        own_PP = torch.zeros_like(total_PP)
        for x in inputs:
            function = lambda t, x=x: ARCH.forward(t[None], x[None])[0, 0]  # noqa: E731
            jacobian_CP = torch.autograd.functional.jacobian(function, theta_P) * std_P
            p_C = torch.softmax(function(theta_P) / CONFIG.fisher_temperature, 0)
            own_PP += jacobian_CP.T @ (torch.diag(p_C) - torch.outer(p_C, p_C)) @ jacobian_CP
        total_PP += own_PP / own_PP.diagonal().mean()
    return total_PP / len(theta_BP) + CONFIG.fisher_ridge * torch.eye(count, dtype=torch.float64)


def test_the_metric_is_gauss_newtons(case):
    theta_BP, _, std_P, inputs = case
    (found_PP,) = fisher.metric(ARCH, theta_BP[:5], std_P, inputs, fisher.blocks(ARCH, "global"), CONFIG)
    torch.testing.assert_close(found_PP, slow_metric(theta_BP[:5], std_P, inputs), rtol=1e-9, atol=1e-12)


def test_blocks_are_parts_of_the_whole_metric(case):
    theta_BP, _, std_P, inputs = case
    whole_PP = slow_metric(theta_BP[:5], std_P, inputs)
    layers = fisher.blocks(ARCH, "layer")
    for block, found_EE in zip(layers, fisher.metric(ARCH, theta_BP[:5], std_P, inputs, layers, CONFIG), strict=True):
        (index_E,) = block.index_NE
        torch.testing.assert_close(found_EE, whole_PP[index_E][:, index_E], rtol=1e-9, atol=1e-12)
    covered = torch.cat([block.index_NE.flatten() for block in fisher.blocks(ARCH, "token")])
    assert sorted(covered.tolist()) == list(range(ARCH.num_parameters))


def test_no_linear_map_keeps_more_of_the_metric(case):
    """Its reconstructions have the least error in the metric: PCA of L^T x, by numpy's SVD."""
    theta_BP, mean_P, std_P, inputs = case
    few = torch.linspace(0, len(theta_BP) - 1, 5).round().long()
    factor_PP = torch.linalg.cholesky(slow_metric(theta_BP[few], std_P, inputs)).T
    tensors = fisher.fit(CONFIG, ARCH, theta_BP, mean_P, std_P, inputs)
    x_BP = (theta_BP - mean_P) / std_P
    z_BZ = fisher.encode(tensors, x_BP)
    assert z_BZ.shape[1] == ARCH.num_tokens == fisher.latent_size(tensors)
    torch.testing.assert_close(z_BZ.square().mean(0), torch.ones(z_BZ.shape[1], dtype=torch.float64))
    error_BP = (fisher.decode(tensors, z_BZ) - x_BP) @ factor_PP.T
    singular = np.linalg.svd(((x_BP - x_BP.mean(0)) @ factor_PP.T).numpy(), compute_uv=False)
    assert float(error_BP.square().sum()) == pytest.approx(float((singular[z_BZ.shape[1] :] ** 2).sum()), rel=1e-8)
    expected_B = error_BP.square().sum(1) / ARCH.num_parameters
    torch.testing.assert_close(fisher.weighted(tensors, fisher.decode(tensors, z_BZ) - x_BP), expected_B)


def test_the_structural_metric_is_plain_pca(case):
    theta_BP, mean_P, std_P, inputs = case
    config = ModelConfig(latent=1, fisher_metric="structural")
    tensors = fisher.fit(config, ARCH, theta_BP, mean_P, std_P, inputs)
    x_BP = (theta_BP - mean_P) / std_P
    centred = (x_BP - x_BP.mean(0)).numpy()
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    kept = ARCH.num_tokens
    expected_BP = x_BP.mean(0) + torch.from_numpy((u[:, :kept] * s[:kept]) @ v[:kept])
    torch.testing.assert_close(fisher.decode(tensors, fisher.encode(tensors, x_BP)), expected_BP)


def test_latents_go_where_the_variance_is():
    assert fisher.split_budget([np.array([9.0, 1.0]), np.array([5.0, 4.0, 0.5])], [1, 1], 3) == [1, 2]
    assert fisher.split_budget([np.array([9.0, 8.0]), np.array([5.0])], [4, 1], 6) == [1, 1]  # copies cost


def test_a_matrix_too_large_is_refused_and_a_finer_one_named():
    with pytest.raises(UserError, match=r"'global' needs a 10853 x 10853 matrix for cnn3; set it to layer"):
        fisher.blocks(architecture("cnn3"), "global")


def test_refinement_steps_are_equal_in_the_behavioural_metric(arch, images):
    """A latent that changes the outputs little moves further, by the scale that the coder gives it."""
    config = tiny(model__kind="fisher_pca", model__latent=1, model__fisher_models=8, model__fisher_queries=4)
    theta_BP = random_models(arch, 48)
    autoencoder = Training(config, [ZooSample(arch, theta_BP, images)], 1).autoencoder
    z_BZ = autoencoder.encode(theta_BP[:2])
    moved_BZ = (autoencoder.encode(theta_BP[:2], refine=1, refiner="adam") - z_BZ) * autoencoder.coder.behavioral_scale(
        0
    )
    for moved_Z in moved_BZ.abs():  # Adam's first step has one size in every direction
        torch.testing.assert_close(moved_Z, moved_Z.median().expand_as(moved_Z), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["global", "token"])
def test_flat_noise_goes_where_weights_move_most_for_the_outputs(case, kind):
    theta_BP, mean_P, std_P, inputs = case
    config = ModelConfig(latent=2, fisher_models=5, fisher_queries=6, fisher_blocks=kind)
    tensors = fisher.fit(config, ARCH, theta_BP, mean_P, std_P, inputs)
    size = fisher.latent_size(tensors)
    eye_ZZ = torch.eye(size, dtype=torch.float64)
    decoder_ZP = fisher.decode(tensors, eye_ZZ / tensors["scale_Z"]) - tensors["center_P"]  # of a unit of behaviour
    torch.testing.assert_close(fisher.flattened(tensors, eye_ZZ), decoder_ZP @ decoder_ZP.T)
