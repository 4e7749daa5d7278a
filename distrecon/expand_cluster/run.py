"""What every stage of one recovery shares: the black box, what is asked of it, the settings, and what was spent.

Legend: Q queries, I inputs.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.probes import Probes
from distrecon.expand_cluster.problem import Problem, TrainingData
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.stages import Stages
from distrecon.expand_cluster.thresholds import DIRECTION_MARGIN, NOISE_MARGIN
from distrecon.nets.activations import Activation

LEAST_QUERIES = 2000  # training queries at least, and for every unknown of the students so many equations:
EQUATIONS = 4

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Run:
    """What every stage of one recovery shares.

    `history`, `seconds` (by stage), `candidates` (all networks so far, those not yet verified too) and `explored` (the
    coordinates of training queries) grow as it goes.
    """

    box: BlackBox
    activation: Activation
    hidden_layers: int
    config: RecoveryConfig
    generator: torch.Generator
    data_QI: Tensor | None
    deadline: float | None
    progress: Progress
    stages: Stages | None
    history: list[tuple[str, int, list[float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    candidates: list[Recovery] = field(default_factory=list)
    explored: list[Coordinates] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to the stage's seconds."""
        started = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def problem(self, probes: Probes, unknowns: int, patience: int = 1) -> Problem:
        """Training data for networks of so many unknowns; `patience` times as much as usual.

        Raises UserError when the settings ask for fewer equations than unknowns.
        """
        settings, outputs = self.config.probes, self.box.outputs
        if settings.count and settings.count * outputs < unknowns:
            raise UserError(
                f"probes.count = {settings.count} gives {settings.count * outputs} equations, "
                f"fewer than the students' {unknowns} unknowns"
            )
        self.explored.append(probes.coordinates)
        with self.timed("queries"):
            count = patience * (settings.count or max(LEAST_QUERIES, EQUATIONS * unknowns // outputs))
            x_QI = self.box.place(probes.training(count, settings, self.data_QI, self.generator))
            answers_QO = self.box(x_QI)
            data = TrainingData.of(x_QI, x_QI @ probes.coordinates.to_RI.T, answers_QO)
        if not data.scale > 0:
            raise UserError(f"all of {count} answers are the same: the black box does not depend on the inputs asked")
        noise = math.hypot(self.box.noise, float(self.box.error(answers_QO).square().mean().sqrt()))
        exact = max(self.config.solver.floor, (NOISE_MARGIN * noise / data.scale) ** 2)
        floor = max(exact, (DIRECTION_MARGIN * probes.coordinates.error) ** 2)
        return Problem(data, self.activation, self.config, probes, floor, exact, self.deadline)
