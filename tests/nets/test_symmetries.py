"""Reordering and rescaling hidden units keeps the function; alignment undoes a reordering."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrecon.errors import UserError
from distrecon.nets import Architecture, align, architecture, initialise, permute, random_permutation, rescale
from distrecon.nets.known import mlp

CASES = {
    "mlp": {"sizes": (6, 5, 4, 3)},
    "cnn_small": {},
    "cnn3": {},
}


def models(arch: Architecture, count: int, seed: int) -> torch.Tensor:
    theta_BP = initialise(arch, ["normal"] * count, range(seed, seed + count)).double()
    return theta_BP + 0.05 * torch.randn(theta_BP.shape, generator=torch.Generator().manual_seed(seed)).double()


def inputs(arch: Architecture) -> torch.Tensor:
    return torch.randn(4, *arch.input_shape, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), shared=st.booleans())
def test_permuting_hidden_units_keeps_every_function(name: str, seed: int, shared: bool) -> None:
    arch = architecture(name, **CASES[name])
    theta_BP = models(arch, 3, seed)
    permutation = random_permutation(arch, torch.Generator().manual_seed(seed), 1 if shared else 3)
    permuted_BP = permute(arch, theta_BP, permutation)
    assert not torch.equal(permuted_BP, theta_BP)
    assert torch.equal(permuted_BP.sort(1).values, theta_BP.sort(1).values)
    x = inputs(arch)
    torch.testing.assert_close(arch.forward(permuted_BP, x), arch.forward(theta_BP, x), rtol=1e-10, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), sizes=st.lists(st.integers(2, 7), min_size=3, max_size=5))
def test_align_recovers_a_planted_permutation(seed: int, sizes: list[int]) -> None:
    arch = mlp(tuple(sizes))
    reference_P = models(arch, 1, seed)[0]
    planted = random_permutation(arch, torch.Generator().manual_seed(seed), 4)
    permuted_BP = permute(arch, reference_P.expand(4, -1), planted)
    aligned_BP = align(arch, permuted_BP, reference_P)
    distance_B = (aligned_BP - reference_P).norm(dim=1)
    if len(sizes) == 3:  # one hidden layer: the assignment is exact
        assert distance_B.max() == 0
    assert (distance_B <= (permuted_BP - reference_P).norm(dim=1) + 1e-12).all()


def test_align_recovers_planted_permutations_of_trained_like_cnns() -> None:
    arch = architecture("cnn_small")
    reference_P = models(arch, 1, 5)[0]
    permuted_BP = permute(
        arch, reference_P.expand(6, -1), random_permutation(arch, torch.Generator().manual_seed(1), 6)
    )
    assert (permuted_BP - reference_P).norm(dim=1).min() > 1
    assert torch.equal(align(arch, permuted_BP, reference_P), reference_P.expand(6, -1))


@pytest.mark.parametrize("name", CASES)
def test_align_never_increases_the_distance_and_keeps_the_functions(name: str) -> None:
    arch = architecture(name, **CASES[name])
    theta_BP, reference_P = models(arch, 5, 1), models(arch, 1, 77)[0]
    aligned_BP = align(arch, theta_BP, reference_P)
    before_B, after_B = ((t - reference_P).norm(dim=1) for t in (theta_BP, aligned_BP))
    assert (after_B <= before_B).all()
    assert (after_B < before_B - 1e-3).any()
    x = inputs(arch)
    torch.testing.assert_close(arch.forward(aligned_BP, x), arch.forward(theta_BP, x), rtol=1e-10, atol=1e-10)
    assert torch.equal(align(arch, aligned_BP, reference_P), aligned_BP)  # a fixed point


SCALES = {  # activation -> a scale that keeps the function
    "relu": lambda shape, g: torch.rand(shape, generator=g) + 0.5,
    "leaky_relu": lambda shape, g: torch.rand(shape, generator=g) + 0.5,
    "tanh": lambda shape, g: torch.randint(0, 2, shape, generator=g) * 2.0 - 1,
}


PAIRS = [(name, activation) for name in CASES for activation in SCALES if (name == "mlp") or activation != "tanh"]


@pytest.mark.parametrize(("name", "activation"), PAIRS)
def test_rescaling_keeps_every_function(name: str, activation: str) -> None:
    arch = architecture(name, activation=activation, **CASES[name])
    theta_BP, generator = models(arch, 3, 2), torch.Generator().manual_seed(0)
    scales = [SCALES[activation]((3, layer.out_features), generator) for layer in arch.layers[:-1]]
    rescaled_BP = rescale(arch, theta_BP, scales)
    assert (rescaled_BP - theta_BP).abs().max() > 0.01
    x = inputs(arch)
    torch.testing.assert_close(arch.forward(rescaled_BP, x), arch.forward(theta_BP, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("activation", "scale"), [("relu", -1.0), ("tanh", 2.0), ("gelu", -1.0), ("sigmoid", -1.0), ("g", 1.0)]
)
def test_rescaling_that_would_change_the_function_is_refused(activation: str, scale: float) -> None:
    arch = mlp((3, 4, 2), activation)
    with pytest.raises(UserError, match=activation):
        rescale(arch, models(arch, 1, 0), [torch.full((1, 4), scale)])


def test_a_sign_does_not_pass_through_max_pooling() -> None:
    arch = architecture("cnn_small", activation="tanh")
    signs = [torch.ones(1, layer.out_features) for layer in arch.layers[:-1]]
    signs[1][0, 0] = -1.0  # not pooled
    theta_BP, x = models(arch, 1, 0), inputs(arch)
    kept = rescale(arch, theta_BP, signs)
    torch.testing.assert_close(arch.forward(kept, x), arch.forward(theta_BP, x), rtol=1e-10, atol=1e-10)
    signs[0][0, 0] = -1.0
    with pytest.raises(UserError, match="conv1"):
        rescale(arch, theta_BP, signs)


def test_permute_refuses_a_permutation_of_another_depth() -> None:
    arch = mlp((3, 4, 4, 2))
    with pytest.raises(UserError, match="2 hidden layers"):
        permute(arch, models(arch, 1, 0), [torch.arange(4)[None]])


# -- alignment that undoes signs and scales, too -----------------------------------------------------------------------


def disguised(arch: Architecture, theta_BP: torch.Tensor, seed: int) -> torch.Tensor:
    """Other weights of the same functions: units in random order, with random signs or scales where they may."""
    generator = torch.Generator().manual_seed(seed)
    theta_BP = permute(arch, theta_BP, random_permutation(arch, generator, len(theta_BP)))
    shapes = [(len(theta_BP), layer.out_features) for layer in arch.layers[:-1]]
    signs = [torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0) for shape in shapes]
    if arch.activation == "sigmoid":  # f(-u) = 1 - f(u), written out layer by layer
        changed = theta_BP.clone()
        layers = arch.weights_and_biases(changed)
        for (weight, bias), (after, after_bias), sign in zip(layers, layers[1:], signs, strict=False):
            flips = sign < 0
            after_bias += (after * flips[:, None, :]).sum(2)
            weight *= sign[:, :, None]
            bias *= sign
            after *= sign[:, None, :]
        return changed
    if arch.activation == "tanh":
        return rescale(arch, theta_BP, signs)
    scales = [torch.rand(shape, generator=generator) * 3 + 0.2 for shape in shapes]
    return rescale(arch, theta_BP, scales) if arch.activation in ("relu", "leaky_relu") else theta_BP


ALL = [
    ("mlp", activation, sizes)
    for activation in ("tanh", "relu", "sigmoid", "gelu")
    for sizes in ((4, 6, 3), (4, 6, 5, 3))
]


@pytest.mark.parametrize(
    ("name", "activation", "sizes"), [*ALL, ("cnn_small", "relu", None), ("mlp", "leaky_relu", (4, 6, 3))]
)
def test_whichever_weights_of_a_function_align_to_the_same(name, activation, sizes) -> None:
    arch = architecture(name, activation=activation, **({"sizes": sizes} if sizes else {}))
    theta_BP, reference_P, x = models(arch, 5, 1), models(arch, 1, 77)[0], inputs(arch)
    other_BP = disguised(arch, theta_BP, 3)
    wanted = arch.forward(theta_BP, x)
    torch.testing.assert_close(arch.forward(other_BP, x), wanted, rtol=1e-9, atol=1e-9)
    aligned_BP, again_BP = (align(arch, t, reference_P, "all") for t in (theta_BP, other_BP))
    torch.testing.assert_close(again_BP, aligned_BP, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(arch.forward(aligned_BP, x), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(align(arch, aligned_BP, reference_P, "all"), aligned_BP, rtol=1e-9, atol=1e-10)
    if activation != "gelu" and name == "mlp":  # which the order alone would not do
        assert (align(arch, other_BP, reference_P) - align(arch, theta_BP, reference_P)).abs().max() > 0.1


def test_alignment_of_signs_by_hand() -> None:
    """Two tanh units: the first of the model is the second of the reference with all its signs turned."""
    arch = mlp((1, 2, 1), "tanh")  # theta: w1 w2, b1 b2, a1 a2, c
    reference_P = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0, 4.0, 0.1])
    model_P = torch.tensor([-2.0, 1.0, 1.0, 0.5, -4.0, 3.0, 0.7])
    expected_P = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0, 4.0, 0.7])
    torch.testing.assert_close(align(arch, model_P[None], reference_P, "all")[0], expected_P)


def test_balanced_scales_by_hand() -> None:
    """Incoming (3, 4) has norm 5, what reads it 20: twice the one and half the other are 10 and 10."""
    arch = mlp((1, 1, 1), "relu")
    balanced_P = align(arch, torch.tensor([[3.0, 4.0, 20.0, 7.0]]), torch.ones(4), "all")[0]
    torch.testing.assert_close(balanced_P, torch.tensor([6.0, 8.0, 10.0, 7.0]))
    dead_P = torch.tensor([[3.0, 4.0, 0.0, 7.0]])
    assert torch.equal(align(arch, dead_P, torch.ones(4), "all"), dead_P)


def test_no_sign_flips_where_it_would_change_the_function() -> None:
    """Before max pooling, and sigmoid before zero padding."""
    x = inputs(architecture("cnn_small"))
    for activation in ("tanh", "sigmoid"):
        arch = architecture("cnn_small", activation=activation)
        theta_BP = models(arch, 4, 1)
        aligned_BP = align(arch, theta_BP, -models(arch, 1, 5)[0], "all")
        torch.testing.assert_close(arch.forward(aligned_BP, x), arch.forward(theta_BP, x), rtol=1e-9, atol=1e-9)
        assert (aligned_BP - theta_BP).abs().max() > 0.1
