"""The coders: what may influence what, shapes, zoos, refinement, storage."""

import json

import pytest
import torch

from distrecon.autoencoder import Batch, Training, ZooSample, load_autoencoder, save_autoencoder
from distrecon.autoencoder.coder import Coder
from distrecon.autoencoder.coders import CODERS
from distrecon.errors import UserError
from distrecon.images.queries import query_pool
from distrecon.nets import architecture, outputs, permute, random_permutation
from tests.autoencoder.small import random_models, tiny

KINDS = ("transformer", "fisher_residual", "fisher_pca", "kronecker_residual")
FISHER = {"model__latent": 1, "model__fisher_models": 8, "model__fisher_queries": 4}


def many(arch, count=48):
    return random_models(arch, count)


@pytest.fixture(scope="module")
def trained(arch, images):
    """Untrained autoencoders of each kind."""
    sample = ZooSample(arch, many(arch), images)
    return {
        kind: Training(tiny(model__kind=kind, **(FISHER if kind != "transformer" else {})), [sample], 1).autoencoder
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_a_batch_do_not_mix(trained, kind, theta_BP):
    autoencoder = trained[kind]
    with torch.no_grad():
        together = autoencoder.decode(autoencoder.encode(theta_BP[:5]))
        alone = torch.cat([autoencoder.decode(autoencoder.encode(theta_BP[i : i + 1])) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_passes(trained, kind, theta_BP):
    autoencoder = trained[kind]
    z = autoencoder.encode(theta_BP[:0])
    assert tuple(z.shape) == (0, *autoencoder.latent_shape())
    assert autoencoder.decode(z).shape == (0, autoencoder.architectures[0].num_parameters)


def test_tokens_of_a_model_see_each_other(trained, theta_BP):
    coder = trained["transformer"].coder
    x_BP = theta_BP[:1].clone()
    before = coder.encode(x_BP, 0)
    x_BP[0, 0] += 1  # the first token
    assert (coder.encode(x_BP, 0) - before)[0, -1].abs().max() > 1e-5  # moves the last token's latent


def test_padding_is_dead(trained, arch, theta_BP, images):
    """No gradient reaches what the detokeniser writes into padding, and padding of the longest zoo changes nothing."""
    coder = trained["transformer"].coder
    z = coder.encode(theta_BP[:2], 0).detach()
    loss = coder.decode(z, 0).square().sum()
    gradient = torch.autograd.grad(loss, coder.detokeniser.bias)[0]
    assert (gradient[arch.token_mask_TD.any(0)] != 0).all()
    longer = architecture("mlp", sizes=(64, 3, 10))
    sample = ZooSample(longer, random_models(longer, 4), images)
    both = Training(tiny(), [ZooSample(arch, theta_BP, sample.images), sample], 1).autoencoder
    loss = both.coder.decode(z.new_zeros(2, *both.latent_shape(0)), 0).square().sum()
    gradient = torch.autograd.grad(loss, both.coder.detokeniser.bias)[0]
    assert (gradient[arch.token_size :] == 0).all()


def test_zoo_is_chosen_by_size_or_named(arch, theta_BP, images):
    small, twin = architecture("mlp", sizes=(64, 4, 10)), architecture("mlp", sizes=(64, 4, 10), activation="relu")
    theta_small = random_models(small, 4)
    zoos = [ZooSample(a, t, images) for a, t in ((arch, theta_BP), (small, theta_small), (twin, theta_small))]
    autoencoder = Training(tiny(data__align=False, data__views="permutation"), zoos, 1).autoencoder
    assert autoencoder.encode(theta_BP).shape[1] == arch.num_tokens
    with pytest.raises(UserError, match="several architectures"):
        autoencoder.encode(theta_small)
    torch.testing.assert_close(autoencoder.encode(theta_small, zoo=2), autoencoder.encode(theta_small, zoo=twin))
    with pytest.raises(UserError, match="fit no architecture"):
        autoencoder.encode(theta_BP[:, :-1])
    with pytest.raises(UserError, match="3 zoos"):
        autoencoder.encode(theta_BP, zoo=3)


def test_weights_that_are_not_finite_are_named(trained, theta_BP):
    broken_BP = theta_BP[:3].clone()
    broken_BP[2, 7] = float("nan")
    with pytest.raises(UserError, match="model 2"):
        trained["transformer"].encode(broken_BP)


def test_aligned_models_have_one_latent_whatever_their_order(trained, arch):
    autoencoder, draw = trained["transformer"], torch.Generator().manual_seed(0)
    reference_P = autoencoder.statistics[0]["reference_P"]
    theta_BP = reference_P + 0.02 * torch.randn(6, arch.num_parameters, generator=draw)  # so that matching is unique
    permuted_BP = permute(arch, theta_BP, random_permutation(arch, draw, 6))
    torch.testing.assert_close(autoencoder.encode(permuted_BP), autoencoder.encode(theta_BP), rtol=1e-4, atol=1e-5)
    raw = autoencoder.coder.encode(autoencoder.standardise(permuted_BP, 0), 0)
    assert (raw - autoencoder.encode(theta_BP)).abs().max() > 1e-2  # without alignment they differ


@pytest.mark.parametrize("kind", ["fisher_pca", "transformer"])
def test_refinement_approaches_the_outputs_and_more_steps_more(trained, kind, theta_BP):
    autoencoder = trained[kind]
    arch, queries = autoencoder.architectures[0], autoencoder.statistics[0]["queries"]
    target = outputs(arch, theta_BP[:6], queries).log_softmax(2)

    def gap(steps):
        with torch.no_grad():
            rebuilt = autoencoder.decode(autoencoder.encode(theta_BP[:6], refine=steps))
        return torch.nn.functional.kl_div(
            outputs(arch, rebuilt, queries).log_softmax(2), target, log_target=True, reduction="batchmean"
        )

    gaps = [float(gap(k)) for k in (0, 20, 60)]
    assert gaps[0] > gaps[2]
    assert gaps[1] > gaps[2]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(trained, kind, theta_BP, tmp_path):
    save_autoencoder(tmp_path, trained[kind])
    loaded = load_autoencoder(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode(theta_BP), trained[kind].encode(theta_BP))
    assert loaded.config == trained[kind].config
    assert loaded.architectures == trained[kind].architectures


def test_loading_says_what_is_wrong(trained, tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.json is missing"):
        load_autoencoder(tmp_path / "nowhere")
    save_autoencoder(tmp_path, trained["transformer"])
    description = tmp_path / "autoencoder.json"
    data = json.loads(description.read_text())
    description.write_text(json.dumps(data | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        load_autoencoder(tmp_path)
    description.write_text(json.dumps(data | {"format": "something"}))
    with pytest.raises(UserError, match="does not describe"):
        load_autoencoder(tmp_path)
    description.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_autoencoder(tmp_path)
    description.write_text(json.dumps(data | {"config": data["config"] | {"model.width": 24}}))
    with pytest.raises(UserError, match="does not belong"):
        load_autoencoder(tmp_path)
    for damaged in ({k: v for k, v in data.items() if k != "architectures"}, data | {"architectures": [{"name": "x"}]}):
        description.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"autoencoder\.json is damaged"):
            load_autoencoder(tmp_path)
    (tmp_path / "autoencoder.safetensors").write_bytes(b"no tensors")
    description.write_text(json.dumps(data))
    with pytest.raises(UserError, match="cannot be read"):
        load_autoencoder(tmp_path)


def test_query_sets(arch, images):
    train = images.train.images
    for name in ("data", "uniform", "gaussian", "patches", "digits", "data+uniform", "data+gaussian+patches"):
        pool = query_pool(name, images, arch, 30, seed=3)
        assert pool.shape == (30, 1, 8, 8), name
        assert torch.equal(pool, query_pool(name, images, arch, 30, seed=3)), name
        assert not torch.equal(pool, query_pool(name, images, arch, 30, seed=4)), name
    uniform = query_pool("uniform", images, arch, 2000)
    assert uniform.min() >= train.min()
    assert uniform.max() <= train.max()
    gaussian = query_pool("gaussian", images, arch, 4000)
    torch.testing.assert_close(gaussian.mean(0), train.mean(0), rtol=0, atol=0.1)
    union = query_pool("data+uniform", images, arch, 31, seed=0)
    real = (union[:, None] == train[None]).flatten(2).all(2).any(1)
    assert real.sum() == 16
    assert query_pool("data", images, architecture("mlp", sizes=(64, 3, 10)), 5).shape == (5, 64)
    with pytest.raises(UserError, match=r"data\.query_set: 'datta'.*'data'"):
        query_pool("datta", images, arch, 5)
    with pytest.raises(UserError, match=r"\(1, 8, 8\).*cnn3 reads \(3, 32, 32\)"):
        query_pool("data", images, architecture("cnn3"), 5)


class Shrinking(Coder):
    """The smallest coder: the sample's largest standardised weights [Z] of each model; it has one learned number."""

    @staticmethod
    def fit(config, arch, theta_BP, mean_P, std_P, queries):
        largest = ((theta_BP - mean_P) / std_P).square().sum(0).topk(config.latent).indices
        return {"kept_Z": largest}

    def __init__(self, config, architectures, fitted):
        super().__init__(config, architectures, fitted)
        self.factor = torch.nn.Parameter(torch.ones(()))

    def latent_shape(self, zoo):
        return (self.config.latent,)

    def encode(self, x_BP, zoo):
        return self.factor * x_BP[:, self.fitted[zoo]["kept_Z"]]

    def decode(self, z_BZ, zoo):
        x_BP = z_BZ.new_zeros(len(z_BZ), self.architectures[zoo].num_parameters)
        return x_BP.index_copy(1, self.fitted[zoo]["kept_Z"], z_BZ)

    def project(self, z_BZ, zoo):
        return z_BZ


def test_a_new_coder_is_a_class_and_an_entry(zoo, theta_BP, tmp_path, monkeypatch):
    monkeypatch.setitem(CODERS, "shrinking", Shrinking)
    training = Training(tiny(model__kind="shrinking"), [zoo], 3)
    for step in range(3):
        training.step(Batch(0, step, 0, torch.arange(6), theta_BP[:6], 6, 0))
    autoencoder = training.autoencoder
    assert autoencoder.coder.factor.item() != 1.0
    z = autoencoder.encode(theta_BP[:4], refine=2)
    assert z.shape == (4, 4)
    rebuilt_BP = autoencoder.decode(autoencoder.encode(theta_BP[:4]))
    canonical_BP = autoencoder.canonical(theta_BP[:4], 0)
    kept_Z = autoencoder.fitted(0, "kept_Z")
    expected = autoencoder.fitted(0, "mean_P")[kept_Z] + autoencoder.coder.factor.item() * (
        canonical_BP[:, kept_Z] - autoencoder.fitted(0, "mean_P")[kept_Z]
    )
    torch.testing.assert_close(rebuilt_BP[:, kept_Z], expected)
    save_autoencoder(tmp_path, autoencoder)
    torch.testing.assert_close(load_autoencoder(tmp_path).encode(theta_BP[:4], refine=2), z, rtol=0, atol=0)
