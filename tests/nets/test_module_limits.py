"""Torch modules at the limits of what is read: no rule, wrong rules, what cannot run, tied and counted tensors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.errors import UserError
from distrecon.nets.trace import _proved, of_module, random_models
from tests.nets.module_networks import ResNet20, TorchTransformer


def test_an_operation_without_a_rule_keeps_its_axes_in_order_and_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 5), nn.Linear(5, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.above(self.below(x).cumsum(1))))

    arch = of_module(Sorted(), torch.randn(2, 3))
    assert [group.size for group in arch.groups] == [4]
    (note,) = arch.table.notes
    assert "cumsum" in note
    assert "cumsum" in arch.describe()


def test_softmax_over_heads_ties_the_channels_of_all_heads() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.above(self.below(x).view(len(x), 2, 3).softmax(1).flatten(1))

    arch = of_module(Mixed(), torch.randn(2, 3))
    assert [(group.size, group.within) for group in arch.groups] == [(2, None), (3, None)]
    assert arch.table.notes == ()


def test_a_wrong_rule_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from distrecon.nets import rules

    monkeypatch.setitem(rules.RULES, "cumsum", rules.pointwise)
    net = nn.Sequential(nn.Linear(3, 5), Cumulated(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    arch = of_module(net, torch.randn(2, 3))
    assert [group.size for group in arch.groups] == [4]
    assert "changed the outputs: 0" in arch.table.notes[0]


class Cumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Unbatched(nn.Module):
    """Reads a number of its weights out into Python, which no batch of models can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.places = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)[:, torch.nonzero(self.places)[:, 0]]


def test_what_cannot_run_for_many_models_is_named() -> None:
    with pytest.raises(UserError, match="Unbatched") as error:
        of_module(Unbatched(), torch.randn(2, 3))
    assert "nonzero" in str(error.value)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("module", "inputs", "named"),
    [
        (Recurrent(), torch.randn(2, 4, 3), "aten.lstm.input at lstm of lstm"),
        (
            Deciding(),
            torch.randn(2, 3),
            r"Deciding cannot be traced .*test_module_limits.py.*: return self.last\(x if x.sum\(\) > 0",
        ),
        (nn.Bilinear(3, 3, 2), torch.randn(2, 3), "missing a required argument: 'input2'"),
    ],
)
def test_what_is_not_supported_is_said_in_one_line(module: nn.Module, inputs: Tensor, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        of_module(module, inputs)
    assert "\n" not in str(error.value)


def test_normalisation_by_running_statistics_of_each_input_has_gradients_and_normed_weights_a_rule() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(12, 5)),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).eval()
    inputs = torch.randn(2, 2, 5).double()
    arch = of_module(module, inputs.float())
    assert [group.size for group in arch.groups] == [4, 5]
    assert arch.table.notes == ()
    theta_BP = random_models(arch, 2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda theta: arch.forward(theta, inputs), theta_BP[:1].detach().requires_grad_())


def test_outputs_must_be_a_matrix() -> None:
    with pytest.raises(UserError, match=r"one tensor \[inputs, outputs\]"):
        of_module(nn.Conv2d(1, 2, 3), torch.randn(2, 1, 5, 5))


def test_a_tied_tensor_is_one_and_must_stay_one() -> None:
    module = TorchTransformer().eval()
    arch = of_module(module, torch.randint(0, 11, (3, 4)))
    assert arch.num_parameters == sum(p.numel() for p in module.parameters())
    state = arch.unflatten(random_models(arch, 1)[0])
    assert torch.equal(state["head.weight"], state["embedding.weight"])
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(UserError, match=r"head\.weight"):
        arch.flatten(state)


def test_training_moves_weights_and_statistics_as_torch_does() -> None:
    """One step of plain gradient descent on a batch-normalised network, for two models at once."""
    from distrecon.nets import fit

    torch.manual_seed(0)
    module, inputs, labels = ResNet20(4, 1), torch.randn(6, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3, 4, 5])
    arch = of_module(module, inputs)
    theta_BP = random_models(arch, 2)
    lr_B = torch.full((2,), 0.1, dtype=torch.float64)
    (epoch,) = fit(arch, theta_BP, inputs, labels, epochs=1, lr_B=lr_B, batch_size=6, optimizer="sgd")
    for theta_P, after_P in zip(theta_BP, epoch.theta_BP, strict=True):
        one = ResNet20(4, 1).double()
        one.load_state_dict(arch.unflatten(theta_P))
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        F.cross_entropy(one(inputs[order]), labels[order]).backward()
        optimizer.step()
        torch.testing.assert_close(arch.flatten(one.state_dict()), after_P, rtol=1e-8, atol=1e-10)


def test_remeasured_statistics_are_those_of_the_inputs() -> None:
    torch.manual_seed(0)
    arch = of_module(ResNet20(4, 1), torch.randn(2, 3, 8, 8))
    theta_BP, inputs = random_models(arch, 2), torch.randn(40, 3, 8, 8).double()
    again_BP = arch.remeasured(theta_BP, inputs)
    first = arch.unflatten(again_BP[1])
    hidden = F.conv2d(inputs, first["conv1.weight"], padding=1)
    torch.testing.assert_close(first["bn1.running_mean"], hidden.mean((0, 2, 3)))
    torch.testing.assert_close(first["bn1.running_var"], hidden.var((0, 2, 3)))
    moved = {
        e.role
        for e, a, b in zip(arch.table.entries, *map(arch.table.tensors, (theta_BP, again_BP)), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {"mean", "variance"}


# -- limits and proofs  -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A linear layer beside whole numbers that it keeps."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("index", torch.zeros(numbers, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_very_many_whole_numbers_are_no_constant() -> None:
    """65,536 of them are kept with the architecture, one more is refused."""
    assert of_module(Counting(65_536), torch.randn(2, 3)).table.constants[0].shape == (65_536,)
    with pytest.raises(UserError, match=r"index holds 65537 whole numbers, more than 65536"):
        of_module(Counting(65_537), torch.randn(2, 3))


def test_a_group_whose_permutation_changes_the_outputs_is_kept_in_order() -> None:
    """As a mistake of a rule would make one: the units of the hidden layer, of which only the rows are said to move."""
    arch = of_module(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3))
    assert len(arch.groups) == 1
    theta_BP, inputs = random_models(arch, 2), torch.randn(4, 3, dtype=torch.float64)
    outputs = arch.forward(theta_BP, inputs)
    assert _proved(arch, theta_BP, inputs, outputs) is arch
    last = arch.table.entries[-2]
    assert last.shape == (2, 4)
    unmoved = replace(last, axes=tuple(tuple(tuple((None, n) for _, n in s) for s in axis) for axis in last.axes))
    entries = tuple(unmoved if entry is last else entry for entry in arch.table.entries)
    wrong = replace(arch, table=replace(arch.table, entries=entries))
    assert not _proved(wrong, theta_BP, inputs, outputs).groups


class Heads(nn.Module):
    """Attention of two heads, written with matrix products of tensors of four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(len(x), -1, 2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(len(x), -1, 6)).mean(1)


def test_heads_of_plain_matrix_products_permute_together() -> None:
    """By hand: the two heads, the three units that queries and keys share, and those of the values in each head."""
    arch = of_module(Heads(), torch.randn(2, 5, 6))
    assert sorted(group.size for group in arch.groups) == [2, 3, 3]
