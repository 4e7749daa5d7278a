"""Adam with plateau decay (the published way) against Levenberg-Marquardt, on the same students of the same problems.

    python benchmarks/recovery_solvers.py [--problems 10] [--adam-seconds 30]

Both start from the same random students and see the same probes. The table gives the time at which the median student
passes a relative loss of 1e-4, and the final losses. Writes JSON lines to --out as it goes; problems that are there
already are skipped.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster import network, synthetic_teacher
from distrecon.expand_cluster.least_squares import levenberg_marquardt
from distrecon.expand_cluster.networks import DenseNet
from distrecon.expand_cluster.problem import NetworkFit, TrainingData
from distrecon.expand_cluster.warm_start import Adam
from distrecon.nets.activations import activation as find_activation

PROBLEMS = ((4, 4), (8, 4), (16, 4), (4, 2), (8, 8), (2, 4), (16, 2), (32, 2), (2, 2), (4, 8))
TARGET = 1e-4
PATIENCE, DECAY = 200, 0.5  # the plateau rule: this many steps without a new least loss shrink the rate

Trace = list[tuple[float, float]]


def adam(net: DenseNet, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor, seconds: float) -> Trace:
    """(CPU seconds, median loss) of full-batch Adam at 1e-3 with plateau decay, in float64."""
    matrices = [m.clone() for m in net.matrices(theta_NP)]
    rule, rate, trace, started = Adam(matrices), 1e-3, [], time.process_time()
    best, age = float("inf"), 0
    while time.process_time() - started < seconds:
        loss_N, gradients = net.loss_gradients(net.flatten(matrices), x_QI, y_QO)
        for m, update in zip(matrices, rule.updates(gradients), strict=True):
            m.sub_(rate * update)
        loss = float(loss_N.median())
        trace.append((time.process_time() - started, loss))
        best, age = (loss, 0) if loss < best * 0.999 else (best, age + 1)
        if age >= PATIENCE:
            rate, age = max(rate * DECAY, 1e-6), 0
    return trace


def solver(net: DenseNet, theta_NP: Tensor, x_QI: Tensor, y_QO: Tensor) -> Trace:
    """The same for Levenberg-Marquardt."""
    trace: Trace = []
    started = time.process_time()
    levenberg_marquardt(
        NetworkFit(net, x_QI, y_QO),
        theta_NP,
        200,
        progress=lambda _, loss_N: trace.append((time.process_time() - started, float(loss_N.median()))),
    )
    return trace


def first_below(trace: Trace, target: float) -> float:
    """Seconds until the loss first is at most `target`; infinite if it never is."""
    return next((seconds for seconds, loss in trace if loss <= target), float("inf"))


def compare(inputs: int, width: int, seconds: float, seed: int) -> dict[str, Any]:
    """Both optimisers on one synthetic problem, N = 10 students four times as wide as the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = network(synthetic_teacher(inputs, width, "g", seed), "g")
    x_QI = torch.randn(1000, inputs, generator=generator, dtype=torch.float64)
    data = TrainingData.of(x_QI, x_QI, teacher(x_QI))
    net = DenseNet((inputs, 4 * width, 1), find_activation("g"))
    theta_NP = net.random(10, generator)
    traces = {
        "adam": adam(net, theta_NP, data.z_QR, data.y_QO, seconds),
        "solver": solver(net, theta_NP, data.z_QR, data.y_QO),
    }
    own = traces["adam"][-1][1]
    return {
        "inputs": inputs,
        "width": width,
        **{f"{name}_to_target": first_below(trace, TARGET) for name, trace in traces.items()},
        "solver_to_adams_final": first_below(traces["solver"], own),
        "adam_seconds": traces["adam"][-1][0],
        **{f"{name}_final": trace[-1][1] for name, trace in traces.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=len(PROBLEMS))
    parser.add_argument("--adam-seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("runs/recovery_solvers.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    known = {(row["inputs"], row["width"]): row for row in rows}
    rows = []
    for i, (inputs, width) in enumerate(PROBLEMS[: arguments.problems]):
        row = known.get((inputs, width))
        if row is None:
            row = compare(inputs, width, arguments.adam_seconds, seed=i)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(
            f"d={inputs:<3} r={width:<2} seconds to {TARGET:g}: Adam {row['adam_to_target']:6.2f} "
            f"solver {row['solver_to_target']:6.2f}; final median loss: Adam {row['adam_final']:.1e} "
            f"({row['adam_seconds']:.0f} s) solver {row['solver_final']:.1e}",
            flush=True,
        )
    for name, ratio in (
        (
            f"time to {TARGET:g} (Adam's whole time where it does not get there)",
            [min(row["adam_to_target"], row["adam_seconds"]) / row["solver_to_target"] for row in rows],
        ),
        ("time to Adam's final loss", [row["adam_seconds"] / row["solver_to_adams_final"] for row in rows]),
    ):
        print(f"{name}: Adam over solver, median {torch.tensor(ratio).median():.0f}, least {min(ratio):.0f}")


if __name__ == "__main__":
    main()
