"""Other kinds of functions are named, within their limits, and ordinary networks raise no alarm."""

import itertools
import time

import pytest
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from distrecon.expand_cluster import network, recover_network
from distrecon.expand_cluster.diagnosis import diagnose_function
from distrecon.expand_cluster.examination import Examined, examine
from distrecon.expand_cluster.surroundings import Surroundings, unbounded
from distrecon.expand_cluster.symptoms import Sample, quantum
from distrecon.nets.activations import ACTIVATIONS

LIMIT_QUERIES, LIMIT_SECONDS = 3000, 10.0


def weights(sizes, seed, gain=1.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(gain * draw(out, cols) / cols**0.5, 0.5 * draw(out)) for cols, out in itertools.pairwise(sizes)]


def net(sizes, activation, seed=1, gain=1.5):
    return network(weights(sizes, seed, gain), activation)


def look(box, inputs, data=None, domain=None, outputs="values", budget=0, seed=0, hidden_layers=1) -> Examined:
    generator = torch.Generator().manual_seed(seed)
    return examine(box, inputs, data, domain, outputs, None, 0, None, budget, generator, hidden_layers)


TANH, RELU = net([8, 5, 3], "tanh"), net([8, 5, 3], "relu")
DATA_QI = torch.randn(400, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
MATRIX_OI = torch.randn(3, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
(U, A), (V, B), (W, C) = weights([8, 6, 5, 2], 3)


def sequential(layer, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 20), layer, torch.nn.Tanh(), torch.nn.Linear(20, 2)).to(dtype)


def fitted(model):
    answers = TANH(DATA_QI).numpy()
    labels = answers.argmax(1)
    if hasattr(model, "predict_proba"):
        return model.fit(DATA_QI.numpy(), labels).predict_proba
    return model.fit(DATA_QI.numpy(), answers).predict


SICK = {
    "constant": lambda x: 0 * x[:, :2] + 3,
    "linear": lambda x: x @ MATRIX_OI.T + 1,
    "labels only": lambda x: TANH(x).argmax(1),
    "labels only (one-hot)": lambda x: torch.nn.functional.one_hot(TANH(x).argmax(1), 3),
    "not deterministic": lambda x: TANH(x) + 1e-3 * torch.randn(len(x), 3),
    "not deterministic (dropout)": sequential(torch.nn.Dropout(0.2)),
    "depends on the other rows": sequential(torch.nn.BatchNorm1d(20)),
    "piecewise constant": fitted(RandomForestRegressor(20, random_state=0)),
    "piecewise constant (votes)": fitted(RandomForestClassifier(20, random_state=0)),
    "piecewise constant (neighbours)": fitted(KNeighborsRegressor()),
    "piecewise constant (their votes)": fitted(KNeighborsClassifier()),
    "discontinuous": lambda x: TANH(x) + (x[:, :1] > 0.2),
    "normalised inputs": lambda x: TANH(torch.nn.functional.layer_norm(x, (8,))),
    "normalised inputs (relu)": lambda x: RELU(torch.nn.functional.layer_norm(x, (8,))),
    "normalised inputs (length)": lambda x: TANH(3 * torch.nn.functional.normalize(x, dim=1)),
    "linear skip": lambda x: TANH(x) + x @ MATRIX_OI.T,
    "kinks between curves": lambda x: torch.relu(torch.tanh(x @ U.T + A) @ V.T + B) @ W.T + C,
    "several hidden layers": net([8, 6, 5, 3], "relu"),
    "several hidden layers (three)": net([8, 6, 6, 6, 2], "leaky_relu"),
    "several hidden layers (wide)": net([8, 50, 50, 3], "relu"),
    "kinks between curves (the other way)": lambda x: torch.tanh(torch.relu(x @ U.T + A) @ V.T + B) @ W.T + C,
}


@pytest.mark.parametrize("name", SICK)
def test_what_is_no_network_is_named_and_stops_the_recovery(name):
    started = time.process_time()
    examined = look(SICK[name], 8)
    assert examined.stopped is not None
    assert examined.stopped.name == name.split(" (")[0]
    assert examined.box.queries <= LIMIT_QUERIES
    assert time.process_time() - started < LIMIT_SECONDS
    assert any(character.isdigit() for character in examined.stopped.evidence) or "far out" in examined.stopped.evidence


def test_a_recovery_that_stops_says_why_and_never_verifies():
    result = recover_network(SICK["linear skip"], 8, "tanh")
    assert not result.verified
    assert result.reason.startswith("linear skip: far out")
    assert result.metrics["recover/queries"] <= LIMIT_QUERIES
    (found,) = [finding for finding in result.findings if finding.stops]
    torch.testing.assert_close(found.values["matrix"], MATRIX_OI, rtol=0, atol=1e-13)
    rest = recover_network(
        lambda x: SICK["linear skip"](x) - x @ found.values["matrix"].T, 8, "tanh", domain=(-100, 100)
    )
    assert rest.layer_sizes == [5]
    assert rest.verified, rest.reason


@pytest.mark.parametrize("box", [TANH, RELU], ids=["tanh", "relu"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 3.0)])
def test_limits_of_the_inputs_are_found_and_kept(box, low, high):
    asked = []

    def clamped(x):
        asked.append(x)
        return box(x.clamp(low, high))

    examined = look(clamped, 8)
    found = examined.named("clamped inputs")
    assert found is not None
    assert examined.stopped is None
    torch.testing.assert_close(found.values["low"], torch.full((8,), low).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.values["high"], torch.full((8,), high).double(), rtol=0, atol=1e-4)
    assert (found.values["low"] >= low).all()
    assert (found.values["high"] <= high).all()
    asked.clear()
    examined.box(examined.box.place(100 * torch.randn(500, 8, dtype=torch.float64)))
    assert (torch.cat(asked) >= low).all()
    assert (torch.cat(asked) <= high).all()
    assert examined.box.queries <= LIMIT_QUERIES + 500


