"""Kronecker factors of modules against the chains' own, full Jacobians, and loops over positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.nets import ModuleArchitecture, architecture, initialise, kronecker, traced_kronecker
from distrecon.nets.trace import of_module, random_models
from tests.nets.test_modules import NAMES, as_module, case

TEMPERATURE = 1.7


def jacobian(arch, theta_P: Tensor, inputs: Tensor) -> Tensor:
    """Rows [Q, C, P] whose Gram matrix is the Gauss-Newton matrix of each input."""
    logits_QC = arch.forward(theta_P[None], inputs)[0]
    p_QC = (logits_QC / TEMPERATURE).softmax(1)
    by_output_QCP = torch.autograd.functional.jacobian(lambda t: arch.forward(t[None], inputs)[0], theta_P)
    mean_Q1P = (p_QC[:, :, None] * by_output_QCP).sum(1, keepdim=True)
    return p_QC.sqrt()[:, :, None] * (by_output_QCP - mean_Q1P)


@pytest.mark.parametrize("name", ["mlp", "cnn_small"])
def test_a_chain_has_the_same_factors_either_way(name: str) -> None:
    chain = architecture(name) if name != "mlp" else architecture("mlp", sizes=(5, 7, 4, 3))
    traced = of_module(as_module(name), torch.randn(2, *chain.input_shape))
    theta_BP = 2 * initialise(chain, ["normal"] * 3, range(3)).double()
    inputs = torch.randn(4, *chain.input_shape, dtype=torch.float64)
    found = traced_kronecker.factors(traced, theta_BP, inputs, TEMPERATURE)
    for one, other in zip(found, kronecker.factors(chain, theta_BP, inputs, TEMPERATURE), strict=True):
        torch.testing.assert_close(one.inputs[0], other.inputs.mean(0))
        torch.testing.assert_close(one.outputs[0], other.outputs.mean(0))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "resnet20"])  # its Jacobian takes 10 s
def test_what_no_sum_reads_has_its_exact_diagonal(name: str) -> None:
    _, arch, inputs = case(name)
    theta_BP = random_models(arch, 2)
    found = traced_kronecker.factors(arch, theta_BP, inputs, TEMPERATURE)
    squares_P = sum(jacobian(arch, theta_P, inputs).square().sum((0, 1)) for theta_P in theta_BP) / 2 / len(inputs)
    assert [(m.rows, m.columns) for m in arch.table.matrices] == [
        (f.outputs.shape[1], f.inputs.shape[1]) for f in found
    ]
    variances = {i for i, entry in enumerate(arch.table.entries) if entry.role == "variance"}
    for matrix, layer, wanted_1OF in zip(
        arch.table.matrices, found, arch.table.as_matrices(squares_P[None]), strict=True
    ):
        assert (layer.inputs.ndim == 2) == (layer.outputs.ndim == 2)
        if layer.inputs.ndim == 2 and matrix.rows == 1 and not variances & set(matrix.entries):
            torch.testing.assert_close(layer.outputs.T * layer.inputs, wanted_1OF[0], rtol=1e-8, atol=1e-12)
    weights = {e.name for e in arch.table.entries if e.role == "weight"}
    full = {
        arch.table.entries[m.entries[0]].name
        for m, f in zip(arch.table.matrices, found, strict=True)
        if f.inputs.ndim == 3
    }
    assert full == weights


class Odd(nn.Module):
    """Strides, dilation, groups, one bias and one weight used twice, a transposed convolution, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), bias=False)
        self.norm, self.grouped = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, groups=2)
        self.up, self.twice, self.last = nn.ConvTranspose2d(6, 3, 2), nn.Linear(3, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.tanh(self.grouped(torch.tanh(self.norm(self.below(x))))))
        x = self.twice(torch.tanh(self.twice(x.mean((2, 3)))))
        return self.last(torch.tanh(x))


@pytest.fixture(scope="module")
def odd() -> tuple[ModuleArchitecture, Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 6, 6)
    arch = of_module(Odd(), inputs)
    return arch, random_models(arch, 2), inputs.double()


def read_and_gradient(module: nn.Module, inputs: Tensor, layers: list[nn.Module]) -> list[list[tuple[Tensor, Tensor]]]:
    """What each use of each layer reads, and its sums, by hooks; sums keep what is needed for gradients."""
    uses: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for own, layer in zip(uses, layers, strict=True):
        layer.register_forward_hook(lambda _, read, sums, own=own: own.append((read[0].detach(), sums)))
    module(inputs)
    return uses


