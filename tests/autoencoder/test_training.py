"""The training step: what it learns from, what it keeps, how it resumes and how it fails."""

import copy

import pytest
import torch

from distrecon.autoencoder import PAPER, AutoencoderConfig, Batch, Training, ZooSample
from distrecon.autoencoder import rows as rows_of_zoo
from distrecon.autoencoder.draws import generator, random_orders, views
from distrecon.autoencoder.rows import RowCache
from distrecon.autoencoder.training import learning_rate
from distrecon.config import replace
from distrecon.errors import UserError
from distrecon.images import ImageSet, LabelledImages
from distrecon.nets import architecture, outputs
from tests.autoencoder.small import random_models, tiny


def batch(theta_BP, rows, step=0, epoch=0, zoo=0):
    rows = torch.as_tensor(rows)
    return Batch(epoch, step, zoo, rows, theta_BP[rows], len(rows), 0)


def run(training, theta_BP, steps):
    return [training.step(batch(theta_BP, torch.arange(6) + 6 * (s % 4), step=s)) for s in steps]


@pytest.mark.parametrize("terms", ["C+S", "C+B", "S+B", "C+S+B", "B", "S"])
def test_terms_alone_decide_what_is_learnt(zoo, theta_BP, terms):
    names = {"C": "contrastive", "S": "structural", "B": "behavioral"}
    training = Training(tiny(loss__terms=terms, optim__lr=1e-2), [zoo], 30)
    history = run(training, theta_BP, range(30))
    assert set(history[0]) == {"loss/total"} | {f"loss/{names[t]}" for t in terms.split("+")}
    assert history[0]["loss/total"] == pytest.approx(1.0)  # every term over its own first value, weights that sum to 1
    for term in terms.split("+"):
        assert history[-1][f"loss/{names[term]}"] < history[0][f"loss/{names[term]}"], term


def test_the_total_is_the_papers_combination(zoo, theta_BP):
    config = tiny(loss__gamma=0.2, loss__beta=0.3, loss__lam=0.7)
    training = Training(config, [zoo], 5)
    history = run(training, theta_BP, range(3))
    first, last = history[0], history[-1]
    ratio = {name: last[name] / first[name] for name in first}
    rest = 0.3 * ratio["loss/structural"] + 0.7 * ratio["loss/behavioral"]
    expected = 0.2 * ratio["loss/contrastive"] + 0.8 * rest + 0.7 * ratio["loss/cycle"]
    assert last["loss/total"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["layer", "token", "none", "fisher"])
def test_structural_kinds(zoo, theta_BP, kind):
    config = tiny(loss__structural=kind, loss__terms="S", model__latent=1, model__fisher_models=6, optim__lr=1e-2)
    large = ZooSample(zoo.architecture, random_models(zoo.architecture, 50), zoo.images)
    history = run(Training(config, [large], 20), theta_BP, range(20))
    assert history[-1]["loss/structural"] < 0.98 * history[0]["loss/structural"]


@pytest.mark.parametrize("kind", ["permutation", "noise"])
def test_views(arch, theta_BP, images, kind):
    config = tiny(data__views=kind, data__align=False)
    whole = Batch(1, 2, 0, torch.arange(6), theta_BP[:6], 6, 0)
    part = Batch(1, 2, 0, torch.arange(2, 5), theta_BP[2:5], 6, 2)
    std_P = torch.ones(arch.num_parameters)

    def seen(batch):
        return views(config, arch, batch.theta_bP, batch, std_P, random_orders(config, arch, batch))

    first_BP, second_BP = seen(whole)
    for whole_view, part_view in zip((first_BP, second_BP), seen(part), strict=True):
        assert torch.equal(whole_view[2:5], part_view)
    assert not torch.equal(first_BP, second_BP)
    if kind == "permutation":
        inputs = images.test.images[:20]
        original = outputs(arch, theta_BP[:6], inputs)
        for view_BP in (first_BP, second_BP):
            torch.testing.assert_close(outputs(arch, view_BP, inputs), original, rtol=1e-4, atol=1e-5)
            assert not torch.equal(view_BP, theta_BP[:6])
    other = Batch(1, 3, 0, whole.row_b, whole.theta_bP, 6, 0)
    assert not torch.equal(seen(other)[1], second_BP)


