"""Black boxes as people have them, and others that are meant to deceive a recovery: how each is made.

A problem knows the truth, so that whatever is answered can be judged: weights, or the function behind rounding and
faults. box_cases.py lists them with what an honest answer is.
"""

import copy
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrecon.config import replace
from distrecon.expand_cluster import RecoveryConfig, network, recover_network
from distrecon.expand_cluster.weights import Weights

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A black box, what `recover_network` is told of it, and the truth.

    `truth` gives the exact answers x[Q, I] -> y[Q, O]; `sizes` are the hidden layers of the smallest such network
    (None: there is no such network). Queries that judge are drawn round `centre` at multiples of `scale`, inside
    `domain`, and round the `bends` (hyperplanes of the truth's first layer). Answers may be off by `tolerance`,
    relative.
    """

    black_box: Any
    inputs: int
    arguments: dict[str, Any]
    truth: Function | None = None
    sizes: list[int] | None = None
    centre: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    domain: tuple[float, float] | None = None
    bends: tuple[Tensor, Tensor] | None = None
    tolerance: float = 1e-6
    after: Callable[[], str] = field(default=lambda: "")  # what to tell of the box when it has been asked


def weights(sizes: list[int], seed: int, gain: float = 1.5) -> Weights:
    """Random weights: w = gain randn / sqrt(inputs), b = 0.5 randn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(gain * draw(out, cols) / math.sqrt(cols), 0.5 * draw(out)) for cols, out in itertools.pairwise(sizes)]


def dense(sizes: list[int], activation: str, seed: int = 1, told: dict[str, Any] | None = None, **more: Any) -> Problem:
    """A random dense network that is asked as it is."""
    layers = weights(sizes, seed)
    function = network(layers, activation)
    arguments = {"activation": activation, "hidden_layers": len(sizes) - 2, **(told or {})}
    problem = {"black_box": function, "truth": function, "sizes": sizes[1:-1], "bends": layers[0], **more}
    return Problem(inputs=sizes[0], arguments=arguments, **problem)


def through(
    sizes: list[int],
    activation: str,
    before: Function | None = None,
    after: Callable[[Tensor], Any] | None = None,
    exact: bool = True,
    told: dict[str, Any] | None = None,
    **more: Any,
) -> Problem:
    """A random dense network between two functions; the truth is all of it, or all before `after` if not `exact`."""
    function = network(weights(sizes, 1), activation)

    def inner(x_QI: Tensor) -> Tensor:
        return function(x_QI if before is None else before(x_QI))

    def whole(x_QI: Tensor) -> Any:
        return inner(x_QI) if after is None else after(inner(x_QI))

    return dense(
        sizes, activation, told=told, **{"black_box": whole, "truth": whole if exact else inner, "bends": None, **more}
    )


# -- networks that deceive ---------------------------------------------------------------------------------------------


def far_kink() -> Problem:
    """relu 8-5-3 of which one neuron bends 60 deviations off."""
    layers = weights([8, 5, 3], 1)
    (w, b), last = layers
    b = b.clone()
    b[0] = -60 * w[0].norm()
    function = network([(w, b), last], "relu")
    return Problem(function, 8, {"activation": "relu"}, function, [5], bends=(w, b))


def two_sizes() -> Problem:
    net = network(weights([4, 5, 1], 1), "tanh")

    def box(x_QI: Tensor) -> Tensor:
        return torch.cat([1e14 * net(x_QI), (20 * x_QI[:, :1]).sin()], dim=1)

    return Problem(box, 4, {"activation": "tanh"}, box, None)


def faint_neuron() -> Problem:
    """A float32 network of which one neuron contributes 3e-6 of the output."""
    (w, b), (a, c) = weights([6, 5, 1], 2)
    a = a.clone()
    a[:, 0] = 3e-6
    single = [(w.float(), b.float()), (a.float(), c.float())]
    truth = network([(w.double(), b.double()) for w, b in single], "tanh")
    net = network(single, "tanh")
    return Problem(net, 6, {"activation": "tanh"}, truth, [5], bends=(w, b), tolerance=1e-6)


