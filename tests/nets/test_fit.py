"""Fitting many models at once equals fitting each alone; evaluation equals a loop; initial weights follow their law."""

import pytest
import torch
import torch.nn.functional as F

from distrecon.errors import UserError
from distrecon.nets import (
    INITIALISATIONS,
    architecture,
    cross_entropy,
    evaluate,
    evaluation,
    fit,
    initialise,
    outputs,
)
from distrecon.nets.known import mlp

LR = [1e-3, 3e-3, 1e-2]
DECAY = [0.0, 1e-2, 1e-1]

OPTIMIZERS = {
    "adam": lambda p, lr, decay: torch.optim.Adam([p], lr=lr, weight_decay=decay),
    "sgd": lambda p, lr, decay: torch.optim.SGD([p], lr=lr, weight_decay=decay, momentum=0.9),
}


def data(arch, count: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, *arch.input_shape, generator=generator).double()
    return inputs, torch.randint(0, arch.num_outputs, (count,), generator=generator)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "cnn_small"])
def test_fitting_together_equals_torch_optim_one_by_one(name: str, optimizer: str) -> None:
    arch = architecture(name, **({"sizes": (5, 6, 3)} if name == "mlp" else {}))
    inputs, labels_Q = data(arch)
    theta_BP = initialise(arch, ["normal"] * 3, [1, 2, 3]).double()
    settings = {"epochs": 3, "batch_size": 8, "optimizer": optimizer, "seed": 4}
    together = [
        (e.theta_BP.clone(), e.loss_B)
        for e in fit(
            arch, theta_BP, inputs, labels_Q, lr_B=torch.tensor(LR), weight_decay_B=torch.tensor(DECAY), **settings
        )
    ]
    for b, (lr, decay) in enumerate(zip(LR, DECAY, strict=True)):
        theta_P = theta_BP[b].clone().requires_grad_()
        lr, decay = float(torch.tensor(lr)), float(torch.tensor(decay))  # as float32 holds them
        update = OPTIMIZERS[optimizer](theta_P, lr, decay)
        order = torch.Generator().manual_seed(4)
        for epoch in range(3):
            total = 0.0
            for batch in torch.randperm(len(inputs), generator=order).split(8):
                loss = F.cross_entropy(arch.forward(theta_P[None], inputs[batch])[0], labels_Q[batch])
                update.zero_grad()
                loss.backward()
                update.step()
                total += float(loss.detach()) * len(batch)
            torch.testing.assert_close(together[epoch][0][b], theta_P.detach(), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(float(together[epoch][1][b]), total / len(inputs), rtol=1e-9, atol=0)


def test_the_given_weights_are_left_alone() -> None:
    arch = mlp((5, 6, 3))
    theta_BP = initialise(arch, ["normal"], [1]).double()
    before = theta_BP.clone()
    list(fit(arch, theta_BP, *data(arch), epochs=1, lr_B=torch.tensor([0.1])))
    assert torch.equal(theta_BP, before)


def test_a_diverging_model_does_not_touch_its_neighbours() -> None:
    arch = mlp((5, 6, 3), "relu")
    inputs, labels_Q = data(arch)
    theta_BP = initialise(arch, ["normal"] * 2, [1, 2]).double()
    theta_BP[1] = float("inf")
    (alone,) = fit(arch, theta_BP[:1], inputs, labels_Q, epochs=1, lr_B=torch.tensor([0.01]))
    (both,) = fit(arch, theta_BP, inputs, labels_Q, epochs=1, lr_B=torch.tensor([0.01, 0.01]))
    torch.testing.assert_close(both.theta_BP[0], alone.theta_BP[0], rtol=1e-12, atol=1e-12)
    assert not both.theta_BP[1].isfinite().all()


def test_cross_entropy_of_classes_and_of_probabilities_agree_with_torch() -> None:
    logits_BQC = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)).double()
    labels_Q = torch.arange(7) % 4
    expected_B = torch.stack([F.cross_entropy(logits, labels_Q) for logits in logits_BQC])
    torch.testing.assert_close(cross_entropy(logits_BQC, labels_Q), expected_B)
    one_hot_QC = F.one_hot(labels_Q, 4).double()
    torch.testing.assert_close(cross_entropy(logits_BQC, one_hot_QC), expected_B)
    torch.testing.assert_close(cross_entropy(logits_BQC, one_hot_QC.expand(3, -1, -1)), expected_B)