def test_cached_targets_are_the_originals_outputs(zoo, theta_BP):
    """Whether outputs come from memory or are computed anew makes no difference to the losses."""
    config = tiny(data__views="permutation", data__align=False, data__target_precision="float64")
    plain, fresh = (Training(config, [zoo], 8) for _ in range(2))
    fresh.targets[0].capacity = 0
    histories = [run(training, theta_BP, range(8)) for training in (plain, fresh)]
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert len(plain.targets[0].slots) == 24
    assert not fresh.targets[0].slots
    expected = outputs(zoo.architecture, theta_BP[:3], plain.pools[0])
    found = plain.targets[0].get(torch.arange(3), lambda missing: pytest.fail("must be kept"))
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_row_cache_as_it_grows_and_at_its_limit(monkeypatch):
    value = lambda rows: torch.stack([rows * 1.0, rows * 2.0], 1)  # noqa: E731
    cache, rows = RowCache((2,), torch.float32), torch.arange(0, 600, 3)
    for part in rows.split(30):
        assert torch.equal(cache.get(part, lambda m, part=part: value(part[m])), value(part))
    again = rows.flip(0)[:50]
    assert torch.equal(cache.get(again, lambda m: pytest.fail("must be kept")), value(again))
    twice = torch.tensor([7, 7, 0])
    assert torch.equal(cache.get(twice, lambda m: value(twice[m])), value(twice))
    monkeypatch.setattr(rows_of_zoo, "MEMORY_LIMIT", 3 * 8)
    small = RowCache((2,), torch.float32)
    for part in (rows[:9], rows[4:6], rows[:9]):
        assert torch.equal(small.get(part, lambda m, part=part: value(part[m])), value(part))
    assert sorted(small.slots) == [0, 3, 6]
    assert torch.equal(small.get(rows[:3], lambda m: pytest.fail("must be kept")), value(rows[:3]))