def moved_inputs(
    activation: str, centre: float, scale: Tensor | float, data: bool = False, sizes: Any = None
) -> Problem:
    """A network of (x - centre) / scale."""
    sizes = sizes or [8, 5, 3]
    told: dict[str, Any] = {}
    if data:
        generator = torch.Generator().manual_seed(5)
        told["data"] = centre + scale * torch.randn(200, sizes[0], generator=generator, dtype=torch.float64)
    w, b = weights(sizes, 1)[0]
    moved = w / scale, b - (w / scale).sum(1) * centre
    return through(
        sizes, activation, lambda x: (x - centre) / scale, told=told, centre=centre, scale=scale, bends=moved
    )


def linear_skip() -> Problem:
    net, matrix = network(weights([8, 5, 3], 1), "tanh"), weights([8, 3], 7)[0][0]
    return Problem(lambda x: net(x) + x @ matrix.T, 8, {"activation": "tanh"}, lambda x: net(x) + x @ matrix.T)


def two_kinds() -> Problem:
    (u, a), (v, b), (w, c) = weights([8, 6, 5, 2], 3)

    def box(x_QI: Tensor) -> Tensor:
        return torch.relu(torch.tanh(x_QI @ u.T + a) @ v.T + b) @ w.T + c

    return Problem(box, 8, {"hidden_layers": 2, "activation": "tanh"}, box)


def hidden_gate() -> Problem:
    """A tanh network, and a relu that is on in one corner of the domain only, on 1e-4 of it."""
    net = network(weights([4, 4, 1], 1), "tanh")

    def box(x_QI: Tensor) -> Tensor:
        return net(x_QI) + 5 * torch.relu(x_QI.sum(1, keepdim=True) - 3.6)

    return Problem(
        box, 4, {"activation": "tanh", "domain": (0.0, 1.0)}, box, None, centre=0.5, scale=0.3, domain=(0, 1)
    )


def redundant() -> Problem:
    """tanh 6-7-2 that is 6-4-2: two equal neurons, one of opposite sign to another, one without outgoing weights."""
    (w, b), (a, c) = weights([6, 4, 2], 4)
    w7 = torch.cat([w, w[:1], -w[1:2], 0.3 * w[2:3] + 1])
    b7 = torch.cat([b, b[:1], -b[1:2], b[2:3]])
    a7 = torch.cat([a, 0.7 * a[:, :1], 0.4 * a[:, 1:2], 0 * a[:, :1]], dim=1)
    function = network([(w7, b7), (a7, c)], "tanh")
    return Problem(function, 6, {"activation": "tanh"}, function, [4], bends=(w, b))


def far_bump() -> Problem:
    """A tanh network, and a bump of .001 with a radius of 5 deviations, 30 of them off."""
    net, (at_1I, _) = network(weights([5, 4, 2], 1), "tanh"), weights([5, 1], 9)[0]
    at_1I = 30 * at_1I / at_1I.norm()

    def box(x_QI: Tensor) -> Tensor:
        return net(x_QI) + 1e-3 * (-(x_QI - at_1I).square().sum(1, keepdim=True) / (2 * 5.0**2)).exp()

    return Problem(box, 5, {"activation": "tanh"}, box, None)


def opposites() -> Problem:
    """relu 6-6-2 of which a neuron is the opposite of another, with half of its outgoing weights, turned."""
    (w, b), (a, c) = weights([6, 5, 2], 3)
    layers = [(torch.cat([w, -w[:1]]), torch.cat([b, -b[:1]])), (torch.cat([a, -0.5 * a[:, :1]], dim=1), c)]
    function = network(layers, "relu")
    return Problem(function, 6, {"activation": "relu"}, function, [6], bends=(w, b))


