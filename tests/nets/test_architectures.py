"""Sizes, index maps, and the forward pass against torch.nn."""

import pytest
import torch
from torch import nn

from distrecon.errors import UserError
from distrecon.nets import ACTIVATIONS, Architecture, architecture, initialise
from distrecon.nets.known import mlp

MODULES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}

ARCHITECTURES = {
    "mlp": {"sizes": (5, 4, 3, 2)},
    "cnn_small": {},
    "cnn3": {"image_size": 32, "in_channels": 3},
    "lenet5": {"image_size": 28, "in_channels": 1},
    "zoo_cnn": {},
    "zoo_cnn2": {"in_channels": 3},
}

SIZES = {  # name, options -> parameters, tokens, token size
    ("cnn_small", ()): (1198, 40, 55),
    ("cnn3", ()): (10853, 93, 289),
    ("zoo_cnn", ()): (2464, 8 + 6 + 4 + 20 + 10, 201),
    ("lenet5", ()): (62006, 6 + 16 + 120 + 84 + 10, 401),
}


class G(nn.Module):
    """The activation of Expand-and-Cluster that has no symmetry."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(4 * x) + nn.functional.softplus(x)


def reference(arch: Architecture) -> nn.Sequential:
    """The architecture as torch modules, written independently of the index maps."""
    modules: list[nn.Module] = []
    flat = len(arch.input_shape) == 1
    for i, layer in enumerate(arch.layers):
        if layer.kernel:
            modules.append(nn.Conv2d(layer.in_features, layer.out_features, layer.kernel, padding=layer.padding))
            if layer.pool > 1:
                modules.append(nn.MaxPool2d(layer.pool))
        else:
            if not flat:
                modules.append(nn.Flatten())
                flat = True
            modules.append(nn.Linear(layer.in_features, layer.out_features))
        if i + 1 < len(arch.layers):
            modules.append(MODULES[arch.activation]() if arch.activation in MODULES else G())
    return nn.Sequential(*modules).double()


def load(module: nn.Sequential, arch: Architecture, theta_P: torch.Tensor) -> None:
    state = arch.unflatten(theta_P)
    weighted = [m for m in module if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, own in zip(arch.layers, weighted, strict=True):
        own.load_state_dict({"weight": state[f"{layer.name}.weight"], "bias": state[f"{layer.name}.bias"]})


def random_models(arch: Architecture, count: int, seed: int = 0) -> torch.Tensor:
    """theta[B, P] with biases that matter, in float64."""
    theta_BP = initialise(arch, ["kaiming_normal"] * count, range(seed, seed + count)).double()
    return theta_BP + 0.1 * torch.randn(theta_BP.shape, generator=torch.Generator().manual_seed(seed)).double()


def random_inputs(arch: Architecture, count: int) -> torch.Tensor:
    return torch.randn(count, *arch.input_shape, generator=torch.Generator().manual_seed(9)).double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_and_gradient_equal_torch_modules(name: str, activation: str) -> None:
    arch = architecture(name, activation=activation, **ARCHITECTURES[name])
    theta_BP, inputs = random_models(arch, 2).requires_grad_(), random_inputs(arch, 3)
    logits_BQC = arch.forward(theta_BP, inputs)
    (gradient_BP,) = torch.autograd.grad(logits_BQC.square().sum(), theta_BP)
    for b in range(2):
        module = reference(arch)
        load(module, arch, theta_BP[b].detach())
        expected_QC = module(inputs)
        torch.testing.assert_close(logits_BQC[b].detach(), expected_QC.detach(), rtol=1e-10, atol=1e-10)
        expected_QC.square().sum().backward()
        expected_P = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(gradient_BP[b], expected_P, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), SIZES)
def test_sizes_of_the_published_architectures(name: str, options: tuple[()]) -> None:
    arch = architecture(name, **dict(options))
    assert (arch.num_parameters, arch.num_tokens, arch.token_size) == SIZES[name, options]
    assert sum(p.numel() for p in reference(arch).parameters()) == arch.num_parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_hold_every_parameter_once_and_give_it_back(name: str) -> None:
    arch = architecture(name, **ARCHITECTURES[name])
    theta_BP = random_models(arch, 2)
    tokens_BTD = arch.tokenize(theta_BP)
    assert tokens_BTD.shape == (2, arch.num_tokens, arch.token_size)
    assert torch.equal(arch.detokenize(tokens_BTD), theta_BP)
    assert int(arch.token_mask_TD.sum()) == arch.num_parameters
    assert not tokens_BTD[:, ~arch.token_mask_TD].any()
    garbage = tokens_BTD.clone()
    garbage[:, ~arch.token_mask_TD] = 7.0
    assert torch.equal(arch.detokenize(garbage), theta_BP)


def test_a_token_is_an_output_channel_with_its_bias_last() -> None:
    arch = architecture("cnn3")
    theta_BP = random_models(arch, 1)
    tokens_BTD, state = arch.tokenize(theta_BP), arch.unflatten(theta_BP[0])
    channel = 5
    row = int((arch.token_positions_T3[:, 1:] == torch.tensor([1, channel])).all(1).nonzero())
    assert row == 16 + channel
    weight = state["conv2.weight"][channel].flatten()
    assert torch.equal(tokens_BTD[0, row, : len(weight)], weight)
    assert tokens_BTD[0, row, len(weight)] == state["conv2.bias"][channel]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_state_dict_and_plain_data_round_trips(name: str) -> None:
    arch = architecture(name, **ARCHITECTURES[name])
    theta_P = random_models(arch, 1)[0]
    assert torch.equal(arch.flatten(arch.unflatten(theta_P)), theta_P)
    assert Architecture.from_dict(arch.to_dict()) == arch


def broken(state: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    if case == "missing":
        return {k: v for k, v in state.items() if k != "layers.1.bias"}
    if case == "unknown":
        return {**state, "layers.7.bias": torch.zeros(1)}
    return {**state, "layers.0.weight": state["layers.0.weight"].T}


@pytest.mark.parametrize(
    ("case", "named"), [("missing", "layers.1.bias"), ("unknown", "layers.7.bias"), ("shape", "layers.0.weight")]
)
def test_flatten_names_the_entry_that_does_not_fit(case: str, named: str) -> None:
    arch = mlp((3, 4, 2))
    state = arch.unflatten(random_models(arch, 1)[0])
    with pytest.raises(UserError, match=named):
        arch.flatten(broken(state, case))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: architecture("cnn4"), "did you mean 'cnn3'"),
        (lambda: architecture("cnn3", image_size=8), "too small"),
        (lambda: architecture("cnn3", depth=8), "depth"),
        (lambda: mlp((4,)), "at least two"),
        (lambda: mlp((4, 2), "rleu"), "did you mean 'relu'"),
        (lambda: mlp((4, 2)).forward(torch.zeros(1, 10), torch.zeros(1, 3)), "reads inputs of shape"),
        (lambda: mlp((4, 2)).forward(torch.zeros(1, 11), torch.zeros(1, 4)), "10 parameters a model"),
        (lambda: mlp((4, 2)).detokenize(torch.zeros(1, 2, 4)), "tokens of shape"),
    ],
)
def test_wrong_requests_are_said_in_one_line(build, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
