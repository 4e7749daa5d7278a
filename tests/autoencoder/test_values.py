"""Metrics by their values on cases worked by hand, seeds both ways, and what each part of a loss reaches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distrecon.autoencoder import Training, samplers
from distrecon.autoencoder import scoring as scoring_module
from distrecon.autoencoder.draws import generator, random_orders, views
from distrecon.autoencoder.generate import (
    NOISE_SCALES,
    Judge,
    Sources,
    averaged,
    finetuned,
    generate_models,
    matched_noise,
    noisy,
)
from distrecon.autoencoder.reconstruct import compare
from distrecon.autoencoder.tasks import run_tasks
from distrecon.autoencoder.transformer import Projection
from distrecon.images import LabelledImages
from distrecon.nets import align, architecture, evaluate, outputs, permute, random_permutation
from distrecon.zoos.models import Batch
from tests.autoencoder.small import as_models, random_models, related_models, tiny


def batch(count, arch, step=0, epoch=0):
    return Batch(epoch, step, 0, torch.arange(count), torch.zeros(count, arch.num_parameters), count, 0)


# -- losses and views --------------------------------------------------------------------------------------------------


def test_the_cycle_loss_reaches_the_decoder_too(arch, theta_BP, zoo):
    """By it alone: without the other losses every gradient of the decoder is the cycle's."""
    training = Training(tiny(loss__terms="C+S", loss__lam=1.0), [zoo], 1)
    found = training.losses(Batch(0, 0, 0, torch.arange(6), theta_BP[:6], 6, 0))
    decoder = list(training.autoencoder.coder.decoder.parameters())
    encoder = list(training.autoencoder.coder.encoder.parameters())
    gradients = torch.autograd.grad(found["cycle"].sum(), decoder + encoder, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    assert all(float(g.abs().max()) > 0 for g in gradients[: len(decoder)][:2])


def test_views_are_other_ones_by_seed_epoch_and_step_and_the_same_by_all_three(arch):
    def orders(seed, epoch, step):
        return random_orders(tiny(seed=seed, data__views="permutation"), arch, batch(4, arch, step, epoch))

    first = orders(0, 0, 0)
    assert torch.equal(first, orders(0, 0, 0))
    assert not any(torch.equal(first, orders(*other)) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert not torch.equal(first[0], first[1])  # two views


def test_noisy_views_differ_by_seed(arch, theta_BP):
    found = [
        views(tiny(data__views="noise", seed=seed), arch, theta_BP[:4], batch(4, arch), torch.ones(()), torch.empty(0))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[0][0], theta_BP[:4])


def test_noise_of_a_view_is_that_share_of_each_weights_deviation(arch):
    std_P = torch.linspace(0, 3, arch.num_parameters)
    theta_BP = torch.zeros(400, arch.num_parameters)
    config = tiny(data__views="noise", data__noise=0.1)
    _, noisy_BP = views(config, arch, theta_BP, batch(400, arch), std_P, torch.empty(0))
    assert (noisy_BP[:, 0] == 0).all()
    measured_P = noisy_BP.std(0) / (0.1 * std_P)
    assert float(measured_P[1:].mean()) == pytest.approx(1, abs=0.01)
    assert float((measured_P[1:] - 1).abs().max()) < 0.2


def test_purposes_have_random_numbers_of_their_own():
    drawn = {
        key: float(torch.rand((), generator=generator(*key)))
        for key in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    }
    assert len(set(drawn.values())) == 5
    assert drawn[1, 0, 0, 0] == float(torch.rand((), generator=generator(1, 0, 0, 0)))


def test_the_projection_reads_every_token():
    torch.manual_seed(0)
    head, z_BTZ = Projection(3, 5), torch.randn(2, 7, 3)
    before = head(z_BTZ)
    for token in range(7):
        moved = z_BTZ.clone()
        moved[:, token] += 1
        assert not torch.allclose(head(moved), before, atol=1e-4)
    assert torch.allclose(head(z_BTZ.flip(1)), before, atol=1e-6)  # their mean


# -- reconstructions ---------------------------------------------------------------------------------------------------


def test_what_is_said_of_reconstructions_by_hand(arch, images):
    """Four models against four others, every metric computed here once more, from the outputs alone."""
    original_BP, rebuilt_BP = related_models(arch, 8)[:4], related_models(arch, 8)[4:]
    metrics, arrays = compare(arch, original_BP, rebuilt_BP, images.test)
    labels_Q = images.test.labels_Q
    a, b = (outputs(arch, theta_BP, images.test.images) for theta_BP in (original_BP, rebuilt_BP))
    pa, pb = a.argmax(2), b.argmax(2)
    accuracy = [[float((p[i] == labels_Q).float().mean()) for i in range(4)] for p in (pa, pb)]
    on_errors = [float((pa[i] == pb[i])[pa[i] != labels_Q].float().mean()) for i in range(4)]
    agree = [[float((pb[i] == pa[j]).float().mean()) for j in range(4)] for i in range(4)]
    expected = {
        "accuracy_mean": np.mean(accuracy[1]),
        "accuracy_max": np.max(accuracy[1]),
        "agreement": np.mean([agree[i][i] for i in range(4)]),
        "agreement_on_errors": np.mean(on_errors),
        "accuracy_correlation": np.corrcoef(accuracy[0], accuracy[1])[0, 1],
        "own_nearest": np.mean([agree[i][i] >= max(agree[i]) - 1e-6 for i in range(4)]),
        "weight_l2": np.mean([float((rebuilt_BP[i] - original_BP[i]).norm()) for i in range(4)]),
        "output_mse": float((a - b).double().square().mean()),
    }
    assert np.max(accuracy[0]) != np.max(accuracy[1])
    assert len({round(value, 6) for value in expected.values()}) == len(expected)  # none can stand for another
    for name, value in expected.items():
        assert metrics[f"reconstruct/{name}"] == pytest.approx(value, abs=1e-5), name
    assert arrays["reconstruct/accuracy"] == pytest.approx(np.array(accuracy), abs=1e-6)


def test_a_model_that_was_not_reconstructed_is_an_error(arch, images):
    theta_BP = related_models(arch, 4)
    with pytest.raises(ValueError, match="zip"):
        compare(arch, theta_BP[:3], theta_BP[3:], images.test)  # one would be compared with all three


# -- generated models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(arch, images):
    theta_BP = related_models(arch, 40)
    train, test = as_models(arch, theta_BP[:30], images), as_models(arch, theta_BP[30:], images, 30)
    config = tiny().tasks
    sources = Sources.make(arch, train, torch.zeros(len(train), 1), images, config.good)
    return Judge.make(arch, sources, test, images, config)


def test_held_out_models_are_as_novel_as_themselves(judged):
    assert judged.heldout_distance > 0.1
    metrics, _ = judged(judged.heldout_BP)
    assert metrics["novelty"] == pytest.approx(1, abs=1e-5)
    metrics, _ = judged(judged.train_NP[:4])
    assert metrics["novelty"] == pytest.approx(0, abs=1e-5)
    assert metrics["novelty_iou"] == pytest.approx(1, abs=1e-3)


def test_accuracies_of_generated_models_by_hand(arch, images, judged):
    theta_MP = related_models(arch, 20)
    metrics, arrays = judged(theta_MP)
    accuracy_M = arrays["accuracy"]
    expected = evaluate(arch, theta_MP, images.test.images, images.test.labels_Q).accuracy_B.numpy()
    assert accuracy_M == pytest.approx(expected)
    ordered = np.sort(expected)
    assert metrics["accuracy_mean"] == pytest.approx(ordered.mean())
    assert metrics["accuracy_max"] == pytest.approx(ordered[-1])
    assert metrics["accuracy_p10"] == pytest.approx(ordered[1] + 0.9 * (ordered[2] - ordered[1]))  # at place .1 x 19
    assert ordered[1] < ordered[-3]


def test_the_average_of_a_model_and_its_reordered_self_is_itself(arch):
    theta_P = random_models(arch, 1)[0]
    order = random_permutation(arch, torch.Generator().manual_seed(0), 1)
    pair_NP = torch.stack([theta_P, permute(arch, theta_P[None], order)[0]])
    for average_P in averaged(arch, pair_NP, 6, seed=0):
        assert float((pair_NP - average_P).norm(dim=1).min()) < 1e-5


def test_noise_is_matched_on_validation_images(arch, images):
    """Test images that nobody gets right change nothing."""
    good_NP = related_models(arch, 12)
    std_P = good_NP.std(0)
    wanted_MP = noisy(arch, good_NP, std_P, 0.5, 6, 3)
    assert 0.5 in NOISE_SCALES
    wrong = LabelledImages(images.test.images, torch.full_like(images.test.labels_Q, 10))
    for one in (images, replace(images, test=wrong), replace(images, train=wrong)):
        assert matched_noise(arch, good_NP, std_P, wanted_MP, one, 3) == 0.5


def test_noise_has_that_share_of_the_deviations(arch):
    std_P = torch.linspace(0, 2, arch.num_parameters)
    drawn_MP = noisy(arch, torch.zeros(3, arch.num_parameters), std_P, 0.5, 500, 0)
    assert (drawn_MP[:, 0] == 0).all()
    assert float((drawn_MP.std(0)[1:] / (0.5 * std_P[1:])).mean()) == pytest.approx(1, abs=0.01)


def test_each_dimensions_kernel_is_as_wide_as_scotts_rule_says():
    """A sample's variance is that of the points it is drawn from, and the kernel's: s^2 N^(-2/5) in one dimension."""
    good_NF = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn_MF = samplers.sample("dimension_kde", good_NF, 200_000, 0.7, seed=1)
    expected_F = good_NF.var(0, correction=0) + (0.7 * good_NF.std(0) * 32**-0.2) ** 2
    assert drawn_MF.var(0) / expected_F == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samples_differ_by_seed_alone(name):
    good_NF = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    first, same, other = (samplers.sample(name, good_NF, 5, 1.0, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_fine_tuning_differs_by_seed_alone(arch, images):
    few = replace(images, train=LabelledImages(images.train.images[:96], images.train.labels_Q[:96]))
    theta_MP = random_models(arch, 2)
    first, same, other = (finetuned(arch, theta_MP, few, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, theta_MP)


def test_generated_models_differ_by_seed_alone(arch, zoo, images):
    autoencoder = Training(tiny(), [zoo], 1).autoencoder.eval()
    good_NP = related_models(arch, 24)
    train = as_models(arch, good_NP, images)
    sources = Sources.make(arch, train, autoencoder.encode(good_NP), images, 0.5)
    found = [generate_models(autoencoder, sources, images, tiny().tasks, "joint_kde", s)[0] for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# -- which models and images each task may see ------------------------------------------------------------------------


def test_each_split_plays_its_own_part(arch, zoo, images, monkeypatch):
    """Scoring hands training, validation and test models to the tasks in that order."""
    theta_BP = related_models(arch, 12)
    parts = {
        s: as_models(arch, theta_BP[4 * i : 4 * i + 4], images, 4 * i) for i, s in enumerate(("train", "val", "test"))
    }

    class Pretended:
        architecture, num_states = arch, 12

        def models(self, split):
            return parts[split]

        def images(self):
            return images

    seen = []

    class Enough(Exception):
        pass

    def tasks(autoencoder, *arguments):
        seen.extend(arguments)
        raise Enough

    monkeypatch.setattr(scoring_module, "run_tasks", tasks)
    autoencoder = Training(tiny(), [zoo], 1).autoencoder
    with pytest.raises(Enough):
        scoring_module.score(autoencoder, Pretended(), tiny(), None)
    assert [models.model_id for models in seen[:3]] == [parts[s].model_id for s in ("train", "val", "test")]


def test_labels_of_test_images_only_judge(arch, zoo, images):
    """With other test labels the same models are generated, from the same good ones, and only their scores change."""
    theta_BP = related_models(arch, 40)
    splits = [as_models(arch, theta_BP[a:b], images, a) for a, b in ((0, 24), (24, 31), (31, 40))]
    autoencoder = Training(tiny(), [zoo], 1).autoencoder
    config = tiny(tasks__select=2, tasks__finetune_epochs=1)
    other = replace(images, test=LabelledImages(images.test.images, (images.test.labels_Q + 1) % 10))
    first, second = (run_tasks(autoencoder, *splits, one, config) for one in (images, other))
    assert torch.equal(first.generated_theta_BP, second.generated_theta_BP)
    assert first.metrics["generate/baseline_noise/scale"] == second.metrics["generate/baseline_noise/scale"]
    assert first.metrics["generate/accuracy_mean"] != second.metrics["generate/accuracy_mean"]


def test_alignment_sees_biases():
    """Three hidden units that differ in nothing but their biases."""
    arch = architecture("mlp", sizes=(2, 3, 2), activation="tanh")
    state = arch.unflatten(torch.ones(arch.num_parameters))
    bias = next(key for key, value in state.items() if key.endswith("bias") and len(value) == 3)
    state[bias] = torch.tensor([1.0, 2.0, 3.0])
    reference_P = arch.flatten(state)
    other_P = arch.flatten({**state, bias: torch.tensor([3.0, 1.0, 2.0])})
    assert torch.equal(align(arch, other_P[None], reference_P)[0], reference_P)