def saturating(gain: float) -> Problem:
    """A sigmoid that is all but 0 or 1 at most inputs; two of its neurons bend only out there."""
    draw = torch.Generator().manual_seed(6)
    w, b, a = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((16, 6), (16,), (1, 16)))
    layers = [(w / 6**0.5, b / 2), (gain * a / 4, torch.zeros(1, dtype=torch.float64))]
    scores = network(layers, "relu")

    def function(x_QI: Tensor) -> Tensor:
        return torch.sigmoid(scores(x_QI))

    told = {"activation": "relu", "outputs": "probabilities"}
    return Problem(function, 6, told, function, [16], bends=layers[0])


class Drifts:
    """A box that is replaced by another one after 6,000 queries."""

    def __init__(self) -> None:
        self.first, self.second = (network(weights([6, 4, 1], seed), "tanh") for seed in (1, 2))
        self.rows = 0

    def __call__(self, x_QI: Tensor) -> Tensor:
        self.rows += len(x_QI)
        return (self.first if self.rows < 6000 else self.second)(x_QI)


def drifting() -> Problem:
    box = Drifts()
    return Problem(box, 6, {"activation": "tanh"}, box.second, None)


def other_slope() -> Problem:
    """leaky_relu of slope .2, told as leaky_relu, whose slope is .01."""
    (w, b), (a, c) = weights([6, 4, 1], 1)

    def box(x_QI: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x_QI @ w.T + b, 0.2) @ a.T + c

    return Problem(box, 6, {"activation": "leaky_relu"}, box, None, bends=(w, b))


