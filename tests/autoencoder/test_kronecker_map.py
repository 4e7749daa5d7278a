"""The Kronecker map: exact at full size, its metric the dense Kronecker product, bases of few columns complete."""

import pytest
import torch

from distrecon.autoencoder import Training, ZooSample, kronecker_map
from distrecon.autoencoder.kronecker_map import Sides, eigenbasis, eigenbasis_of_columns
from distrecon.images import load
from distrecon.nets import architecture
from tests.autoencoder.small import random_models, related_models, tiny

ARCH = architecture("cnn_small")
SIZES = ((3, 5), (2, 4))  # outputs and fan-in of two layers of no network in particular
PARAMETERS = 23


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed):
    root = random(size, size, seed=seed) * torch.linspace(0.1, 2, size, dtype=torch.float64)
    return root @ root.T


@pytest.fixture(scope="module")
def moments():
    """S and A of each layer."""
    return [(moment(o, 10 * i), moment(f, 10 * i + 1)) for i, (o, f) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def layers(moments):
    return [Sides(eigenbasis(s), eigenbasis(a)) for s, a in moments]


def sample(count, seed=5):
    return [random(count, *size, seed=seed + i) for i, size in enumerate(SIZES)]


def flat(matrices):
    return torch.cat([m.flatten(1) for m in matrices], 1)


def rebuilt(tensors, matrices):
    z_BZ = kronecker_map.compress(tensors, kronecker_map.coordinates(tensors, matrices))
    return z_BZ, kronecker_map.matrices(tensors, kronecker_map.expand(tensors, z_BZ))


def dense(moments, damping):
    """The metric [P, P] written out."""
    damped = [[m + damping * m.diagonal().mean() * torch.eye(len(m)).double() for m in pair] for pair in moments]
    return torch.block_diag(*(torch.kron(s, a) for s, a in damped))


def test_lengths_in_coordinates_are_those_of_the_dense_metric(layers, moments):
    models = sample(7)
    tensors = kronecker_map.fit(layers, models, 5, 0.1)
    difference_BP = flat(models) - flat(models).mean(0)
    expected_B = ((difference_BP @ dense(moments, 0.1)) * difference_BP).sum(1)
    torch.testing.assert_close(kronecker_map.coordinates(tensors, models).square().sum(1), expected_B)


@pytest.mark.parametrize("count", [1, 4, 60])
def test_with_room_for_all_coordinates_other_models_come_back(layers, count):
    tensors = kronecker_map.fit(layers, sample(count), 100, 0.01)
    others = sample(3, seed=50)
    z_BZ, back = rebuilt(tensors, others)
    assert z_BZ.shape == (3, PARAMETERS)
    torch.testing.assert_close(flat(back), flat(others))


def test_many_models_give_the_principal_components_of_the_metric(layers, moments):
    """No linear map leaves less: the least squares of numpy's kind, by the singular values of L^T x."""
    models = [m * scale for m, scale in zip(sample(60), (1.0, 3.0), strict=True)]
    tensors = kronecker_map.fit(layers, models, 6, 0.1)
    _, back = rebuilt(tensors, models)
    root_PP = torch.linalg.cholesky(dense(moments, 0.1))
    left_BP = (flat(back) - flat(models)) @ root_PP
    singular = torch.linalg.svdvals((flat(models) - flat(models).mean(0)) @ root_PP)
    torch.testing.assert_close(left_BP.square().sum(), singular[6:].square().sum())


@pytest.mark.parametrize("seed", range(6))
def test_few_models_give_the_coordinates_of_most_variance_and_the_rest_is_the_mean(layers, seed):
    models = sample(4, seed)
    tensors = kronecker_map.fit(layers, models, 6, 0.1)
    others = sample(3, seed=50)
    y_BP = kronecker_map.coordinates(tensors, others)
    _, back = rebuilt(tensors, others)
    kept = torch.zeros(PARAMETERS, dtype=torch.bool)
    kept[tensors["kept_Z"]] = True
    assert int(kept.sum()) == 6
    torch.testing.assert_close(kronecker_map.coordinates(tensors, back), torch.where(kept, y_BP, 0.0))
    # a layer's mean variance counts as ten models beside the sample's own
    own = [s.turn(m - m.mean(0)).square().mean(0) for s, m in zip(layers, models, strict=True)]
    drawn = torch.cat([((4 * v + 10 * v.mean()) / 14).flatten() for v in own]) * tensors["scale_P"].square()
    assert drawn[kept].min() > drawn[~kept].max()


def test_a_basis_of_few_columns_is_orthogonal_and_leads_with_theirs():
    columns_DN = random(12, 4)
    few, whole = eigenbasis_of_columns(columns_DN), eigenbasis(columns_DN @ columns_DN.T / 4)
    turned = few.turn(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(turned.T @ turned, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(few.values_D, whole.values_D, atol=1e-12, rtol=1e-9)
    vectors = random(5, 12, seed=3)
    torch.testing.assert_close(few.turn(vectors)[:, :4].abs(), whole.turn(vectors)[:, :4].abs())
    torch.testing.assert_close(few.back(few.turn(vectors)), vectors)
    many = eigenbasis_of_columns(random(3, 50))
    torch.testing.assert_close(many.values_D, eigenbasis(random(3, 50) @ random(3, 50).T / 50).values_D)


@pytest.mark.parametrize("count", [4, 60])
def test_flat_noise_goes_where_weights_move_most_for_the_outputs(layers, count):
    tensors = kronecker_map.fit(layers, sample(count), 6, 0.1)
    eye_ZZ = torch.eye(6, dtype=torch.float64)
    y_ZP = kronecker_map.expand(tensors, eye_ZZ / tensors["scale_Z"])
    decoder_ZP = flat(kronecker_map.matrices(tensors, y_ZP)) - flat([tensors[f"center{i}_OF"][None] for i in (0, 1)])
    torch.testing.assert_close(kronecker_map.flattened(tensors, eye_ZZ), decoder_ZP @ decoder_ZP.T)


# -- as a coder -------------------------------------------------------------------------------------------------------


def coder(kind="kronecker_pca", latent=10, models=24):
    zoo = ZooSample(ARCH, related_models(ARCH, models).double(), load("digits"))
    settings = {"model__fisher_models": 8, "model__fisher_queries": 8, "optim__precision": "float64"}
    return Training(tiny(model__kind=kind, model__latent=latent, data__align=False, **settings), [zoo], 1).autoencoder


def test_the_coder_is_the_map_in_weights():
    autoencoder, others = coder(), random_models(ARCH, 3, first_seed=500).double()
    tensors = autoencoder.statistics[0].tensors
    z_BZ, back = rebuilt(tensors, ARCH.table.as_matrices(others))
    assert autoencoder.latent_shape() == (10 * ARCH.num_tokens,)
    torch.testing.assert_close(autoencoder.encode(others), z_BZ)
    torch.testing.assert_close(autoencoder.decode(z_BZ), ARCH.table.of_matrices(back))


def test_the_coder_is_exact_at_full_size_with_a_sample_of_two():
    whole = coder(latent=ARCH.num_parameters // ARCH.num_tokens + 1, models=2)
    others = random_models(ARCH, 3, first_seed=500).double()
    torch.testing.assert_close(whole.decode(whole.encode(others)), others)


def test_the_residual_starts_from_the_map():
    others = random_models(ARCH, 3, first_seed=500).double()
    plain, corrected = coder(), coder("kronecker_residual")
    torch.testing.assert_close(corrected.encode(others), plain.encode(others))
    torch.testing.assert_close(corrected.decode(corrected.encode(others)), plain.decode(plain.encode(others)))


def test_a_network_of_one_layer_comes_back_and_other_layers_are_refused(layers):
    tensors = kronecker_map.fit(layers[:1], sample(4)[:1], 100, 0.01)
    others = sample(3, seed=50)[:1]
    torch.testing.assert_close(rebuilt(tensors, others)[1][0], others[0])
    with pytest.raises(ValueError, match="zip"):
        kronecker_map.fit(layers, [*sample(4), random(4, 2, 2)], 100, 0.01)
