"""Kronecker factors of the Gauss-Newton matrix against slow float64 references."""

import pytest
import torch
import torch.nn.functional as F

from distrecon.nets import ChainArchitecture, Layer, architecture, initialise
from distrecon.nets import kronecker as kron

ARCH = ChainArchitecture(
    "two_convolutions",
    (
        Layer("conv1", 2, 3, kernel=3, padding=1, pool=2),
        Layer("conv2", 3, 4, kernel=2),
        Layer("fc", 16, 5, positions=4),
    ),
    "tanh",
    (2, 6, 6),
)
TEMPERATURE = 1.7


def models(arch, count):
    return 2 * initialise(arch, ["normal", "uniform"] * count, range(2 * count)).double()[:count]


@pytest.fixture(scope="module")
def case():
    draw = torch.Generator().manual_seed(0)
    return models(ARCH, 3), torch.randn(4, *ARCH.input_shape, generator=draw, dtype=torch.float64)


def slow_factors(theta_P, inputs):
    """Both factors of each layer of ARCH, one input, output and position at a time, by torch's own convolutions."""
    state = {name: value.requires_grad_(True) for name, value in ARCH.unflatten(theta_P).items()}
    a_sums = [0.0] * 3
    s_sums = [0.0] * 3
    for x in inputs[:, None]:
        sums, hidden = [], x
        for i, layer in enumerate(ARCH.layers):
            weight, bias = state[f"{layer.name}.weight"], state[f"{layer.name}.bias"]
            if layer.kernel:
                patches = F.unfold(hidden, layer.kernel, padding=layer.padding)[0].T.detach()
                sums.append(F.conv2d(hidden, weight, bias, padding=layer.padding))
                hidden = torch.tanh(F.max_pool2d(sums[-1], layer.pool))
            else:
                patches = hidden.flatten(1).detach()
                sums.append(F.linear(hidden.flatten(1), weight, bias))
                hidden = sums[-1]
            read = torch.cat([patches, torch.ones(len(patches), 1, dtype=patches.dtype)], 1)
            a_sums[i] = a_sums[i] + sum(torch.outer(a, a) for a in read) / len(read) / len(inputs)
        p_C = torch.softmax(hidden[0].detach() / TEMPERATURE, 0)
        root_CC = torch.linalg.cholesky(torch.diag(p_C) - torch.outer(p_C, p_C) + 1e-14 * torch.eye(5))
        for column in root_CC.T:
            for i, grad in enumerate(torch.autograd.grad(hidden[0] @ column, sums, retain_graph=True)):
                for g in grad[0].reshape(grad.shape[1], -1).T:
                    s_sums[i] = s_sums[i] + torch.outer(g, g) / len(inputs)
    return list(zip(a_sums, s_sums, strict=True))


def test_factors_are_those_of_loops_over_models_inputs_outputs_and_positions(case):
    theta_BP, inputs = case
    found = kron.factors(ARCH, theta_BP, inputs, TEMPERATURE)
    for b, theta_P in enumerate(theta_BP):
        for layer, (a_FF, s_OO) in zip(found, slow_factors(theta_P, inputs), strict=True):
            torch.testing.assert_close(layer.inputs[b], a_FF)
            torch.testing.assert_close(layer.outputs[b], s_OO, rtol=1e-6, atol=1e-9)


def test_factors_do_not_depend_on_how_many_models_run_at_once(case, monkeypatch):
    theta_BP, inputs = case
    whole = kron.factors(ARCH, theta_BP, inputs)
    monkeypatch.setattr(kron, "READ_NUMBERS", 1)
    for one, other in zip(whole, kron.factors(ARCH, theta_BP, inputs), strict=True):
        torch.testing.assert_close(one.inputs, other.inputs)
        torch.testing.assert_close(one.outputs, other.outputs)


def test_the_product_is_the_gauss_newton_matrix_where_that_factors():
    """One linear layer whose outputs are uniform on all inputs: diag(p) - p p^T does not vary with the input."""
    arch = architecture("mlp", sizes=(3, 4))
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta_P = torch.zeros(arch.num_parameters, dtype=torch.float64)
    (layer,) = kron.factors(arch, theta_P[None], inputs)
    jacobian_QCP = torch.autograd.functional.jacobian(lambda t: arch.forward(t[None], inputs)[0], theta_P)
    metric_CC = torch.eye(4, dtype=torch.float64) / 4 - 1 / 16
    gauss_newton_PP = torch.einsum("qcp,cd,qdr->pr", jacobian_QCP, metric_CC, jacobian_QCP) / 6
    step_P = torch.randn(arch.num_parameters, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step_OF = arch.table.as_matrices(step_P[None])[0][0]
    product = torch.einsum("of,fg,pg,op->", step_OF, layer.inputs[0], step_OF, layer.outputs[0])
    torch.testing.assert_close(product, step_P @ gauss_newton_PP @ step_P)


def test_layer_matrices_and_back(case):
    theta_BP, _ = case
    matrices = ARCH.table.as_matrices(theta_BP)
    assert [tuple(m.shape[1:]) for m in matrices] == [(3, 19), (4, 13), (5, 17)]
    assert torch.equal(matrices[1][:, :, -1], theta_BP[:, ARCH.offsets[2] - 4 : ARCH.offsets[2]])
    assert torch.equal(ARCH.table.of_matrices(matrices), theta_BP)


def test_running_layer_by_layer_meets_what_each_layer_reads(case):
    theta_BP, inputs = case
    matrices, moments = ARCH.table.as_matrices(theta_BP), []

    def choose(index, moment):
        moments.append(moment)
        return matrices[index]

    kron.layer_by_layer(ARCH, inputs, choose)
    for moment, layer in zip(moments, kron.factors(ARCH, theta_BP, inputs), strict=True):
        torch.testing.assert_close(moment.expand_as(layer.inputs), layer.inputs)


def test_many_places_are_sampled():
    columns = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(3))
    first, sampled = kron.second_moment(columns[:, :, :4096]), kron.second_moment(columns)
    assert not torch.equal(first, sampled)  # not simply the first ones
    torch.testing.assert_close(sampled, first, rtol=0, atol=0.15)
    assert torch.equal(sampled, kron.second_moment(columns))