class Flaky:
    """Raises ConnectionError at every 40th call."""

    def __init__(self, function: Function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, x_QI: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 40 == 7:
            raise ConnectionError("reset by peer")
        return self.function(x_QI)


def flaky() -> Problem:
    problem = dense([6, 4, 2], "tanh", told={"retries": 3, "max_rows": 500})
    return Problem(Flaky(problem.black_box), 6, problem.arguments, problem.truth, [4], bends=problem.bends)


def fails_once() -> Problem:
    """A run that is broken off by the box after 30 calls, and started again with the same answers."""
    folder = tempfile.mkdtemp()
    problem = dense([6, 4, 2], "tanh", told={"answers": folder})
    box = Breaks(problem.black_box, 30)
    try:
        recover_network(box, 6, **problem.arguments)
    except ValueError:
        box.at = 10**9
    rows = box.rows
    return Problem(box, 6, problem.arguments, problem.truth, [4], after=lambda: f"{rows} rows, then {box.rows - rows}")


class Breaks:
    """Raises at a given call and counts its rows."""

    def __init__(self, function: Function, at: int) -> None:
        self.function, self.at, self.calls, self.rows = function, at, 0, 0

    def __call__(self, x_QI: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x_QI)
        if self.calls == self.at:
            raise ConnectionError("gone")
        return self.function(x_QI)


def short_budget(queries: int) -> Problem:
    config = replace(RecoveryConfig(), {"budget.queries": queries})
    return dense([8, 10, 2], "tanh", told={"config": config})


def only_inside() -> Problem:
    """A picture service that refuses pixels outside [0, 1] with an exception."""

    def check(x_QI: Tensor) -> Tensor:
        if (x_QI < 0).any() or (x_QI > 1).any():
            raise ValueError("pixels must lie in [0, 1]")
        return 8 * x_QI - 4

    more = {"centre": 0.5, "scale": 0.3, "domain": (0, 1)}
    return through([6, 5, 2], "tanh", check, told={"domain": (0.0, 1.0)}, **more)


def module(dtype: torch.dtype, tolerance: float, layer: torch.nn.Module | None = None, mode: str = "eval") -> Problem:
    """A torch.nn.Sequential 8-10-2 in a float type, with a further layer if one is given."""
    torch.manual_seed(3)
    parts = [torch.nn.Linear(8, 10), *([layer] if layer else []), torch.nn.Tanh(), torch.nn.Linear(10, 2)]
    net = torch.nn.Sequential(*parts).to(dtype)
    exact = copy.deepcopy(net).double()
    net.train(mode == "train")
    truth = None if layer else lambda x: exact(x).detach()
    first = exact[0]
    bends = (first.weight.detach(), first.bias.detach())
    return Problem(net, 8, {"activation": "tanh"}, truth, None if layer else [10], bends=bends, tolerance=tolerance)


# -- estimators --------------------------------------------------------------------------------------------------------


def estimator(name: str, raw: bool = False, given: bool = True, state: int = 0) -> Problem:
    """scikit-learn's MLP with its default 100 relu neurons, asked by its method.

    Fitted to standardised data, or to the data set as it is; with the data `given` to the recovery or not.
    """
    from sklearn import datasets
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    x_QI, y_Q = {
        "diabetes": lambda: datasets.load_diabetes(return_X_y=True),
        "friedman1": lambda: datasets.make_friedman1(500, random_state=0),
        "digits": lambda: datasets.load_digits(return_X_y=True),
        "breast cancer": lambda: datasets.load_breast_cancer(return_X_y=True),
        "wine": lambda: datasets.load_wine(return_X_y=True),
    }[name]()
    regression = name in ("diabetes", "friedman1")
    centre, spread = x_QI.mean(0), np.where(x_QI.std(0) > 0, x_QI.std(0), 1)
    if not raw:
        x_QI, centre, spread = (x_QI - centre) / spread, np.zeros_like(centre), np.ones_like(spread)
    made = (MLPRegressor if regression else MLPClassifier)(random_state=state).fit(x_QI, y_Q)
    method = made.predict if regression else made.predict_proba
    (w, v), b = made.coefs_, made.intercepts_[0]
    told = {"activation": "relu", "outputs": "values" if regression else "probabilities"}
    told |= {"data": x_QI} if given else {}

    def truth(x_QI: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(method(x_QI.numpy()))).reshape(len(x_QI), -1)

    live = int(((np.abs(v).max(1) > 1e-12) & (np.abs(w).max(0) > 1e-12)).sum())
    bends = (torch.from_numpy(w.T.copy()), torch.from_numpy(b.copy()))
    return Problem(
        method,
        x_QI.shape[1],
        told,
        truth,
        [live],
        centre=torch.from_numpy(centre),
        scale=torch.from_numpy(spread),
        bends=bends,
        tolerance=1e-5,
    )


def other_model(kind: str, told: str = "relu") -> Problem:
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.linear_model import LinearRegression
    from sklearn.neighbors import KNeighborsRegressor

    x_QI, y_Q = load_diabetes(return_X_y=True)
    x_QI = x_QI / x_QI.std(0)
    models = {
        "linear": LinearRegression(),
        "forest": RandomForestRegressor(50, random_state=0),
        "neighbours": KNeighborsRegressor(),
        "gaussian process": GaussianProcessRegressor(alpha=0.1, random_state=0),
    }
    return Problem(models[kind].fit(x_QI, y_Q).predict, x_QI.shape[1], {"activation": told})


def over_http() -> Problem:
    from examples.black_box_over_http import FaultyService, ask

    net = network(weights([4, 3, 1], 1), "tanh")
    service = FaultyService(lambda rows: net(torch.tensor(rows, dtype=torch.float64)).tolist())
    arguments = {"activation": "tanh", "max_rows": 2000, "retries": 8}
    return Problem(
        partial(ask, service.url), 4, arguments, net, [3], after=lambda: f"{service.faults} faults", tolerance=1e-6
    )


def one_hot(x_QO: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(x_QO.argmax(1), x_QO.shape[1])


def rounded(decimals: int, y_QO: Tensor) -> Tensor:
    return y_QO.round(decimals=decimals)