def test_rounded_answers_have_their_quantum_measured_and_floats_have_none():
    examined = look(lambda x: torch.cat([TANH(x).round(decimals=3)[:, :2], TANH(x)[:, 2:]], 1), 8)
    found = examined.named("quantised")
    assert found is not None
    assert examined.stopped is None
    torch.testing.assert_close(found.values["quantum"], torch.tensor([1e-3, 1e-3, 0.0]).double(), rtol=1e-6, atol=0)
    noise_O = examined.box.noise_O * examined.sample.scale_O
    torch.testing.assert_close(noise_O[:2], torch.full((2,), 1e-3 / 12**0.5).double())
    assert noise_O[2] < 1e-14
    y_Q = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in (0.3, 1e-4, 2.0**-14, 7.0):
        assert quantum(5 + step * (10 * y_Q / step).round()) == pytest.approx(step, rel=1e-6)
    for format_ in (torch.float64, torch.float32, torch.bfloat16):
        assert quantum(y_Q.to(format_).double()) == 0


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_probabilities_are_recognised_and_become_scores(activation):
    inner = net([8, 5, 3], activation)
    examined = look(lambda x: inner(x).softmax(1), 8)
    assert examined.named("probabilities") is not None
    assert examined.stopped is None
    assert examined.box.outputs == 2
    assert (examined.named("piecewise linear") is not None) == (activation == "relu")
    one = look(lambda x: torch.sigmoid(6 * inner(x)[:, :1]), 8)
    assert one.named("perhaps a probability") is not None
    assert look(lambda x: torch.sigmoid(6 * inner(x)[:, :1]), 8, outputs="probabilities").box.outputs == 1


def test_where_probabilities_end_is_no_place_to_ask():
    """Where they reach 0 or 1 the scores seem to bend: hundreds away from the kinks of this network's neurons."""
    draw = torch.Generator().manual_seed(18)
    w, b, a, c = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((6, 3), (6,), (3, 6), (3,)))
    scores = network([(w, b), (2 * a, c)], "leaky_relu")
    examined = look(lambda x: scores(x).softmax(1), 3, outputs="probabilities")
    assert examined.stopped is None
    assert examined.named("constant") is None
    around = examined.sample.around
    assert (around.low_I < 0).all()
    assert (around.high_I > 0).all()