def test_evaluation_in_chunks_equals_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = architecture("cnn_small")
    inputs, labels_Q = data(arch, 50)
    theta_BP = initialise(arch, ["kaiming_normal"] * 7, range(7)).double()
    monkeypatch.setattr(evaluation, "CHUNK_NUMBERS", 3 * 50 * 64 * 54)
    assert evaluation.models_per_chunk(arch, 50) == 3
    scores, logits_BQC = evaluate(arch, theta_BP, inputs, labels_Q), outputs(arch, theta_BP, inputs)
    for b in range(7):
        expected_QC = arch.forward(theta_BP[b : b + 1], inputs)[0]
        torch.testing.assert_close(logits_BQC[b], expected_QC, rtol=1e-12, atol=1e-12)
        assert torch.equal(scores.predictions_BQ[b], expected_QC.argmax(1))
        assert float(scores.accuracy_B[b]) == pytest.approx(float((expected_QC.argmax(1) == labels_Q).double().mean()))
        torch.testing.assert_close(scores.loss_B[b], F.cross_entropy(expected_QC, labels_Q))


def test_an_mlp_is_evaluated_on_images_which_it_reads_flattened() -> None:
    arch = mlp((12, 3))
    theta_BP, images = initialise(arch, ["normal"] * 2, [1, 2]), torch.randn(5, 3, 2, 2)
    labels_Q = torch.tensor([0, 1, 2, 0, 1])
    scores, expected = evaluate(arch, theta_BP, images, labels_Q), evaluate(arch, theta_BP, images.flatten(1), labels_Q)
    assert torch.equal(scores.predictions_BQ, expected.predictions_BQ)
    assert torch.equal(outputs(arch, theta_BP, images), arch.forward(theta_BP, images.flatten(1)))
    with pytest.raises(UserError, match=r"images have shape \(4, 2, 2\), mlp reads \(12,\)"):
        evaluate(arch, theta_BP, torch.randn(5, 4, 2, 2), labels_Q)


LAWS = {  # deviation and largest possible weight, in units of 1 / sqrt(fan_in)
    "uniform": (3**-0.5, 1.0),
    "normal": (1.0, None),
    "kaiming_uniform": (2**0.5, 6**0.5),
    "kaiming_normal": (2**0.5, None),
}


@pytest.mark.parametrize("kind", INITIALISATIONS)
def test_initial_weights_follow_their_law(kind: str) -> None:
    arch = mlp((50, 400, 3))
    theta_BP = initialise(arch, [kind, kind], [1, 2], [1.0, 0.5])
    (weight, bias), _ = arch.weights_and_biases(theta_BP)
    deviation, largest = LAWS[kind]
    scaled = weight[0] * 50**0.5
    assert float(scaled.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(scaled.mean())) < 0.03
    if largest is not None:
        assert 0.99 * largest < float(scaled.abs().max()) <= largest
    assert torch.equal(bias, torch.full_like(bias, 0.01))
    assert float(weight[1].std() / weight[0].std()) == pytest.approx(0.5, rel=0.03)


def test_a_models_initial_weights_depend_on_its_seed_alone() -> None:
    arch = mlp((5, 6, 3))
    group = initialise(arch, ["normal", "uniform", "normal"], [3, 4, 5])
    assert torch.equal(initialise(arch, ["normal"], [5])[0], group[2])
    assert not torch.equal(group[0], group[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: initialise(a, ["kaiming"], [0]), "did you mean 'kaiming_"),
        (
            lambda a: next(fit(a, torch.zeros(1, 45), *data(a), epochs=1, lr_B=torch.ones(1), optimizer="adamw")),
            "did you mean 'adam'",
        ),
    ],
)
def test_unknown_names_are_refused(call, message: str) -> None:
    arch = mlp((5, 4, 3))
    with pytest.raises(UserError, match=message):
        call(arch)
