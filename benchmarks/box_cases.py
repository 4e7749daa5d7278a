"""The black boxes that are recovered, as data: each a name, how to make it, and what an honest answer is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.black_boxes import (
    Problem,
    dense,
    drifting,
    estimator,
    fails_once,
    faint_neuron,
    far_bump,
    far_kink,
    flaky,
    hidden_gate,
    linear_skip,
    module,
    moved_inputs,
    one_hot,
    only_inside,
    opposites,
    other_model,
    other_slope,
    over_http,
    redundant,
    rounded,
    saturating,
    short_budget,
    through,
    two_kinds,
    two_sizes,
)


@dataclass(frozen=True)
class Case:
    """One black box.

    `should`: "exact", "unverified" (or verified with a certificate that says what may be missing), or part of the name
    of the finding, or of the error, that is due.
    """

    name: str
    should: str
    make: Callable[[], Problem]
    seconds: int = 60
    small: bool = False


SCALES = torch.logspace(-3, 3, 8, dtype=torch.float64)
NET = [8, 5, 3]
ESTIMATORS = ("diabetes", "friedman1", "digits", "breast cancer", "wine")

CASES = [
    # networks, as they are
    Case("tanh 4-6-2, inputs round 50", "exact", partial(moved_inputs, "tanh", 50.0, 1.0, sizes=[4, 6, 2])),
    Case("relu 8-5-3, a kink 60 deviations off", "exact", far_kink, small=True),
    Case("outputs 1e14 net(x) and sin(20 x)", "unverified", two_sizes),
    Case("float32, a neuron of 3e-6", "unverified", faint_neuron),
    *(Case(f"relu 8-{h}-1", "exact", partial(dense, [8, h, 1], "relu"), 120) for h in (16, 20, 32, 64)),
    Case("tanh 64-32-32-10", "exact", partial(dense, [64, 32, 32, 10], "tanh"), 600),
    Case("tanh 784-64-10", "exact", partial(dense, [784, 64, 10], "tanh"), 600),
    Case("g 64-50-10", "exact", partial(dense, [64, 50, 10], "g"), 600),
    Case("g 64-100-10", "exact", partial(dense, [64, 100, 10], "g"), 600),
    Case("tanh 10-30-1", "exact", partial(dense, [10, 30, 1], "tanh"), 600),
    Case("tanh 10-100-1", "exact", partial(dense, [10, 100, 1], "tanh"), 600),
    Case("sigmoid 10-100-1", "exact", partial(dense, [10, 100, 1], "sigmoid"), 600),
    Case("relu 8-6-6-6-2", "exact", partial(dense, [8, 6, 6, 6, 2], "relu", 2), 300),
    # two neurons of the third layer are on only where one of their inputs is off: these weights no answer shows
    Case("relu 8-6-6-6-2, weights that never show", "unverified", partial(dense, [8, 6, 6, 6, 2], "relu"), 300),
    # scikit-learn's defaults
    *(Case(f"scikit-learn 100 relu, {name}", "exact", partial(estimator, name), 300) for name in ESTIMATORS),
    Case(
        "scikit-learn 100 relu, breast cancer, other start", "exact", partial(estimator, "breast cancer", state=3), 300
    ),
    *(
        Case(
            f"{name}, raw data, {'given' if given else 'not given'}",
            "exact",
            partial(estimator, name, True, given),
            300,
        )
        for name in ESTIMATORS
        for given in (True, False)
    ),
    # kinds of answers
    Case("softmax, tanh 8-5-3", "exact", partial(through, NET, "tanh", after=lambda y: y.softmax(1)), small=True),
    Case("softmax, relu 8-5-3", "exact", partial(through, NET, "relu", after=lambda y: y.softmax(1)), small=True),
    Case("one-hot", "labels only", partial(through, NET, "tanh", after=one_hot), small=True),
    Case("class label", "labels only", partial(through, NET, "tanh", after=lambda y: y.argmax(1)), small=True),
    Case(
        "rounded to 3 decimals",
        "exact",
        partial(through, NET, "tanh", after=partial(rounded, 3), exact=False, tolerance=0.01, bends=None),
        300,
    ),
    Case("numpy answers", "exact", partial(through, NET, "tanh", after=lambda y: y.numpy()), small=True),
    Case("answers [Q]", "exact", partial(through, [6, 3, 1], "tanh", after=lambda y: y[:, 0]), small=True),
    Case("float32 nn.Sequential", "exact", partial(module, torch.float32, 1e-3)),
    Case(
        "wrong input_size",
        "raised at queries of shape",
        lambda: Problem(module(torch.float32, 1).black_box, 5, {}),
        small=True,
    ),
    # inputs
    Case(
        "inputs clamped to [0, 1]", "exact", partial(through, NET, "tanh", lambda x: x.clamp(0, 1), domain=(0, 1)), 120
    ),
    Case("inputs clamped to [-3, 3]", "exact", partial(through, NET, "tanh", lambda x: x.clamp(-3, 3), domain=(-3, 3))),
    Case("input scales 1e-3 to 1e3", "exact", partial(moved_inputs, "tanh", 0.0, SCALES), 120),
    Case("inputs x 1e3", "exact", partial(moved_inputs, "tanh", 0.0, 1e3), 120),
    Case("inputs round 50, with data", "exact", partial(moved_inputs, "tanh", 50.0, 1.0, True), small=True),
    # other functions
    Case("net(x) + A x", "linear skip", linear_skip, small=True),
    Case("tanh, then relu", "kinks between curves", two_kinds, small=True),
    Case(
        "LayerNorm",
        "normalised inputs",
        partial(through, NET, "tanh", lambda x: torch.nn.functional.layer_norm(x, (8,))),
        small=True,
    ),
    *(
        Case(kind, name, partial(other_model, kind), small=True)
        for kind, name in (("linear", "linear"), ("forest", "piecewise constant"), ("neighbours", "piecewise constant"))
    ),
    # services
    Case("a ConnectionError now and then", "exact", flaky, small=True),
    Case("broken off, then started again", "exact", fails_once),
    Case("a budget of 4,000 that runs out", "unverified", partial(short_budget, 4_000), 120),
    # nastier
    Case("a gate in one corner of the domain", "unverified", hidden_gate, 120),
    Case("a sigmoid that is mostly 0 or 1", "unverified", partial(saturating, 15.0), 120),
    Case(
        "softmax of two, all but certain",
        "exact",
        partial(through, [8, 5, 2], "relu", after=lambda y: (20 * y - torch.tensor([150.0, 0.0])).softmax(1)),
        120,
    ),
    Case(
        "1 minus a sigmoid",
        "exact",
        partial(
            through,
            [8, 5, 1],
            "relu",
            after=lambda y: 1 - torch.sigmoid(5 + 3 * y),
            told={"outputs": "probabilities"},
            tolerance=1e-5,
        ),
        120,
    ),
    Case("7 neurons that are 4", "exact", redundant),
    Case("another box after 6,000 queries", "unverified", drifting, 120),
    Case(
        "dropout left on",
        "not deterministic",
        partial(module, torch.float64, 1, torch.nn.Dropout(0.3), "train"),
        small=True,
    ),
    Case(
        "batch normalisation left on",
        "depends on the other rows",
        partial(module, torch.float64, 1, torch.nn.BatchNorm1d(10), "train"),
        small=True,
    ),
    Case("bfloat16 module", "unverified", partial(module, torch.bfloat16, 0.1), 120),
    Case("float16 module", "unverified", partial(module, torch.float16, 0.05), 120),
    Case("a bump 30 deviations off", "unverified", far_bump, 120),
    Case("relu, a neuron and its opposite", "unverified", opposites, small=True),
    Case("pixels outside [0, 1] are refused", "exact", only_inside, 120),
    Case(
        "probabilities rounded to 4 decimals",
        "unverified",
        partial(through, NET, "tanh", after=lambda y: rounded(4, y.softmax(1)), exact=True, tolerance=0.01),
        120,
    ),
    Case(
        "a sigmoid's column in float32",
        "exact",
        partial(
            through,
            [6, 4, 1],
            "tanh",
            after=lambda y: torch.sigmoid(3 * y).float(),
            told={"outputs": "probabilities"},
            tolerance=1e-4,
        ),
        120,
    ),
    Case("a Gaussian process, told relu", "smooth", partial(other_model, "gaussian process"), small=True),
    Case("a Gaussian process, told tanh", "unverified", partial(other_model, "gaussian process", "tanh"), 200),
    Case("relu, told tanh", "piecewise linear", partial(dense, NET, "relu", told={"activation": "tanh"}), small=True),
    Case(
        "relu 12-8-8-4, told one layer",
        "several hidden layers",
        partial(dense, [12, 8, 8, 4], "relu", told={"hidden_layers": 1}),
        small=True,
    ),
    Case("leaky slope .2", "unverified", other_slope, 120),
    Case("over HTTP, with faults", "exact", over_http, 300),
]