def test_factors_of_strided_dilated_grouped_and_repeated_sums(odd) -> None:
    arch, theta_BP, inputs = odd
    numbers = {arch.table.entries[m.entries[0]].name: i for i, m in enumerate(arch.table.matrices)}
    found = traced_kronecker.factors(arch, theta_BP, inputs, TEMPERATURE)
    wanted = {name: [0.0, 0.0] for name in ("below", "grouped", "twice")}
    for theta_P in theta_BP:
        module = Odd().double().eval()
        module.load_state_dict(arch.unflatten(theta_P))
        logits: list[Tensor] = []
        module.last.register_forward_hook(lambda _, __, out, logits=logits: logits.append(out))
        uses = read_and_gradient(module, inputs, [module.below, module.grouped, module.twice])
        p_QC = (logits[0].detach() / TEMPERATURE).softmax(1)
        factor_QC = p_QC.sqrt() * (logits[0] - (p_QC * logits[0]).sum(1, keepdim=True))
        for name, own in zip(wanted, uses, strict=True):
            moment, places = 0.0, 0
            for x, sums in own:
                if name == "below":
                    rows = F.unfold(x, (3, 2), dilation=(2, 1), padding=(1, 0), stride=(1, 2)).transpose(1, 2)
                elif name == "grouped":
                    rows = torch.cat([F.unfold(part, 2) for part in x.chunk(2, 1)]).transpose(1, 2)
                else:
                    rows = x
                rows = rows.reshape(-1, rows.shape[-1])
                rows = rows if name == "below" else F.pad(rows, (0, 1), value=1.0)
                moment, places = moment + rows.T @ rows, places + len(rows)
                for c in range(3):
                    (grad,) = torch.autograd.grad(factor_QC[:, c].sum(), sums, retain_graph=True)
                    grad_ON = grad.movedim(1, 0).flatten(1)
                    product = grad_ON @ grad_ON.T
                    if name == "grouped":
                        product = product * torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
                    wanted[name][1] = wanted[name][1] + product / (2 * len(inputs))
            wanted[name][0] = wanted[name][0] + moment / places / 2
    for name, (moment, product) in wanted.items():
        layer = found[numbers[f"{name}.weight"]]
        torch.testing.assert_close(layer.inputs[0], moment, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(layer.outputs[0], product, rtol=1e-6, atol=1e-14)


def test_a_transposed_convolution_has_the_product_nearest_its_diagonal_and_variances_their_logarithms(odd) -> None:
    arch, theta_BP, inputs = odd
    found = traced_kronecker.factors(arch, theta_BP[:1], inputs, TEMPERATURE)
    squares_P = jacobian(arch, theta_BP[0], inputs).square().sum((0, 1)) / len(inputs)
    wanted = arch.table.as_matrices(squares_P[None])
    for i, matrix in enumerate(arch.table.matrices):
        name = arch.table.entries[matrix.entries[0]].name
        if name == "up.weight":
            product_OF = found[i].outputs[0][:, None] * found[i].inputs[0]
            torch.testing.assert_close(product_OF.sum(0), wanted[i][0].sum(0), rtol=1e-6, atol=0)
            torch.testing.assert_close(product_OF.sum(1), wanted[i][0].sum(1), rtol=1e-6, atol=0)
        if name == "norm.running_var":
            by_logarithm = (arch.unflatten(theta_BP[0])[name] + 1e-5).square()
            torch.testing.assert_close(
                found[i].outputs[0] * found[i].inputs[0], wanted[i][0, 0] * by_logarithm, rtol=1e-6, atol=0
            )


def test_factors_do_not_depend_on_how_much_runs_at_once(odd, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, theta_BP, inputs = odd
    whole = traced_kronecker.factors(arch, theta_BP, inputs)
    monkeypatch.setattr(traced_kronecker, "READ_NUMBERS", 1)
    for one, other in zip(whole, traced_kronecker.factors(arch, theta_BP, inputs), strict=True):
        torch.testing.assert_close(one.inputs, other.inputs)
        torch.testing.assert_close(one.outputs, other.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_the_parameters_each_once(name: str) -> None:
    table = case(name)[1].table
    theta_BP = torch.arange(1.0, table.num_parameters + 1).repeat(2, 1)
    matrices = table.as_matrices(theta_BP)
    assert sum(m[0].numel() for m in matrices) == table.num_parameters
    assert torch.equal(table.of_matrices(matrices), theta_BP)


def test_no_number_decodes_to_a_negative_variance() -> None:
    arch = case("resnet20")[1]
    theta_BP = random_models(arch, 2)
    torch.testing.assert_close(arch.from_logarithms(arch.to_logarithms(theta_BP)), theta_BP)
    places = arch.table.places(("variance",))
    others = torch.ones(arch.num_parameters, dtype=torch.bool).index_fill(0, places, False)
    far_BP = arch.to_logarithms(theta_BP) - 30
    back_BP = arch.from_logarithms(far_BP)
    assert float(back_BP[:, places].min()) >= 0
    assert torch.equal(back_BP[:, others], far_BP[:, others])
    assert float(theta_BP[:, places].min()) > 0.05