def test_probabilities_that_are_all_next_to_zero_tell_their_scores():
    """Two of softmax, about 1e-60 and 1: rounded to 1 as a sigmoid's are, and good near 0 to the smallest number."""
    inner = net([4, 6, 2], "relu", gain=3.0)
    scores = inner(torch.zeros(1, 4).double()) + torch.tensor([[140.0, 0.0]], dtype=torch.float64)

    def box(x_QI):
        return (inner(x_QI) - scores).softmax(1)

    examined = look(box, 4, outputs="probabilities")
    assert examined.named("linear") is None
    assert examined.named("piecewise linear") is not None
    assert examined.sample.y_QO.min() < -100
    recovered = recover_network(box, 4, "relu", outputs="probabilities", seed=0)
    assert recovered.verified
    torch.testing.assert_close(recovered(examined.sample.u_QI), box(examined.sample.u_QI), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("shift", "gain"), [(0.0, 30.0), (5.0, 3.0), (20.0, 10.0), (34.0, 3.0), (40.0, 10.0)])
def test_ends_of_probabilities_are_no_findings(shift, gain):
    """p near 1, small p, and p made as 1 - q, all cut off by the format for most inputs or for some."""
    inner = net([4, 6, 1], "relu", gain=gain)
    boxes = {
        "p": lambda x: torch.sigmoid(shift + inner(x)),
        "small": lambda x: torch.sigmoid(-shift - inner(x)),
        "rest": lambda x: 1 - torch.sigmoid(shift + inner(x)),
        "both": lambda x: torch.cat([1 - torch.sigmoid(shift + inner(x)), torch.sigmoid(shift + inner(x))], 1),
    }
    for name, box in boxes.items():
        examined = look(box, 4, outputs="probabilities")
        assert examined.stopped is None, (name, examined.stopped)
        assert {found.name for found in examined.findings} <= {
            "perhaps a probability",
            "probabilities",
            "piecewise linear",
        }
        told_QO = examined.box.told(torch.cat([0 * examined.sample.u_QI[:1], examined.sample.u_QI]))
        assert told_QO[0].isfinite().all()  # the centre
        assert told_QO.isfinite().double().mean() > 0.4


def test_noise_as_large_as_the_answers_is_not_called_linear():
    """Answers that change wildly within 1e-9: no second difference stands out from that, and none is called small."""

    def ask(u_QI):
        return torch.sin(1e9 * u_QI.sum(1, keepdim=True))

    around = Surroundings(torch.zeros(3).double(), torch.ones(3).double(), *unbounded(3))
    sample = Sample.draw(ask, around, torch.Generator().manual_seed(0))
    assert float(sample.noise_O) > 0.2
    assert "linear" not in [finding.name for finding in diagnose_function(sample)]


def test_a_logistic_regression_is_linear():
    w_I1 = torch.tensor([[2.0], [-3.0], [1.0]], dtype=torch.float64)
    assert look(lambda x: torch.sigmoid(x @ w_I1 + 1), 3, outputs="probabilities").stopped.name == "linear"


def test_answers_that_are_all_but_two_numbers_have_no_quantum():
    """1e-20, 1e-21, ... and 1 are no multiples of 1, and any two numbers are multiples of something."""
    y_Q = torch.cat([10.0 ** -torch.arange(20, 40, dtype=torch.float64), torch.ones(3, dtype=torch.float64)])
    assert quantum(y_Q) == 0
    assert quantum(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)) == 0
    assert quantum(torch.tensor([0.0, 1.0, 3.0, 1.0], dtype=torch.float64)) == 1


