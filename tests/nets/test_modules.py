"""Any torch module as an architecture: its groups are those worked out by hand, and what rests on them holds."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distrecon.errors import UserError
from distrecon.nets import Architecture, ModuleArchitecture, align, architecture, permute, random_permutation
from distrecon.nets.trace import of_module, random_models
from tests.nets.module_networks import NETWORKS, TorchTransformer

NAMES = [*NETWORKS, "transformer"]

# Sizes of the groups in the order in which the network makes them; (n, k): n units in each of group k.
GROUPS = {
    "mlp": [7, 6],
    "strided_cnn": [5, 6],
    "pooled_cnn": [4, 6],
    # a stage's residual stream is one group, and each block has one inside (Git Re-Basin, table of ResNet20)
    "resnet20": [16, 16, 16, 16, 32, 32, 32, 32, 64, 64, 64, 64],
    # the stream of a stage is that of the stage before between two groups of channels that begin as zeros
    "padded_resnet": [4, 4, 8, 2, 2, 16, 4, 4],
    "mobilenet": [6, 10],  # the depthwise filters belong to the expanded channels
    "densenet": [5, 3, 3, 3, 6],
    # stream; heads, in each head the channels of queries and keys, and those of values; hidden units
    "vit": [12, 3, (4, 1), (4, 1), 24, 3, (4, 5), (4, 5), 24],
    # the grouped convolution reads 2 groups of 4 channels and gives as many, whose channels have orders of their own
    "cnn_1d": [6, 2, (4, 1), (4, 1)],
    "transformer": [8, 2, (4, 1), (4, 1), 16],
}


@cache
def case(name: str) -> tuple[nn.Module, ModuleArchitecture, Tensor]:
    """The module, its architecture, and inputs in float64 (or whole numbers)."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    if name == "transformer":
        module, inputs = TorchTransformer().eval(), torch.randint(0, 11, (3, 4), generator=draw)
        return module, of_module(module, inputs), inputs
    make, shape = NETWORKS[name]
    module, inputs = make().eval(), torch.randn(3, *shape, generator=draw)
    return module, of_module(module, inputs), inputs.double()


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_are_those_of_the_network(name: str) -> None:
    arch = case(name)[1]
    found = [group.size if group.within is None else (group.size, group.within) for group in arch.groups]
    assert found == GROUPS[name]
    assert arch.table.notes == ()
    for group in arch.groups:
        assert group.name in arch.describe()


