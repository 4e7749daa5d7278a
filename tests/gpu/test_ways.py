"""The ways in which a step goes on a GPU, taken on the CPU: what it does must be what a step on the CPU does."""

import shutil

import pytest
import torch

from distrecon.autoencoder import Batch, Training, ZooSample, training
from distrecon.autoencoder.transformer import Block
from distrecon.errors import UserError
from distrecon.images import load
from distrecon.nets import architecture
from tests.autoencoder.small import related_models, tiny


@pytest.fixture(scope="module")
def zoo() -> ZooSample:
    arch = architecture("cnn_small")
    return ZooSample(arch, related_models(arch, 24), load("digits"))


def batches(zoo: ZooSample, steps: range) -> list[Batch]:
    """Epochs of four steps of six models."""
    rows = [torch.arange(6) + 6 * (step % 4) for step in steps]
    return [
        Batch(step // 4, step % 4, 0, row_b, zoo.sample_BP[row_b], 6, 0, last=step % 4 == 3)
        for step, row_b in zip(steps, rows, strict=True)
    ]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "computes_at_once", lambda device: False)


def history(made: Training, zoo: ZooSample, steps: range) -> list[dict[str, float]]:
    found = list(made.steps(batches(zoo, steps)))
    assert [(batch.epoch, batch.step) for batch, _ in found] == [(step // 4, step % 4) for step in steps]
    return [losses for _, losses in found]


@pytest.mark.parametrize(
    "values",
    [{}, {"data__views": "permutation", "data__align": False}, {"data__mix": 0.5, "loss__lam": 0.1}],
    ids=["noise", "permutation", "mixed"],
)
def test_a_step_is_the_same(zoo, values, request) -> None:
    config = tiny(optim__precision="float64", data__target_precision="float64", **values)
    on_cpu = Training(config, [zoo], 12)
    expected = history(on_cpu, zoo, range(9))
    request.getfixturevalue("as_on_a_gpu")
    other = Training(config, [zoo], 12)
    found = history(other, zoo, range(9))
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, rel=1e-9)
    for one, two in zip(on_cpu.autoencoder.parameters(), other.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_a_training_goes_on_on_the_other_device(zoo, request, tmp_path) -> None:
    config = tiny(optim__precision="float64", data__target_precision="float64")
    expected = history(Training(config, [zoo], 12), zoo, range(8))
    first = Training(config, [zoo], 12)
    history(first, zoo, range(4))
    torch.save(first.state_dict(), tmp_path / "cpu.pt")
    request.getfixturevalue("as_on_a_gpu")
    second = Training(config, [zoo], 12)
    second.load_state_dict(torch.load(tmp_path / "cpu.pt", weights_only=True))
    for one, two in zip(expected[4:6], history(second, zoo, range(4, 6)), strict=True):
        assert two == pytest.approx(one, rel=1e-9)
    torch.save(second.state_dict(), tmp_path / "gpu.pt")
    request.getfixturevalue("monkeypatch").undo()
    third = Training(config, [zoo], 12)
    third.load_state_dict(torch.load(tmp_path / "gpu.pt", weights_only=True))
    for one, two in zip(expected[6:], history(third, zoo, range(6, 8)), strict=True):
        assert two == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("bad", [1, 3])
def test_a_loss_that_is_not_finite_is_told_before_the_epoch_ends(zoo, as_on_a_gpu, bad: int) -> None:
    """One step late, but in the last step of an epoch at once."""
    given = batches(zoo, range(8))
    given[bad].theta_bP[4] = 1e25
    read = []
    steps = Training(tiny(data__align=False, loss__terms="B"), [zoo], 8).steps(given)
    with pytest.raises(UserError, match=rf"loss of row {6 * bad + 4} .*epoch 0, step {bad}"):
        read.extend(batch.step for batch, _ in steps)
    assert read == list(range(bad))


def test_a_step_in_bf16_computes_from_a_smaller_copy(zoo, as_on_a_gpu) -> None:
    made = Training(tiny(optim__precision="bf16", optim__lr=1e-2), [zoo], 12)
    found = history(made, zoo, range(12))
    assert made.flat.vector.dtype == torch.float32 == made.flat.vector.grad.dtype
    assert found[-1]["loss/total"] < found[0]["loss/total"]


@pytest.mark.slow  # a minute of compiling
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("kind", ["transformer", "kronecker_residual"])
def test_a_compiled_transformer_computes_the_same(zoo: ZooSample, kind: str, as_on_a_gpu: None) -> None:
    plain, compiled = (
        Training(tiny(optim__compile=asked, model__kind=kind, model__layers=2), [zoo], 4) for asked in (False, True)
    )
    assert [*compiled.autoencoder.state_dict()] == [*plain.autoencoder.state_dict()]
    for expected, found in zip(history(plain, zoo, range(4)), history(compiled, zoo, range(4)), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert any(isinstance(m, Block) and m._compiled_call_impl is not None for m in compiled.autoencoder.modules())
    assert not any(m._compiled_call_impl is not None for m in plain.autoencoder.modules())
