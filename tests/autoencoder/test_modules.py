"""Autoencoders of torch modules: pieces of rows, windows of tokens, statistics measured again, files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distrecon.autoencoder import Training, ZooSample, run_tasks
from distrecon.autoencoder.store import load_autoencoder, save_autoencoder
from distrecon.errors import UserError
from distrecon.images import load
from distrecon.nets import ModuleArchitecture, initialise, permute, random_permutation
from distrecon.nets.trace import of_module
from distrecon.zoos.models import Batch
from examples.small_resnet import Block
from tests.autoencoder.small import as_models, tiny


class Net(torch.nn.Module):
    """Small enough for a test: batch normalisation, a residual block, another after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(1, 3, 3, 2, bias=False), torch.nn.BatchNorm2d(3)
        self.blocks, self.fc = torch.nn.Sequential(Block(3, 3, 1), Block(3, 4, 2)), torch.nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.blocks(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def images():
    return load("digits")


@pytest.fixture(scope="module")
def arch(images) -> ModuleArchitecture:
    return of_module(Net(), images.train.images[:4], make=Net)


@pytest.fixture(scope="module")
def theta_BP(arch):
    torch.manual_seed(0)
    one = initialise(arch, ["module"], [0])
    return initialise(arch, ["module"] * 24, range(24)) * 0.3 + one * 0.7


def batch(theta_BP, step=0):
    rows = torch.arange(len(theta_BP))
    return Batch(zoo=0, epoch=0, step=step, global_size=len(rows), offset=0, row_b=rows, theta_bP=theta_BP, last=False)


@pytest.mark.parametrize("settings", [{}, {"model__token_size": 10}, {"model__token_size": 10, "model__window": 7}])
def test_training_and_files(arch, images, theta_BP, settings, tmp_path):
    config = tiny(**settings)
    training = Training(config, [ZooSample(arch, theta_BP[:16], images)], 12)
    first, *_, last = [training.step(batch(theta_BP[:16], step)) for step in range(12)]
    assert last["loss/structural"] < first["loss/structural"]
    autoencoder = training.autoencoder
    save_autoencoder(tmp_path, autoencoder)
    loaded = load_autoencoder(tmp_path)
    z = autoencoder.encode(theta_BP[:2])
    assert torch.equal(loaded.encode(theta_BP[:2]), z)
    assert torch.equal(loaded.decode(z), autoencoder.decode(z))
    with pytest.raises(UserError, match="--module"):
        loaded.encode(theta_BP[:2], refine=1)
    loaded.adopt(0, arch)
    assert loaded.encode(theta_BP[:2], refine=1).isfinite().all()


def test_the_tasks_measure_statistics_again(arch, images, theta_BP):
    config = tiny(model__token_size=10, model__window=7, tasks__remeasure=64, tasks__refine=1)
    autoencoder = Training(config, [ZooSample(arch, theta_BP[:16], images)], 12).autoencoder
    splits = [as_models(arch, theta_BP[a:b], images, a) for a, b in ((0, 14), (14, 19), (19, 24))]
    found = run_tasks(autoencoder, *splits, images, config)
    assert all(np.isfinite(value) for value in found.metrics.values())
    for name in ("reconstruct/remeasured/agreement", "generate/remeasured/accuracy_mean", "predict/test_accuracy_r2"):
        assert name in found.metrics
    for theta_P in found.generated_theta_BP:
        Net().load_state_dict(arch.unflatten(theta_P))  # strictly


def test_windows_see_nothing_of_each_other(arch, images, theta_BP):
    config = tiny(model__token_size=10, model__window=7, data__align=False)
    autoencoder = Training(config, [ZooSample(arch, theta_BP[:16], images)], 1).autoencoder
    own, coder = autoencoder.architectures[0], autoencoder.coder
    spans = coder.spans(0)
    assert [s.start for s in spans] == [*range(0, own.num_tokens, 7)]
    x_BP = torch.randn(2, arch.num_parameters)
    z_BTZ = coder.encode(x_BP, 0)
    for span in spans[:3]:
        torch.testing.assert_close(coder.encode_span(x_BP, 0, span), z_BTZ[:, span])
    other_BP = own.with_tokens(x_BP, torch.randn(2, 7, 10), spans[1])
    changed_T = (coder.encode(other_BP, 0) - z_BTZ).abs().amax((0, 2)) > 1e-6
    assert changed_T[spans[1]].all()
    assert int(changed_T.sum()) == 7
    changed_P = (other_BP != x_BP).any(0)
    inside = own.token_index_TD[spans[1]]
    assert set(changed_P.nonzero()[:, 0].tolist()) == set(inside[inside < arch.num_parameters].tolist())


def test_a_step_on_a_window_leaves_the_rest_of_the_model(arch, images, theta_BP):
    """The behavioural loss of a perfect window is zero, whatever the coder makes of the others."""
    config = tiny(model__token_size=10, model__window=7, data__align=False, data__views="none", loss__terms="S+B")
    training = Training(config, [ZooSample(arch, theta_BP[:16], images)], 1)
    coder, own = training.autoencoder.coder, training.autoencoder.architectures[0]
    kept = {}

    def encode_span(x_BP, zoo, span):
        kept["tokens"] = own.tokens_of(x_BP, span)
        return x_BP.new_zeros(len(x_BP), kept["tokens"].shape[1], 4, requires_grad=True)

    coder.encode_span, coder.decode_span = encode_span, lambda z, zoo, span: kept["tokens"] + 0 * z.sum()
    values = training.losses(batch(theta_BP[:4]))
    assert float(values["behavioral"].abs().max()) < 1e-9
    assert float(values["structural"].abs().max()) < 1e-9
    coder.decode_span = lambda z, zoo, span: kept["tokens"] + 1 + 0 * z.sum()
    values = training.losses(batch(theta_BP[:4]))
    torch.testing.assert_close(values["structural"], torch.ones(4))  # a mean over the window's numbers
    assert float(values["behavioral"].min()) > 0


def test_the_embedding_of_pieces_is_pooled_by_layer(arch, images, theta_BP):
    autoencoder = Training(tiny(model__token_size=10), [ZooSample(arch, theta_BP[:16], images)], 1).autoencoder
    features_BF = autoencoder.embed(theta_BP[:3])
    assert features_BF.shape == (3, len(arch.layer_names) * 2 * autoencoder.config.model.latent)


def test_permutation_views_of_modules_keep_functions(arch, images, theta_BP):
    config = tiny(data__views="permutation")
    training = Training(config, [ZooSample(arch, theta_BP[:16], images)], 2)
    assert training.step(batch(theta_BP[:8]))["loss/contrastive"] > 0
    orders = random_permutation(arch, torch.Generator().manual_seed(0), 8)
    a, b = theta_BP[:8], permute(arch, theta_BP[:8], orders)
    aligned = [training.autoencoder.canonical(t, 0) for t in (a, b)]
    inputs = images.test.images[:20]
    torch.testing.assert_close(arch.forward(aligned[0], inputs), arch.forward(b, inputs), rtol=1e-3, atol=1e-4)


def test_coders_of_chains_refuse_modules(arch, images, theta_BP):
    with pytest.raises(UserError, match="chains of layers"):
        Training(tiny(model__kind="activation_pca"), [ZooSample(arch, theta_BP[:16], images)], 1)


@pytest.mark.parametrize("kind", ["kronecker_pca", "kronecker_residual"])
def test_the_kronecker_coder_has_room_for_everything_or_what_matters(arch, images, theta_BP, kind, tmp_path):
    """With a latent as large as the model nothing is lost; with a small one, the directions that matter are kept."""
    config = tiny(model__kind=kind, model__latent=arch.token_size, data__align=False)
    autoencoder = Training(config, [ZooSample(arch, theta_BP[:16], images)], 1).autoencoder
    torch.testing.assert_close(
        autoencoder.decode(autoencoder.encode(theta_BP[16:])), theta_BP[16:], rtol=1e-3, atol=1e-4
    )
    save_autoencoder(tmp_path, autoencoder)
    z = autoencoder.encode(theta_BP[:2])
    torch.testing.assert_close(load_autoencoder(tmp_path).decode(z), autoencoder.decode(z))
    inputs, errors = images.train.images[:64], []
    for small in (kind, "fisher_pca"):
        settings = {"model__fisher_metric": "structural", "model__fisher_blocks": "layer"}
        config = tiny(model__kind=small, model__latent=1, data__align=False, **settings)
        autoencoder = Training(config, [ZooSample(arch, theta_BP[:16], images)], 1).autoencoder
        back_BP = autoencoder.decode(autoencoder.encode(theta_BP[16:])).detach()
        errors.append(float((arch.forward(back_BP, inputs) - arch.forward(theta_BP[16:], inputs)).square().mean()))
        assert float(back_BP[:, arch.table.places(("variance",))].min()) >= 0
    assert errors[0] < errors[1]


def test_two_modules_train_together(images, arch, theta_BP):
    """Each has its own tokens, tables and queries; a step reads models of one of them; weights find their own zoo."""
    torch.manual_seed(1)
    other = of_module(Pooled(), images.train.images[:4], make=Pooled)
    others_BP = initialise(other, ["module"] * 16, range(16))
    zoos = [ZooSample(arch, theta_BP[:16], images), ZooSample(other, others_BP, images)]
    training = Training(tiny(model__token_size=10), zoos, 24)
    losses = {0: [], 1: []}
    for step in range(24):
        zoo = step % 2
        models = replace(batch(zoos[zoo].sample_BP, step), zoo=zoo)
        losses[zoo].append(training.step(models)["loss/structural"])
    for values in losses.values():
        assert values[-1] < values[0]
    autoencoder = training.autoencoder
    for zoo, models_BP in enumerate((theta_BP[16:20], others_BP[:4])):
        z = autoencoder.encode(models_BP)
        assert autoencoder.decode(z).shape == models_BP.shape
        assert z.shape[1:] == autoencoder.latent_shape(zoo)
    with pytest.raises(UserError, match="fit no architecture"):
        autoencoder.encode(theta_BP[:2, 1:])


class Pooled(torch.nn.Module):
    """Without batch normalisation: an average, a linear map on places, a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = torch.nn.Conv2d(1, 5, 3), torch.nn.LayerNorm(5), torch.nn.Linear(5, 10)

    def forward(self, x):
        return self.fc(self.norm(torch.tanh(self.conv(x)).mean((2, 3))))