@pytest.mark.parametrize("name", NAMES)
def test_many_models_at_once_are_the_module_and_its_state_dicts(name: str) -> None:
    module, arch, inputs = case(name)
    theta_BP = random_models(arch, 3)
    outputs_BQC = arch.forward(theta_BP, inputs)
    assert outputs_BQC.shape == (3, len(inputs), arch.num_outputs)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for theta_P, outputs_QC in zip(theta_BP, outputs_BQC, strict=True):
        state = arch.unflatten(theta_P)
        module.double().load_state_dict(state)  # strictly
        torch.testing.assert_close(module(inputs), outputs_QC, rtol=0, atol=1e-10)
        assert torch.equal(arch.flatten(module.state_dict()), theta_P)
    module.float().load_state_dict(before)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_all_groups_keeps_every_function(name: str) -> None:
    _, arch, inputs = case(name)
    theta_BP = random_models(arch, 2)
    permuted_BP = permute(arch, theta_BP, random_permutation(arch, torch.Generator().manual_seed(2), 2))
    assert torch.equal(permuted_BP.sort(1).values, theta_BP.sort(1).values)
    assert float((permuted_BP != theta_BP).double().mean()) > 0.5
    torch.testing.assert_close(arch.forward(permuted_BP, inputs), arch.forward(theta_BP, inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_each_group_is_moved_by_its_own_order_alone(name: str) -> None:
    """A group that permuted nothing, or what belongs to another, would show here."""
    _, arch, inputs = case(name)
    theta_BP = random_models(arch, 1)
    outputs_BQC = arch.forward(theta_BP, inputs)
    orders = random_permutation(arch, torch.Generator().manual_seed(5), 1)
    for i, group in enumerate(arch.groups):
        alone = [torch.arange(g.size).repeat(g.blocks)[None] for g in arch.groups]
        alone[i] = torch.arange(group.size).roll(1).repeat(group.blocks)[None]
        moved_BP = permute(arch, theta_BP, alone)
        assert not torch.equal(moved_BP, theta_BP)
        torch.testing.assert_close(arch.forward(moved_BP, inputs), outputs_BQC, rtol=0, atol=1e-10)
    assert len(orders) == len(arch.groups)


@pytest.mark.parametrize("name", NAMES)
def test_alignment_finds_the_exact_permutation(name: str) -> None:
    arch = case(name)[1]
    theta_P = random_models(arch, 1)[0]
    planted = random_permutation(arch, torch.Generator().manual_seed(3), 2)
    permuted_BP = permute(arch, theta_P.expand(2, -1), planted)
    assert (permuted_BP - theta_P).norm(dim=1).min() > 0.1
    assert torch.equal(align(arch, permuted_BP, theta_P), theta_P.expand(2, -1))


@pytest.mark.parametrize("name", ["padded_resnet", "vit", "cnn_1d"])
def test_alignment_never_increases_the_distance_and_keeps_the_functions(name: str) -> None:
    _, arch, inputs = case(name)
    theta_BP, reference_P = random_models(arch, 3, seed=1), random_models(arch, 1, seed=7)[0]
    theta_BP = permute(arch, theta_BP, random_permutation(arch, torch.Generator().manual_seed(0), 3))
    aligned_BP = align(arch, theta_BP, reference_P)
    before_B, after_B = ((t - reference_P).norm(dim=1) for t in (theta_BP, aligned_BP))
    assert (after_B < before_B).all()
    torch.testing.assert_close(arch.forward(aligned_BP, inputs), arch.forward(theta_BP, inputs), rtol=0, atol=1e-10)
    assert (align(arch, reference_P[None], reference_P) == reference_P).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [None, 7])
def test_tokens_are_the_parameters_each_once(name: str, piece: int | None) -> None:
    arch = case(name)[1].with_pieces(piece)
    theta_BP = torch.arange(1.0, arch.num_parameters + 1).repeat(2, 1)
    tokens_BTD = arch.tokenize(theta_BP)
    assert tokens_BTD.shape == (2, arch.num_tokens, arch.token_size)
    assert arch.token_size == piece or piece is None
    assert torch.equal(tokens_BTD[0][arch.token_mask_TD].sort().values, theta_BP[0])
    assert not tokens_BTD[:, ~arch.token_mask_TD].any()
    assert torch.equal(arch.detokenize(tokens_BTD + ~arch.token_mask_TD), theta_BP)
    positions_T3 = arch.token_positions_T3
    assert positions_T3[:, 0].tolist() == [*range(arch.num_tokens)]
    assert int(positions_T3[:, 1].max()) + 1 == len(arch.layer_names)


def test_a_token_is_an_output_channel_with_its_bias_and_normalisation() -> None:
    arch = case("resnet20")[1]
    state = {name: torch.full(shape, -1.0) for name, shape in arch.state_shapes().items()}
    state["layer2.0.conv1.weight"][3] = 1
    for value, name in enumerate(("weight", "bias", "running_mean", "running_var"), 2):
        state[f"layer2.0.bn1.{name}"][3] = value
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    tokens_TD = arch.tokenize(arch.flatten(state)[None])[0]
    (row,) = (tokens_TD[:, 0] == 1).nonzero()[:, 0].tolist()
    assert tokens_TD[row][arch.token_mask_TD[row]].tolist() == [1.0] * (16 * 9) + [2, 3, 4, 5]
    layer = arch.layer_names.index("layer2.0.conv1")
    assert arch.token_positions_T3[row].tolist() == [row, layer, 3]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_plain_data(name: str) -> None:
    arch = case(name)[1]
    again = Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert again == arch
    assert again.same_networks(arch)
    theta_BP = random_models(arch, 1)
    with pytest.raises(UserError, match="--module"):
        again.forward(theta_BP, case(name)[2])
    with pytest.raises(UserError, match="in the module"):
        again.with_module(nn.Linear(3, 3))
    running = again.with_module(case(name)[0])
    assert torch.equal(running.forward(theta_BP, case(name)[2]), arch.forward(theta_BP, case(name)[2]))


# -- chains are a case -------------------------------------------------------------------------------------------------


def as_module(name: str) -> nn.Module:
    """The known networks in torch, with their layers' names."""
    arch = architecture(name) if name != "mlp" else architecture("mlp", sizes=(5, 7, 4, 3))
    acts = {"relu": nn.ReLU(), "tanh": nn.Tanh()}

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for layer in arch.layers:
                made = (
                    nn.Conv2d(layer.in_features, layer.out_features, layer.kernel, padding=layer.padding)
                    if layer.kernel
                    else nn.Linear(layer.in_features, layer.out_features)
                )
                self.add_module(layer.name.replace(".", "_"), made)

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(arch.layers):
                x = self.get_submodule(layer.name.replace(".", "_"))(x if layer.kernel else x.flatten(1))
                x = F.max_pool2d(x, layer.pool) if layer.pool > 1 else x
                x = acts[arch.activation](x) if i + 1 < len(arch.layers) else x
            return x

    return Known()


def unnamed(arch: Architecture) -> list[list[tuple[object, ...]]]:
    table = arch.table
    return [
        [(entry.shape, entry.axes, entry.role) for entry in table.entries],
        [(group.size, group.within) for group in table.groups],
        [(layer.rows, layer.entries) for layer in table.layers],
    ]


@pytest.mark.parametrize("name", ["mlp", "cnn_small", "cnn3", "lenet5", "zoo_cnn"])
def test_known_networks_have_the_table_that_tracing_derives(name: str) -> None:
    chain = architecture(name) if name != "mlp" else architecture("mlp", sizes=(5, 7, 4, 3))
    traced = of_module(as_module(name), torch.randn(2, *chain.input_shape))
    assert unnamed(traced) == unnamed(chain)
    theta_BP = random_models(traced, 2).float()
    assert torch.equal(traced.tokenize(theta_BP), chain.tokenize(theta_BP))
    inputs = torch.randn(3, *chain.input_shape)
    torch.testing.assert_close(traced.forward(theta_BP, inputs), chain.forward(theta_BP, inputs), rtol=1e-4, atol=1e-5)


# -- random networks ---------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A chain of convolutions with what a draw adds: strides, normalisation, residual sums, concatenation."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps, channels = steps, 2
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.sizes = []
        for kind, width in steps:
            out = channels if kind == "residual" else width
            self.convs.append(nn.Conv2d(channels, out, 3, 2 if kind == "strided" else 1, 1, bias=kind != "norm"))
            self.norms.append(nn.BatchNorm2d(out) if kind in ("norm", "residual") else nn.Identity())
            channels = channels + out if kind == "cat" else out
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        for (kind, _), conv, norm in zip(self.steps, self.convs, self.norms, strict=True):
            y = torch.tanh(norm(conv(x)))
            x = x + y if kind == "residual" else torch.cat([y, x], 1) if kind == "cat" else y
        return self.head(x.mean((2, 3)))


STEPS = st.lists(
    st.tuples(st.sampled_from(["plain", "strided", "norm", "residual", "cat"]), st.integers(2, 5)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=12, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 2**20))
def test_random_graphs_keep_their_functions_and_are_aligned(steps: list[tuple[str, int]], seed: int) -> None:
    torch.manual_seed(seed)
    module, inputs = Random(steps).eval(), torch.randn(2, 2, 6, 6)
    arch = of_module(module, inputs)
    streams = [width for kind, width in steps if kind != "residual"]  # what begins a stream; a residual step joins one
    assert sum(group.size for group in arch.groups) <= sum(streams)
    if len(streams) == len(steps):
        assert sorted(group.size for group in arch.groups) == sorted(streams)
    assert arch.table.notes == ()
    theta_BP = random_models(arch, 2, seed)
    permuted_BP = permute(arch, theta_BP, random_permutation(arch, torch.Generator().manual_seed(seed), 2))
    outputs = [arch.forward(t, inputs.double()) for t in (theta_BP, permuted_BP)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    assert torch.equal(align(arch, permuted_BP[:1], theta_BP[0]), theta_BP[:1])
    module.double().load_state_dict(arch.unflatten(theta_BP[0]))
    torch.testing.assert_close(module(inputs.double()), outputs[0][0], rtol=0, atol=1e-10)