SHAPES = (([2, 3, 1], 1.5), ([4, 8, 1], 1.5), ([8, 5, 3], 3.0), ([16, 30, 2], 1.0), ([64, 20, 10], 1.0))
DEEP = (([8, 6, 5, 2], 1.5), ([6, 5, 5, 5, 2], 2.0), ([3, 100, 1], 1.5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("sizes", "gain"), [*SHAPES, *DEEP], ids=lambda value: str(value))
def test_ordinary_networks_raise_no_alarm(activation, sizes, gain):
    for seed in (2, 3):
        examined = look(net(sizes, activation, seed, gain), sizes[0], seed=seed, hidden_layers=len(sizes) - 2)
        scaled = ACTIVATIONS[activation].symmetry == "scaled"
        names = {found.name for found in examined.findings}
        allowed = {"piecewise linear" if scaled else "smooth"}
        assert names <= allowed, [str(found) for found in examined.findings]
        assert examined.box.queries <= LIMIT_QUERIES
        assert float(examined.box.noise) < 1e-13


@pytest.mark.parametrize(("sizes", "gain"), [([3, 400, 1], 1.5), ([64, 1000, 2], 1.0), ([4, 60, 60, 60, 1], 1.5)])
def test_kinks_that_lie_close_are_no_curve(sizes, gain):
    for kind in (torch.float64, torch.float32):
        inner = net(sizes, "relu", 2, gain)
        examined = look(lambda x: inner(x).to(kind), sizes[0])  # noqa: B023
        assert "smooth" not in {found.name for found in examined.findings}


@pytest.mark.parametrize(("box", "told"), [(TANH, "relu"), (RELU, "tanh")], ids=["tanh", "relu"])
def test_an_activation_that_the_black_box_cannot_have_is_not_looked_for(box, told):
    result = recover_network(box, 8, told)
    assert not result.verified
    assert result.reason.startswith(f"not a network of {told}: ")
    assert result.metrics["recover/queries"] <= LIMIT_QUERIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [torch.nn.Tanh, torch.nn.ReLU, torch.nn.GELU])
def test_modules_of_other_formats_raise_no_alarm(dtype, layer):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 10), layer(), torch.nn.Linear(10, 2)).to(dtype)
    examined = look(module, 8)
    allowed = {"piecewise linear" if layer is torch.nn.ReLU else "smooth"}
    assert {found.name for found in examined.findings} <= allowed
    eps = torch.finfo(dtype).eps
    assert 0.01 * eps < examined.box.noise < 10 * eps


def test_steep_slopes_in_float32_are_no_jumps_but_a_trees_answers_are():
    """Inputs round to steps of which a slope of 1e4 makes steps of the answers."""
    inner = net([4, 6, 2], "tanh")
    for factor in (1e3, 1e4):
        examined = look(lambda x: inner((factor * x).float().double()).float(), 4)  # noqa: B023
        assert not {found.name for found in examined.findings} & {"discontinuous", "piecewise constant"}
    stairs = look(lambda x: (3 * x).floor().sin().sum(1, keepdim=True).float(), 4)
    assert stairs.stopped.name in ("discontinuous", "piecewise constant")


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_answers_of_any_size_are_ordinary(factor):
    def box(x):
        return torch.cat([factor * TANH(x), TANH(x)], dim=1)

    examined = look(box, 8)
    assert [found.name for found in examined.findings] == ["smooth"]
    assert examined.box(examined.sample.u_QI).std(0).sub(1).abs().max() < 0.01
    assert examined.box.noise_O.max() < 1e-14


def test_a_small_budget_is_not_spent_on_what_kind_of_function_it_is():
    assert look(TANH, 8, budget=5000).box.queries < 700


def test_what_is_constant_only_far_out_is_looked_at_where_it_is_not():
    """A sum of bumps: its sharpest bends lie so far out that nothing but its constant is met round them."""
    centres_KI = torch.randn(40, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    height_K = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def bumps(x_QI):
        return (-torch.cdist(x_QI, centres_KI).square() / 2).exp() @ height_K

    examined = look(bumps, 10)
    assert examined.named("constant") is None
    assert examined.named("linear") is None
    assert float(examined.sample.y_QO.std()) > 0


def test_a_sample_knows_each_outputs_scale_and_constants_have_one():
    """Deviations .01, 0 and 100: a constant answer is measured in units of one."""

    def ask(u_QI):
        return torch.stack([0.01 * u_QI[:, 0], torch.full_like(u_QI[:, 0], 3.0), 100 * u_QI[:, 1]], dim=1)

    around = Surroundings(torch.zeros(2).double(), torch.ones(2).double(), *unbounded(2))
    sample = Sample.draw(ask, around, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(sample.scale_O, expected, rtol=0.2, atol=0)
    assert float(sample.scale_O[1]) == 1.0
