"""The tasks' metrics against references by hand, and what they may not look at."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distrecon.autoencoder import Training, ZooSample, generate, novelty, predict, run_tasks, tasks
from distrecon.autoencoder.probes import LINKS, Probe, Probes, PropertyProbe, load_probes, save_probes
from distrecon.autoencoder.reconstruct import compare
from distrecon.errors import UserError
from distrecon.images import LabelledImages
from distrecon.nets import align, architecture, evaluate, fit, permute, random_permutation
from tests.autoencoder.small import as_models, random_models, related_models, tiny

NAMES = """predict/test_accuracy_r2 predict/generalization_gap_r2 predict/epoch_r2
predict/baseline_statistics/test_accuracy_r2 reconstruct/accuracy_mean reconstruct/accuracy_max reconstruct/agreement
reconstruct/agreement_on_errors reconstruct/accuracy_correlation reconstruct/own_nearest reconstruct/weight_l2
reconstruct/output_mse reconstruct/refined/agreement generate/accuracy_mean generate/accuracy_max generate/accuracy_p10
generate/diversity_l2 generate/diversity_agreement generate/novelty generate/novelty_iou generate/ms_per_model
generate/baseline_noise/accuracy_mean generate/baseline_noise/novelty generate/baseline_average/accuracy_mean
generate/baseline_average/novelty generate/gaussian/accuracy_mean zoo/accuracy_mean zoo/accuracy_max""".split()


@pytest.fixture(scope="module")
def splits(arch, images):
    theta_BP = related_models(arch, 40)
    return [as_models(arch, theta_BP[a:b], images, a) for a, b in ((0, 24), (24, 31), (31, 40))]


@pytest.fixture(scope="module")
def autoencoder(arch, images, splits):
    return Training(tiny(), [ZooSample(arch, splits[0].theta_BP, images)], 1).autoencoder


def test_run_tasks_gives_every_number(autoencoder, splits, images):
    settings = {"tasks__refine": 2, "tasks__generate_refine": 2, "tasks__finetune_epochs": 1, "tasks__select": 2}
    config = tiny(tasks__samplers=["joint_kde", "gaussian"], **settings)
    found = run_tasks(autoencoder, *splits, images, config)
    assert set(NAMES) <= set(found.metrics)
    assert all(np.isfinite(value) for value in found.metrics.values())
    assert found.generated_theta_BP.shape == (6, autoencoder.architectures[0].num_parameters)
    assert found.generated_theta_BP.dtype == torch.float32
    assert found.arrays["reconstruct/accuracy"].shape == (2, 9)
    for kind in ("structural", "behavioral"):  # shares of the norm, the mean over models: nearly 1
        shares = found.arrays[f"gradients/{kind}_share"]
        assert shares.shape == (4,)
        assert np.square(shares).sum() == pytest.approx(1, abs=0.05)
    assert -1 <= found.metrics["gradients/predicted_cosine"] <= 1
    assert found.metrics["zoo/accuracy_max"] == pytest.approx(float(splits[2].test_accuracy_B.max()))
    again = run_tasks(autoencoder, *splits, images, config)
    timed = {k for k in found.metrics if k.endswith("ms_per_model")}
    assert all(found.metrics[k] == again.metrics[k] for k in found.metrics if k not in timed)


def test_reconstructions_that_are_the_originals(arch, splits, images):
    theta_BP = splits[2].theta_BP
    metrics, arrays = compare(arch, theta_BP, theta_BP.clone(), images.test)
    for name in ("agreement", "agreement_on_errors", "own_nearest"):
        assert metrics[f"reconstruct/{name}"] == 1.0
    assert metrics["reconstruct/accuracy_correlation"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["reconstruct/weight_l2"] == metrics["reconstruct/output_mse"] == 0.0
    permuted_BP = permute(arch, theta_BP, random_permutation(arch, torch.Generator().manual_seed(0), len(theta_BP)))
    metrics, _ = compare(arch, theta_BP, permuted_BP, images.test)
    assert metrics["reconstruct/agreement"] > 0.999
    assert metrics["reconstruct/weight_l2"] > 1
    assert metrics["reconstruct/weight_l2_aligned"] < 0.2 * metrics["reconstruct/weight_l2"]
    assert np.array_equal(arrays["reconstruct/accuracy"][0], arrays["reconstruct/accuracy"][1])


def test_reconstruction_metrics_by_hand(arch, images):
    original_BP, rebuilt_BP = 3 * random_models(arch, 4), 3 * random_models(arch, 4, first_seed=50)
    metrics, arrays = compare(arch, original_BP, rebuilt_BP, images.test)
    labels = images.test.labels_Q.tolist()
    a, b = (arch.forward(t, images.test.images).argmax(2).tolist() for t in (original_BP, rebuilt_BP))
    pairs = [[sum(x == y for x, y in zip(r, o, strict=True)) / len(labels) for o in a] for r in b]
    np.testing.assert_allclose(arrays["reconstruct/agreement_matrix"], pairs, atol=1e-6)
    assert metrics["reconstruct/agreement"] == pytest.approx(np.mean([pairs[i][i] for i in range(4)]), abs=1e-6)
    on_errors = []
    for x, y in zip(a, b, strict=True):
        wrong = [(p, q) for p, q, label in zip(x, y, labels, strict=True) if p != label]
        on_errors.append(sum(p == q for p, q in wrong) / len(wrong))
    assert metrics["reconstruct/agreement_on_errors"] == pytest.approx(np.mean(on_errors), abs=1e-6)
    own = np.mean([pairs[i][i] >= max(pairs[i]) - 1e-9 for i in range(4)])
    assert metrics["reconstruct/own_nearest"] == pytest.approx(own)


# -- prediction --------------------------------------------------------------------------------------------------------


def of_own(count: int) -> list[str]:
    """Names of models with one state each."""
    return [f"{i:03}" for i in range(count)]


def test_ridge_finds_a_linear_relation_and_regularises_noise():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(n, 30)) * 5 + 2 for n in (200, 60, 60)]
    weights = rng.normal(size=30)
    values = [f @ weights for f in features]
    ridge = predict.Ridge(*features[:2], of_own(200))
    fitted = ridge.best(*values[:2])
    assert fitted.validation_B.mean() < 1e-3 * values[1].var()
    assert predict.r2(fitted.probe(features[2]), values[2]) > 0.999
    noise = [rng.normal(size=n) for n in (200, 60, 60)]
    assert predict.r2(ridge.best(*noise[:2]).probe(features[2]), noise[2]) > -0.1  # unregularised about -.2


@pytest.mark.parametrize("count", [3, 40])  # features, fewer than training states and more
def test_a_model_is_left_out_with_all_of_its_states(monkeypatch, count):
    """Against probes that are fitted anew without it, a latent's weight penalised ten times as much; models have one to
    three states, in no order."""
    monkeypatch.setattr(predict, "ALPHAS", np.array([2.0]))
    rng = np.random.default_rng(0)
    model_id = ["b", "a", "c", "b", "e", "c", "d", "b", "d", "a"]
    train_BF, validation_BF = rng.normal(size=(10, count)), rng.normal(size=(2, count))
    train_BF = (train_BF - train_BF.mean(0)) / train_BF.std(0)
    train_B, validation_B = rng.uniform(size=10), rng.uniform(size=2)
    fitted = predict.Ridge(train_BF, validation_BF, model_id, latents=2).best(train_B, validation_B)
    penalty_FF = np.diag([20.0, 20.0] + [2.0] * (count - 2))

    def predictions(seen_B: np.ndarray, asked_BF: np.ndarray) -> np.ndarray:
        mean_F, mean = train_BF[seen_B].mean(0), train_B[seen_B].mean()
        centred_BF = train_BF[seen_B] - mean_F
        weight_F = np.linalg.solve(centred_BF.T @ centred_BF + penalty_FF, centred_BF.T @ train_B[seen_B])
        return (asked_BF - mean_F) @ weight_F + mean

    for name in set(model_id):
        own_B = np.array([m == name for m in model_id])
        expected_B = (predictions(~own_B, train_BF[own_B]) - train_B[own_B]) ** 2
        np.testing.assert_allclose(fitted.left_out_B[own_B], expected_B, rtol=1e-9)
    expected_B = (predictions(np.ones(10, bool), validation_BF) - validation_B) ** 2
    np.testing.assert_allclose(fitted.validation_B, expected_B, rtol=1e-9)
    np.testing.assert_allclose(fitted.validation_B, (fitted.probe(validation_BF) - validation_B) ** 2, rtol=1e-9)
    assert fitted.error == pytest.approx(fitted.left_out_B.sum() + fitted.validation_B.sum())


def test_the_states_of_an_only_model_are_left_out_one_by_one():
    rng = np.random.default_rng(0)
    train_BF, values_B = rng.normal(size=(6, 2)), rng.normal(size=6)
    found = [predict.Ridge(train_BF, train_BF, ids).best(values_B, values_B) for ids in (["a"] * 6, of_own(6))]
    np.testing.assert_array_equal(found[0].left_out_B, found[1].left_out_B)


def test_gains_of_models_by_hand():
    """Gains 1, 1 and 4 of three models: their mean, 2, is 2 standard errors, sqrt(3) / sqrt(3), above 0."""
    found_M = predict.gains(np.ones(4), 1 + np.array([1.0, 1.0, 1.0, 3.0]), ["a", "b", "c", "c"])
    np.testing.assert_array_equal(sorted(found_M), [1, 1, 4])
    assert predict.above(found_M, 1.99)
    assert not predict.above(found_M, 2.01)
    with warnings.catch_warnings(action="error"):
        assert not predict.above(np.array([1.0]), 0)  # one model proves nothing
    assert not predict.above(np.zeros(3), 0)


def test_latents_help_where_all_models_say_so_and_validation_models_do_not_deny_it():
    probe = Probe(*np.ones((3, 1)), 0.0)
    asked = [SimpleNamespace(model_id=of_own(count)) for count in (100, 4)]
    alone = predict.Fitted(probe, np.ones(100), np.ones(4))

    def helps(gain_left_out: float, *validation: float) -> bool:
        gain_B = gain_left_out + np.tile([1.0, -1.0], 50)  # standard error about .1
        return predict._help(predict.Fitted(probe, 1 - gain_B, 1 - np.array(validation)), alone, asked)

    assert helps(0.4, 0.4, 0.4, 0.4, 0.4)
    assert not helps(0.2, 0.2, 0.2, 0.2, 0.2)  # two standard errors may be the best of several by chance
    assert helps(0.4, -1.0, 1.0, -0.5, 0.0)  # somewhat worse on validation models, by chance
    assert not helps(0.4, -0.5, -0.4, -0.5, -0.6)  # as of an autoencoder that knows its training models by heart


def test_latents_that_are_noise_are_not_taken(splits):
    """Of many one is the best; the statistics stay."""
    values = [s.test_accuracy_B.double().numpy()[:, None] for s in splits]
    rng = np.random.default_rng(0)
    spread = float(values[0].std())
    statistics = [v + spread * rng.normal(size=v.shape) for v in values]
    noise = {f"noise {i}": [spread * rng.normal(size=(len(v), 20)) for v in values] for i in range(30)}
    _, _, probes = predict._probe(statistics, noise, splits, "p")
    assert probes["test_accuracy"].features == "statistics"
    useful = [v + 0.1 * spread * rng.normal(size=v.shape) for v in values]
    _, _, probes = predict._probe(statistics, noise | {"useful": useful}, splits, "p")
    assert probes["test_accuracy"].features == "useful+statistics"


def test_features_are_not_chosen_on_test_models(splits):
    """The features that would win on the test models lose, because the others prefer another."""
    values = [s.test_accuracy_B.double().numpy()[:, None] for s in splits]
    rng = np.random.default_rng(0)
    spread = float(values[0].std())
    statistics = [rng.normal(size=v.shape) for v in values]
    honest = [v + 0.1 * spread * rng.normal(size=v.shape) for v in values]
    tempting = [values[0], rng.normal(size=values[1].shape), values[2]]
    latents = {"honest": honest, "tempting": tempting}
    metrics, arrays, probes = predict._probe(statistics, latents, splits, "p")
    assert probes["test_accuracy"].features == "honest+statistics"
    only, _, _ = predict._probe(statistics, {"honest": honest}, splits, "p")
    assert metrics["p/test_accuracy_r2"] == only["p/test_accuracy_r2"] < 1
    np.testing.assert_allclose(arrays["p/test_accuracy"][0], values[2][:, 0])


def test_an_embedding_that_says_nothing_leaves_the_statistics(autoencoder, arch, splits, monkeypatch):
    monkeypatch.setattr(predict, "decode_latents", lambda _, z, zoo: torch.zeros(len(z), arch.num_parameters))
    metrics, _, _ = predict.predict(
        autoencoder, splits, [torch.zeros(len(part), arch.num_tokens, 3) for part in splits]
    )
    for name in ("epoch", "test_accuracy"):
        expected = metrics[f"predict/baseline_statistics/{name}_r2"]
        assert metrics[f"predict/{name}_r2"] == pytest.approx(expected, abs=1e-6)


def test_a_property_that_does_not_vary_has_no_r2(splits):
    same = [replace(s, epoch_B=torch.full((len(s),), 5)) for s in splits]
    features = [s.theta_BP[:, :20].double().numpy() for s in same]
    metrics, _, probes = predict._probe(features, {}, same, "p")
    assert set(probes) == {"test_accuracy", "generalization_gap"}
    assert set(metrics) == {"p/test_accuracy_r2", "p/generalization_gap_r2"}


def test_a_property_that_the_zoo_does_not_have_is_not_predicted(splits):
    """Of no model: there is nothing to predict. Of some models: those would be left out in silence."""
    features = [s.theta_BP[:, :20].double().numpy() for s in splits]
    none = [replace(s, generalization_gap_B=torch.full((len(s),), torch.nan)) for s in splits]
    assert set(predict._probe(features, {}, none, "p")[2]) == {"test_accuracy", "epoch"}
    with pytest.raises(UserError, match="the zoo has generalization_gap of some models only"):
        predict._probe(features, {}, [splits[0], none[1], splits[2]], "p")


def test_the_tasks_do_without_accuracies(autoencoder, splits, images):
    """As `write_zoo` writes zoos of weights alone."""
    unknown = [
        replace(
            s, **{f"{name}_B": torch.full((len(s),), torch.nan) for name in ("test_accuracy", "generalization_gap")}
        )
        for s in splits
    ]
    found = run_tasks(autoencoder, *unknown, images, tiny())
    assert {"predict/epoch_r2", "reconstruct/agreement", "generate/novelty"} <= found.metrics.keys()
    assert all(np.isfinite(value) for value in found.metrics.values())


def test_saved_probes_predict_what_the_scoring_run_did(autoencoder, splits, images, tmp_path):
    scored = run_tasks(autoencoder, *splits, images, tiny())
    save_probes(tmp_path, scored.probes)
    loaded = load_probes(tmp_path)
    assert loaded.of.keys() == {"test_accuracy", "generalization_gap", "epoch"}
    found = predict.predicted(autoencoder, loaded, splits[2].theta_BP)
    for name, values_B in found.items():
        actual_B, predicted_B = scored.arrays[f"predict/{name}"]
        np.testing.assert_allclose(values_B, predicted_B, rtol=1e-5, atol=1e-6)
        assert loaded.of[name].r2 == scored.metrics[f"predict/{name}_r2"]
        assert loaded.of[name].error == pytest.approx(np.sqrt(np.mean((predicted_B - actual_B) ** 2)))


def test_a_probe_by_hand():
    probe = Probe(np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([10.0, 3.0]), 0.5)
    np.testing.assert_allclose(probe(np.array([[1.0, 2.0], [3.0, 0.0]])), [0.5, 0.5 + 10 - 6])
    share = replace(probe, link="logit", intercept=0.0)(np.array([[1.0, 2.0], [1.0, 2.0 + np.log(3) / 3]]))
    np.testing.assert_allclose(share, [0.5, (0.75 - 0.0005) / 0.999])
    for link in LINKS.values():
        np.testing.assert_allclose(link.back(link.forward(np.array([0.0, 0.3, 1.0]))), [0.0, 0.3, 1.0], atol=1e-12)


def test_a_share_that_saturates_is_predicted_by_its_logit():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(n, 3)) for n in (200, 60)]
    values = [1 / (1 + np.exp(-3 * f[:, 0])) for f in features]
    ridge = predict.Ridge(*features, of_own(200))
    assert predict.r2(ridge.best(*values, "identity").probe(features[1]), values[1]) < 0.95
    assert predict.r2(ridge.best(*values, "logit").probe(features[1]), values[1]) > 0.999


def test_missing_and_damaged_probes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no probes"):
        load_probes(tmp_path)
    save_probes(tmp_path, Probes(0, {"epoch": PropertyProbe(Probe(*np.ones((3, 2)), 0.0), "whole", 0.9, 0.1)}))
    content = json.loads((tmp_path / "probes.json").read_text())
    for damaged in ([], {**content, "properties": []}):
        (tmp_path / "probes.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="cannot be read"):
            load_probes(tmp_path)
    (tmp_path / "probes.json").write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(UserError, match=r"^\S+probes\.json: not probes that this distrecon can read"):
        load_probes(tmp_path)
    (tmp_path / "probes.json").write_text(json.dumps(content))
    (tmp_path / "probes.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_probes(tmp_path)


def test_weight_statistics_by_hand():
    arch = architecture("mlp", sizes=(3, 2, 2))
    theta_BP = torch.arange(arch.num_parameters, dtype=torch.float32)[None]
    found = predict.weight_statistics(arch, theta_BP)
    assert found.shape == (1, 4 * 9)
    weights = theta_BP[0, :6]
    expected = [weights.mean(), weights.std(correction=0), *(weights.quantile(q) for q in predict.QUANTILES)]
    torch.testing.assert_close(found[0, :9], torch.stack(expected))


# -- novelty and diversity ---------------------------------------------------------------------------------------------


def test_reordered_copies_are_not_new(arch):
    train_NP = random_models(arch, 12)
    reference_P = train_NP[0]
    aligned_NP = align(arch, train_NP, reference_P)
    copies_MP = permute(arch, train_NP[3:6], random_permutation(arch, torch.Generator().manual_seed(1), 3))
    noise_MP = torch.randn(copies_MP.shape, generator=torch.Generator().manual_seed(2))
    noisy_MP = copies_MP + 0.01 * noise_MP
    close_M, own_M = novelty.nearest_aligned(arch, noisy_MP, aligned_NP, reference_P, candidates=12)
    torch.testing.assert_close(close_M, 0.01 * noise_MP.norm(dim=1), rtol=0.02, atol=0)
    assert own_M.tolist() == [3, 4, 5]
    far_M, _ = novelty.nearest_aligned(arch, random_models(arch, 3, 70), aligned_NP, reference_P, candidates=12)
    assert far_M.min() > 5 * close_M.max()
    brute = [min((align(arch, t[None], m)[0] - m).norm() for t in train_NP) for m in random_models(arch, 3, 70)]
    torch.testing.assert_close(far_M, torch.stack(brute), rtol=0.05, atol=0)


def test_pairwise_distance_ignores_the_order_of_units(arch):
    theta_P = random_models(arch, 1)
    same_BP = permute(arch, theta_P.expand(4, -1), random_permutation(arch, torch.Generator().manual_seed(0), 4))
    assert (same_BP[0] - same_BP[1]).norm() > 1
    distances = novelty.aligned_pairwise(arch, same_BP)
    assert distances.shape == (6,)
    assert distances.max() < 1e-3


def test_error_overlap_and_agreement_by_hand():
    wrong_MQ = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    train_NQ = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    torch.testing.assert_close(novelty.error_overlap(wrong_MQ, train_NQ), torch.tensor([2 / 3, 0.0]))
    assert novelty.error_overlap(wrong_MQ[1:], wrong_MQ[1:]).item() == 1.0
    predictions_BQ = torch.tensor([[0, 1, 2], [0, 1, 1], [2, 1, 1]])
    matrix = novelty.agreement_matrix(predictions_BQ, predictions_BQ, 3)
    torch.testing.assert_close(matrix, torch.tensor([[3.0, 2, 1], [2, 3, 2], [1, 2, 3]]) / 3)
    assert novelty.mean_pairwise_agreement(predictions_BQ, 3) == pytest.approx(5 / 9)


# -- sampling and generation -------------------------------------------------------------------------------------------


def test_generation_never_sees_test_images(autoencoder, splits, images):
    train, _, test = splits
    wrong = LabelledImages(images.test.images.flip(0), (images.test.labels_Q + 3) % 10)
    config = tiny(tasks__select=2, tasks__generate_refine=2, tasks__finetune_epochs=1).tasks
    with torch.no_grad():
        z = autoencoder.encode(train.theta_BP)
    models = [
        generate.generate(autoencoder, train, test, z, image_set, config)[2]
        for image_set in (images, replace(images, test=wrong))
    ]
    assert torch.equal(*models)
    blind = replace(train, test_accuracy_B=torch.zeros(len(train)))
    assert torch.equal(generate.generate(autoencoder, blind, test, z, images, config)[2], models[0])


def test_best_states_are_one_a_model_and_in_order(arch, splits, images):
    train = splits[0]
    ids = [f"m{i // 3}" for i in range(len(train))]
    accuracy_B = evaluate(arch, train.theta_BP, images.validation.images, images.validation.labels_Q).accuracy_B
    sources = generate.Sources.make(arch, replace(train, model_id=ids), torch.zeros(len(train), 2), images, 0.5)
    best = sources.best_N
    assert torch.equal(sources.accuracy_A, accuracy_B)
    assert torch.equal(sources.good_N, best[:4])
    assert sorted(ids[i] for i in best) == sorted(set(ids))
    assert (accuracy_B[best].diff() <= 0).all()
    for i in best.tolist():
        siblings = [j for j, name in enumerate(ids) if name == ids[i]]
        assert accuracy_B[i] == accuracy_B[siblings].max()


def test_selection_on_validation_images_and_fine_tuning_help(autoencoder, arch, splits, images):
    train = splits[0]
    with torch.no_grad():
        sources = generate.Sources.make(arch, train, autoencoder.encode(train.theta_BP), images, 1.0)

    def mean_accuracy(part, **values):
        settings = tiny(**values).tasks
        theta_MP, _ = generate.generate_models(autoencoder, sources, images, settings, "gaussian")
        return float(evaluate(arch, theta_MP, part.images, part.labels_Q).accuracy_B.mean())

    assert mean_accuracy(images.validation, tasks__select=8) > mean_accuracy(images.validation)
    assert mean_accuracy(images.test, tasks__finetune_epochs=4) > mean_accuracy(images.test) + 0.05


def test_baselines(arch, images):
    good_NP = random_models(arch, 5)
    torch.testing.assert_close(generate.averaged(arch, good_NP[:1].expand(3, -1), 4, seed=0), good_NP[:1].expand(4, -1))
    std_P = torch.full((arch.num_parameters,), 2.0)
    assert torch.equal(generate.noisy(arch, good_NP[:1], std_P, 0.0, 2, 0), good_NP[:1].expand(2, -1))
    noise = generate.noisy(arch, good_NP[:1], std_P, 0.1, 200, 0) - good_NP[0]
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    many_NP, part = random_models(arch, 60), images.validation
    few = part.images[: generate.SEARCH_IMAGES], part.labels_Q[: generate.SEARCH_IMAGES]
    luckiest = evaluate(arch, many_NP, *few).accuracy_B.argmax()  # whose accuracy any larger noise takes away
    best_NP = many_NP[luckiest : luckiest + 1]
    assert generate.matched_noise(arch, best_NP, std_P, best_NP.expand(40, -1), images, 0) == 0.02
    assert generate.matched_noise(arch, best_NP, std_P, 0 * best_NP.expand(40, -1), images, 0) > 0.05


def test_the_scale_of_noise_by_bisection_is_the_one_of_a_full_search(arch, images):
    """A network whose accuracy falls with noise: its own noisy copies are found again by their accuracy."""
    inputs, labels_Q = images.train.images, images.train.labels_Q
    rates = torch.full((1,), 3e-3)
    *_, last = fit(arch, random_models(arch, 1), inputs, labels_Q, epochs=4, lr_B=rates, seed=0)
    good_NP, std_P = last.theta_BP, torch.full((arch.num_parameters,), float(last.theta_BP.std()))
    for scale in (0.1, 0.3, 0.7):
        wanted_MP = generate.noisy(arch, good_NP, std_P, scale, generate.SEARCH_MODELS, 0)
        assert generate.matched_noise(arch, good_NP, std_P, wanted_MP, images, 0) == scale


def test_judging_images_are_few_and_always_the_same(images):
    few = tasks.judging(images, 150)
    assert len(few.validation) == len(few.test) == 150
    assert few.train is images.train
    assert torch.equal(few.test.images, tasks.judging(images, 150).test.images)
    place = (images.test.images[:, None] == few.test.images[:1]).flatten(2).all(2).nonzero()[0, 0]
    assert few.test.labels_Q[0] == images.test.labels_Q[place]
    assert tasks.judging(images, 10_000).test is images.test
