"""The coder of activations: exact where nothing is left out, the same walk in encoder and decoder, best components."""

import pytest
import torch

from distrecon.autoencoder import Training, ZooSample
from distrecon.autoencoder.activation_pca import allocate
from distrecon.images import load
from distrecon.nets import architecture, kronecker, outputs
from tests.autoencoder.small import random_models, related_models, tiny

ARCH = architecture("cnn_small")
SETTINGS = {"model__kind": "activation_pca", "model__fisher_models": 8, "model__fisher_queries": 8}


def coder(latent, align=False, precision="float64", **settings):
    zoo = ZooSample(ARCH, related_models(ARCH, 24).double(), load("digits"))
    config = tiny(model__latent=latent, data__align=align, optim__precision=precision, **SETTINGS, **settings)
    return Training(config, [zoo], 1).autoencoder


@pytest.fixture(scope="module")
def small():
    return coder(10)


@pytest.fixture(scope="module")
def others():
    """Models that the zoo has never seen."""
    return random_models(ARCH, 6, first_seed=500).double()


def test_with_room_for_all_components_weights_come_back(others):
    whole = coder(ARCH.num_parameters // ARCH.num_tokens + 1)
    assert whole.latent_shape() == (ARCH.num_parameters,)
    torch.testing.assert_close(whole.decode(whole.encode(others)), others, rtol=1e-9, atol=1e-9)


def test_float32_comes_close(others):
    whole = coder(ARCH.num_parameters // ARCH.num_tokens + 1, precision="float32")
    torch.testing.assert_close(whole.decode(whole.encode(others.float())), others.float(), rtol=1e-4, atol=1e-4)


def test_encoding_a_reconstruction_gives_its_latents_back(small, others):
    z_BZ = small.encode(others)
    torch.testing.assert_close(small.encode(small.decode(z_BZ)), z_BZ, rtol=1e-6, atol=1e-6)


def test_models_do_not_mix(small, others):
    z_BZ = small.encode(others)
    torch.testing.assert_close(torch.cat([small.encode(others[:1]), small.encode(others[1:])]), z_BZ)
    torch.testing.assert_close(torch.cat([small.decode(z_BZ[:1]), small.decode(z_BZ[1:])]), small.decode(z_BZ))
    assert small.encode(others[:0]).shape == (0, *small.latent_shape())
    assert small.decode(z_BZ[:0]).shape == (0, ARCH.num_parameters)


def test_the_components_are_those_of_what_each_decoded_layer_reads(small, others):
    """What is left out of each layer is what the decoded layers below hardly show it: the least eigenvalues' share."""
    decoded = small.decode(small.encode(others))
    read = [layer.inputs for layer in kronecker.factors(ARCH, decoded, small.fitted(0, "queries")[:200])]
    center = ARCH.table.as_matrices(small.fitted(0, "center_P")[None])
    pairs = zip(ARCH.table.as_matrices(others), ARCH.table.as_matrices(decoded), strict=True)
    for i, (full_BOF, kept_BOF) in enumerate(pairs):
        count = small.fitted(0, f"basis{i}_FK").shape[1]
        own_BFF = torch.lerp(read[i], small.fitted(0, f"moment{i}_FF"), small.config.model.activation_shared)
        space = (
            torch.linalg.eigh(own_BFF).eigenvectors[:, :, -count:]
            if count
            else full_BOF.new_zeros(6, own_BFF.shape[1], 0)
        )
        expected = (full_BOF - center[i]) @ space @ space.transpose(1, 2) + center[i]
        torch.testing.assert_close(kept_BOF, expected, rtol=1e-6, atol=1e-6)


def test_more_latents_bring_the_outputs_closer(others):
    queries = load("digits").test.images[:100].double()
    errors = []
    for latent in (6, 12, 18, 24):
        autoencoder = coder(latent)
        rebuilt = autoencoder.decode(autoencoder.encode(others))
        errors.append(float((outputs(ARCH, rebuilt, queries) - outputs(ARCH, others, queries)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_alignment_comes_first(others):
    autoencoder = coder(10, align=True)
    aligned = autoencoder.canonical(others, 0)
    torch.testing.assert_close(autoencoder.encode(aligned), autoencoder.encode(others), rtol=1e-6, atol=1e-6)


def test_the_decoder_is_differentiable_in_the_last_layers_latents(small, others):
    """Its components depend on the layers below alone, so the gradient is exact there."""
    z_BZ = small.encode(others[:1])
    last = ARCH.num_outputs * small.fitted(0, "basis3_FK").shape[1]
    assert last
    z_BZ.requires_grad_(True)
    weights_P = torch.randn(ARCH.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    (grad_BZ,) = torch.autograd.grad((small.decode(z_BZ) @ weights_P).sum(), z_BZ)
    moved = z_BZ.detach().clone()
    moved[0, -1] += 1
    change = (small.decode(moved) - small.decode(z_BZ)).detach() @ weights_P
    torch.testing.assert_close(change[0], grad_BZ[0, -1])


def test_components_are_kept_by_value_while_they_fit():
    values = [torch.tensor([9.0, 1.0]), torch.tensor([5.0, 4.0, 3.0])]
    assert allocate(values, [10, 4], 22) == [1, 3]
    assert allocate(values, [10, 4], 17) == [1, 1]
    assert allocate(values, [10, 4], 9) == [0, 2]  # the most valuable one is too large; smaller ones still fit


def test_flat_noise_goes_where_weights_move_much_and_outputs_little(small, others):
    """D^T D noise, D the derivative of the weights by the latents in the behavioural scale, bases held."""
    jacobian_PZ = torch.autograd.functional.jacobian(lambda z_BZ: small.decode(z_BZ)[0], small.encode(others[:1]))[:, 0]
    decoder_PZ = jacobian_PZ / small.coder.behavioral_scale(0)
    noise_BZ = torch.randn(3, decoder_PZ.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = noise_BZ @ (decoder_PZ.T @ decoder_PZ)
    torch.testing.assert_close(small.coder.flat_noise(noise_BZ, 0), expected, rtol=1e-6, atol=1e-8)