@pytest.mark.parametrize("kind", ["transformer", "fisher_residual"])
def test_resume_is_identical(arch, images, theta_BP, kind, tmp_path):
    config = tiny(model__kind=kind, model__latent=1 if kind != "transformer" else 4, model__fisher_models=6)
    sample = ZooSample(arch, random_models(arch, 50), images)
    through = Training(config, [sample], 8)
    history = run(through, theta_BP, range(8))
    first = Training(config, [sample], 8)
    run(first, theta_BP, range(4))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Training(config, [sample], 8)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(second, theta_BP, range(4, 8)) == history[4:]
    for a, b in zip(through.autoencoder.parameters(), second.autoencoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_behaviour_joins_later_with_its_own_first_value(zoo, theta_BP):
    """Half of four steps train C, S and cycle alone; then B counts from its value at the third step."""
    config = tiny(loss__behavioral_from=0.5, loss__lam=0.3, loss__beta=0.2)
    training = Training(config, [zoo], 4)
    history = run(training, theta_BP, range(2))
    names = ("contrastive", "structural", "cycle")
    assert all(set(step) == {f"loss/{n}" for n in (*names, "total")} for step in history)
    resumed = Training(config, [zoo], 4)
    resumed.load_state_dict(copy.deepcopy(training.state_dict()))
    history += run(training, theta_BP, range(2, 4))
    weights = config.loss.weights
    first = {n: history[0][f"loss/{n}"] for n in names} | {"behavioral": history[2]["loss/behavioral"]}
    for step, used in zip(history, [names] * 2 + [tuple(weights)] * 2, strict=True):
        total = sum(weights[n] * step[f"loss/{n}"] / max(first[n], 0.01 if n == "cycle" else 0) for n in used)
        assert step["loss/total"] == pytest.approx(total, rel=1e-5)
    (factors,) = training.factors
    assert [*factors] == [tuple(weights)]
    expected = [weights[n] / max(first[n], 0.01 if n == "cycle" else 0) for n in weights]
    torch.testing.assert_close(factors[tuple(weights)].tolist(), expected, rtol=1e-5, atol=0)
    assert run(resumed, theta_BP, range(2, 4)) == history[2:]


def test_a_cycle_loss_that_starts_at_zero_does_not_blow_up(arch, images):
    """Encoding what the Fisher map decoded gives the latent back, so there is no first value to divide by."""
    config = tiny(model__kind="fisher_residual", model__latent=1, model__fisher_models=6, loss__lam=0.5)
    theta_BP = random_models(arch, 50)
    history = run(Training(config, [ZooSample(arch, theta_BP, images)], 12), theta_BP, range(12))
    assert history[0]["loss/cycle"] < 1e-6
    assert max(losses["loss/total"] for losses in history) < 10
    assert history[8]["loss/total"] < history[0]["loss/total"]  # the same batch


def test_several_zoos_keep_their_own_scales(zoo, theta_BP, images):
    mlp = architecture("mlp", sizes=(64, 6, 10))
    theta_mlp = 3 * random_models(mlp, 12)
    training = Training(tiny(loss__structural="token", optim__lr=1e-2), [zoo, ZooSample(mlp, theta_mlp, images)], 40)
    histories = {0: [], 1: []}
    for step in range(40):
        index = step % 2
        source = (theta_BP, theta_mlp)[index]
        histories[index].append(training.step(batch(source, torch.arange(6), step=step, zoo=index)))
    for history in histories.values():
        assert history[0]["loss/total"] == pytest.approx(1.0)
        assert history[-1]["loss/total"] < 0.97
    assert training.scales[0] != training.scales[1]


def test_what_is_not_finite_is_named(zoo, theta_BP):
    training = Training(tiny(), [zoo], 4)
    broken_BP = theta_BP.clone()
    broken_BP[3, 5] = float("inf")
    with pytest.raises(UserError, match=r"epoch 2, step 7: model in row 3 has a weight"):
        training.step(batch(broken_BP, torch.arange(6), step=7, epoch=2))
    huge_BP = theta_BP.clone()
    huge_BP[4] = 1e25  # finite, but its outputs are not
    with pytest.raises(UserError, match=r"loss of row 4 .*epoch 0, step 1"):
        training.step(batch(huge_BP, torch.arange(6), step=1))
    with pytest.raises(UserError, match="sample: model 3"):
        Training(tiny(), [ZooSample(zoo.architecture, broken_BP, zoo.images)], 4)
    with pytest.raises(UserError, match="1198 parameters a model"):
        training.step(Batch(0, 0, 0, torch.arange(2), theta_BP[:2, :-1], 2, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__kind": "transformr"}, "model.kind.*did you mean 'transformer'"),
        ({"model__heads": 3}, r"model.width \(16\) must be a multiple of model.heads \(3\)"),
        ({"model__latent": 0}, "model.latent must be at least 1"),
        ({"loss__terms": "C"}, "trains no decoder"),
        ({"loss__terms": "C+D"}, "loss.terms: 'D'"),
        ({"loss__terms": "C+B", "loss__behavioral_from": 0.5}, "loss.behavioral_from: S has to train before"),
        ({"loss__terms": "S+S"}, "twice"),
        ({"loss__beta": 1.5}, "loss.beta must be between 0 and 1, not 1.5"),
        ({"loss__beta": float("nan")}, "loss.beta must be a finite number, not nan"),
        ({"loss__temperature": 0.0}, "loss.temperature must be above 0, not 0.0"),
        ({"data__queries": 50}, r"data.queries \(50\) cannot exceed data.query_pool \(40\)"),
        ({"data__views": "none"}, "needs two views"),
        ({"optim__precision": "int8"}, "optim.precision"),
        ({"optim__lr_without_b": -1.0}, "optim.lr_without_b must be at least 0"),
        ({"model__fisher_metric": "structure"}, "model.fisher_metric.*did you mean 'structural'"),
        ({"tasks__samplers": ["joint"]}, "tasks.samplers.*did you mean 'joint_kde'"),
        ({"tasks__good": 0.0}, "tasks.good must be above 0 and at most 1, not 0.0"),
    ],
)
def test_settings_that_cannot_work_are_named(values, message):
    with pytest.raises(UserError, match=message):
        tiny(**values)


def test_a_latent_larger_than_the_sample_spans_is_an_error(zoo):
    with pytest.raises(UserError, match=r"model\.latent: 4 numbers for each of 40 tokens"):
        Training(tiny(model__kind="fisher_pca", model__fisher_models=4), [zoo], 1)


def test_schedules():
    config = tiny(optim__lr=1.0, optim__warmup=0.1).optim
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0 == rates[9]
    assert rates[-1] < 0.01
    assert rates[9:] == sorted(rates[9:], reverse=True)
    constant = tiny(optim__lr=1.0, optim__warmup=0.0, optim__schedule="constant").optim
    assert {learning_rate(constant, step, 10) for step in range(10)} == {1.0}


def test_random_streams_are_apart():
    draws = {
        float(torch.rand((), generator=generator(*key)))
        for key in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
    }
    assert len(draws) == 5


def test_bf16_trains(zoo, theta_BP):
    history = run(Training(tiny(optim__precision="bf16", optim__lr=1e-2), [zoo], 12), theta_BP, range(12))
    assert history[-1]["loss/total"] < history[0]["loss/total"]


def papers_sizes(precision, batch_size):
    """The paper's configuration, six random CNN3s and a dozen noise images; 256 wide, 8 + 8 layers, latent 64."""
    arch = architecture("cnn3")
    noise = LabelledImages(
        torch.rand(12, 3, 32, 32, generator=generator(0, 0, 0, 0)), torch.zeros(12, dtype=torch.long)
    )
    images = ImageSet("noise", noise, noise, noise, tuple("0123456789"), "none")
    small = {"data.query_pool": 12, "data.queries": 6, "optim.batch_size": batch_size, "optim.precision": precision}
    theta_BP = random_models(arch, 6)
    return replace(AutoencoderConfig(), PAPER | small), ZooSample(arch, theta_BP, images), theta_BP


def test_the_papers_sizes_take_steps_on_cnn3():
    config, zoo, theta_BP = papers_sizes("float32", 3)
    training = Training(config, [zoo], 4)
    assert sum(p.numel() for p in training.autoencoder.parameters()) > 10_000_000
    history = [training.step(batch(theta_BP, range(3 * s, 3 * s + 3), step=s)) for s in range(2)]
    assert set(history[0]) == {"loss/contrastive", "loss/structural", "loss/behavioral", "loss/total"}
    assert history[0]["loss/total"] == pytest.approx(1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_papers_sizes_take_bf16_steps_on_a_gpu():
    """The same steps in bf16 and float32 on the GPU: losses within bf16's precision, weights moved, inference runs."""
    histories = {}
    for precision in ("float32", "bf16"):
        config, zoo, theta_BP = papers_sizes(precision, 6)
        training = Training(config, [zoo], 20, device="cuda")
        first = [p.detach().clone() for p in training.autoencoder.parameters()]
        histories[precision] = [training.step(batch(theta_BP, range(6), step=s)) for s in range(20)]
        assert any(not torch.equal(a, b) for a, b in zip(first, training.autoencoder.parameters(), strict=True))
    assert histories["bf16"][-1]["loss/structural"] < histories["bf16"][0]["loss/structural"]
    for name in ("loss/structural", "loss/behavioral"):
        assert histories["bf16"][0][name] == pytest.approx(histories["float32"][0][name], rel=0.05)
    autoencoder = training.autoencoder
    z = autoencoder.encode(theta_BP.cuda(), refine=2)
    assert z.is_cuda
    assert autoencoder.decode(z).isfinite().all()


def test_the_papers_learning_rates_go_with_its_losses():
    """1e-5 with the behavioural loss, 1e-4 without."""
    rates = {}
    for terms in ("C+S", "B", "C+B", "S+B", "C+S+B"):
        config = replace(AutoencoderConfig(), PAPER | {"loss.terms": terms})
        rates[terms] = config.optim_in_use.lr
    assert rates == {"C+S": 1e-4, "B": 1e-5, "C+B": 1e-5, "S+B": 1e-5, "C+S+B": 1e-5}
    assert tiny(loss__terms="C+S").optim_in_use.lr == tiny().optim.lr


def test_the_learning_rate_in_use_is_the_optimisers(zoo, theta_BP):
    config = tiny(
        loss__terms="S", optim__lr=1.0, optim__lr_without_b=1e-3, optim__schedule="constant", optim__warmup=0.0
    )
    training = Training(config, [zoo], 10)
    run(training, theta_BP, range(1))
    assert training.optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_zoo_and_inputs_that_do_not_fit_are_named(zoo, theta_BP, images, value):
    broken_BP = theta_BP.clone()
    broken_BP[2, -1] = value
    with pytest.raises(UserError, match="sample: model 2 has a weight that is not finite"):
        Training(tiny(), [ZooSample(zoo.architecture, broken_BP, images)], 4)
    training = Training(tiny(), [zoo], 4)
    with pytest.raises(UserError, match="model in row 2"):
        training.step(batch(broken_BP, torch.arange(6)))
    with pytest.raises(UserError, match=r"query set 'data'.*cnn3 reads \(3, 32, 32\)"):
        Training(tiny(), [ZooSample(architecture("cnn3"), random_models(architecture("cnn3"), 4), images)], 4)
    with pytest.raises(UserError, match="10853 parameters a model"):
        Training(tiny(), [ZooSample(architecture("cnn3"), theta_BP, images)], 4)
