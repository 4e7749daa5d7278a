"""The fast kernels agree with the plain differentiable path, for every block size, number type and transform."""

import time
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from distrecon.nets import ACTIVATIONS, Architecture, architecture, initialise, outputs, plain
from distrecon.nets.convolution import blocks, direct, loops, modelwise
from distrecon.nets.convolution.kernel import Kernel
from distrecon.nets.known import cnn

KERNELS = {"direct": direct, "modelwise": modelwise}
SMALL = {"cnn_small": {}, "cnn3": {"image_size": 22}, "lenet5": {"image_size": 16}}


def unusual() -> Architecture:
    """Padding between layers, no pooling at first, pooling by 3 with rows left over, a 1x1 kernel."""
    convolutions = [
        {"name": "a", "out": 5, "kernel": 3},
        {"name": "b", "out": 4, "kernel": 5, "padding": 2, "pool": 3},
        {"name": "c", "out": 3, "kernel": 1},
    ]
    return cnn("unusual", convolutions, [("d", 4)], 2, 13, "relu")


def architectures(activation: str) -> list[Architecture]:
    found = [architecture(name, activation=activation, **options) for name, options in SMALL.items()]
    return [*found, unusual()] if activation == "relu" else found


def models(arch: Architecture, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    theta_BP = initialise(arch, ["kaiming_normal"] * count, range(count)).double()
    return (theta_BP + 0.1 * torch.randn(theta_BP.shape, generator=torch.Generator().manual_seed(0)).double()).to(dtype)


def images(arch: Architecture, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Half of every image is blank, and two images wholly, so that many pools have ties."""
    inputs = torch.randn(count, *arch.input_shape, generator=torch.Generator().manual_seed(1)).double()
    inputs[:, :, : arch.input_shape[1] // 2] = 0
    inputs[:2] = 0
    return inputs.to(dtype)


def gradient(logits_BQC: Tensor, theta_BP: Tensor) -> Tensor:
    weights = torch.arange(logits_BQC.numel(), dtype=logits_BQC.dtype).view(logits_BQC.shape).cos()
    return torch.autograd.grad((logits_BQC.square() * weights).sum(), theta_BP, retain_graph=True)[0]


@pytest.mark.parametrize("numbers", [1, 20_000, 10**9], ids=["one-by-one", "some-blocks", "one-block"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_and_gradients_equal_the_plain_path(
    activation: str, kernel: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KERNELS[kernel], "BLOCK_NUMBERS", numbers)
    for arch in architectures(activation):
        theta_BP, inputs = models(arch, 5).requires_grad_(), images(arch, 7)
        expected_BQC, found_BQC = (
            plain.forward(arch, theta_BP, inputs),
            blocks.forward(arch, theta_BP, inputs, KERNELS[kernel]),
        )
        torch.testing.assert_close(found_BQC, expected_BQC, rtol=1e-9, atol=1e-11)
        expected_BP = gradient(expected_BQC, theta_BP)
        torch.testing.assert_close(gradient(found_BQC, theta_BP), expected_BP, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient(found_BQC, theta_BP), expected_BP, rtol=1e-6, atol=1e-9)  # a second time
        silent_BQC = blocks.forward(arch, theta_BP.detach(), inputs, KERNELS[kernel])
        torch.testing.assert_close(silent_BQC, expected_BQC.detach(), rtol=1e-9, atol=1e-11)


def functional(arch: Architecture, theta_P: Tensor, inputs: Tensor) -> Tensor:
    """One model by torch.nn.functional."""
    hidden = inputs
    for i, (layer, (weight, bias)) in enumerate(zip(arch.layers, arch.weights_and_biases(theta_P[None]), strict=True)):
        if layer.kernel:
            hidden = F.conv2d(hidden, weight[0], bias[0], padding=layer.padding)
            hidden = F.max_pool2d(hidden, layer.pool) if layer.pool > 1 else hidden
        else:
            hidden = F.linear(hidden.flatten(1), weight[0], bias[0])
        hidden = ACTIVATIONS[arch.activation](hidden) if i + 1 < len(arch.layers) else hidden
    return hidden


@pytest.mark.parametrize("path", ["plain", *KERNELS])
def test_every_path_equals_torch_functions_one_model_at_a_time(path: str) -> None:
    for arch in architectures("relu"):
        theta_BP, inputs = models(arch, 3).requires_grad_(), images(arch, 4)
        expected_BQC = torch.stack([functional(arch, theta_P, inputs) for theta_P in theta_BP])
        if path == "plain":
            found_BQC = plain.forward(arch, theta_BP, inputs)
        else:
            found_BQC = blocks.forward(arch, theta_BP, inputs, KERNELS[path])
        torch.testing.assert_close(found_BQC, expected_BQC, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            gradient(found_BQC, theta_BP), gradient(expected_BQC, theta_BP), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("direct", torch.float32), ("modelwise", torch.float32), ("modelwise", torch.bfloat16)]
)
def test_lower_precision_stays_near_double(kernel: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for arch in architectures("tanh"):
        theta_BP, inputs = models(arch, 3, dtype).requires_grad_(), images(arch, 9, dtype)
        found_BQC = blocks.forward(arch, theta_BP, inputs, KERNELS[kernel])
        assert found_BQC.dtype == dtype
        found_BP = torch.autograd.grad(found_BQC.float().square().sum(), theta_BP)[0].double()
        found_BQC = found_BQC.detach()
        exact_BP = theta_BP.detach().double().requires_grad_()
        expected_BQC = plain.forward(arch, exact_BP, inputs.double())
        expected_BP = torch.autograd.grad(expected_BQC.square().sum(), exact_BP)[0]
        expected_BQC = expected_BQC.detach()
        assert float((found_BQC.double() - expected_BQC).norm() / expected_BQC.norm()) < tolerance
        assert float((found_BP - expected_BP).norm() / expected_BP.norm()) < tolerance


def test_autocast_computes_in_its_type_and_returns_gradients_in_that_of_the_weights() -> None:
    arch = architecture("cnn_small")
    theta_BP, inputs = models(arch, 3, torch.float32).requires_grad_(), images(arch, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BQC = arch.forward(theta_BP, inputs)
    assert logits_BQC.dtype == torch.bfloat16
    assert gradient(logits_BQC, theta_BP).dtype == torch.float32
    expected_BQC = arch.forward(theta_BP, inputs)
    assert float((logits_BQC - expected_BQC).detach().norm() / expected_BQC.detach().norm()) < 5e-2


@pytest.fixture
def problem() -> tuple[Architecture, Tensor, Tensor]:
    arch = architecture("cnn_small", image_size=6, activation="tanh")
    return arch, models(arch, 2), images(arch, 3)


def test_second_derivatives_equal_the_plain_path(problem: Any) -> None:
    arch, theta_BP, inputs = problem
    theta_BP.requires_grad_()
    found = []
    for logits_BQC in (arch.forward(theta_BP, inputs), plain.forward(arch, theta_BP, inputs)):
        (first_BP,) = torch.autograd.grad(logits_BQC.square().sum(), theta_BP, create_graph=True)
        found.append(torch.autograd.grad(first_BP.square().sum(), theta_BP)[0])
    assert float(found[1].norm()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_function_transforms_and_forward_mode_work_on_the_public_forward(problem: Any) -> None:
    arch, theta_BP, inputs = problem
    tangent_BP = torch.randn_like(theta_BP)

    def f(theta: Tensor) -> Tensor:
        return arch.forward(theta, inputs)

    _, expected_BQC = torch.func.jvp(lambda theta: plain.forward(arch, theta, inputs), (theta_BP,), (tangent_BP,))
    torch.testing.assert_close(torch.func.jvp(f, (theta_BP,), (tangent_BP,))[1], expected_BQC)
    small = 1e-6 * tangent_BP  # and against a difference of the fast path itself
    difference_BQC = (f(theta_BP + small) - f(theta_BP - small)) / 2e-6
    torch.testing.assert_close(difference_BQC, expected_BQC, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(theta_BP, tangent_BP)))
    torch.testing.assert_close(dual.tangent, expected_BQC)
    one_by_one_BQC = torch.func.vmap(lambda theta_P: f(theta_P[None])[0])(theta_BP)
    torch.testing.assert_close(one_by_one_BQC, f(theta_BP))
    jacobian = torch.func.jacrev(f)(theta_BP)
    torch.testing.assert_close(torch.einsum("bqcdp,dp->bqc", jacobian, tangent_BP), expected_BQC)


def test_gradients_of_the_inputs_equal_the_plain_path(problem: Any) -> None:
    arch, theta_BP, inputs = problem
    inputs.requires_grad_()
    found = gradient(arch.forward(theta_BP, inputs), inputs)
    expected = gradient(plain.forward(arch, theta_BP, inputs), inputs)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected)


def test_a_models_outputs_do_not_depend_on_its_neighbours() -> None:
    arch = architecture("cnn_small")
    theta_BP, inputs = models(arch, 9), images(arch, 5)
    poisoned_BP = theta_BP.clone()
    poisoned_BP[4] = float("nan")
    found_BQC, expected_BQC = outputs(arch, poisoned_BP, inputs), outputs(arch, theta_BP, inputs)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(found_BQC[others], expected_BQC[others])
    assert found_BQC[4].isnan().all()


def test_large_convolutions_in_single_precision_go_model_by_model() -> None:
    def chosen(name: str, dtype: torch.dtype, count: int) -> ModuleType | Kernel:
        arch = architecture(name)
        return blocks.choose(arch, models(arch, 1, dtype), images(arch, count, dtype))

    large = modelwise if torch.backends.mkldnn.is_available() else direct
    assert chosen("cnn3", torch.float32, 64) is large
    assert chosen("lenet5", torch.float32, 64) is direct
    assert chosen("lenet5", torch.bfloat16, 64) is modelwise
    assert chosen("cnn3", torch.float32, 1) is direct
    assert chosen("cnn3", torch.float64, 64) is direct
    assert chosen("cnn_small", torch.float32, 64) is direct


def test_loops_compile_where_nothing_can_be_cached() -> None:
    made: dict[str, Any] = {}
    exec("def twice(x): return 2 * x", made)  # a function without a file has no folder to be cached in
    assert loops._compiled(made["twice"])(21) == 42


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("cnn_small", 64), ("cnn3", 4)])
def test_the_fast_path_is_faster_than_vmap_over_models(name: str, count: int) -> None:
    """Several times more in the benchmarks: the margin is for busy machines."""
    arch = architecture(name)
    theta_BP, inputs = models(arch, count, torch.float32).requires_grad_(), torch.randn(128, *arch.input_shape)

    def vmapped() -> None:
        torch.func.vmap(lambda theta_P: functional(arch, theta_P, inputs))(theta_BP).square().sum().backward()

    def fast() -> None:
        arch.forward(theta_BP, inputs).square().sum().backward()

    seconds: dict[Any, list[float]] = {vmapped: [], fast: []}
    for _ in range(5):
        for way, times in seconds.items():
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    assert min(seconds[vmapped]) > 1.5 * min(seconds[fast])
