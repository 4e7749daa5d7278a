"""What every stage of one recovery shares: the black box, the settings, the probes' coordinates, the books.

Legend: Q queries, I inputs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrecon.errors import UserError
from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.fitting import Committee, Probed
from distrecon.expand_cluster.probes import Coordinates
from distrecon.expand_cluster.stages import Stages
from distrecon.nets.activations import Activation

NOISE_MARGIN = 10.0  # the floor lies this far above the teacher's rounding noise
DIRECTION_MARGIN = 100.0  # likewise for a fit in relevant directions that are known to a relative error
NEAR_SHARE = 0.25  # of the probes lie round places of interest, where such are known
CANDIDATES = 8  # unasked queries for each that is chosen where students disagree
TRAIN_SCALES = (1.0, 1.0, 3.0)  # of the probes that students learn from, in turn

Progress = Callable[[str, float], None]


@dataclass
class Run:
    """What every stage of one recovery shares."""

    box: BlackBox
    activation: Activation
    config: RecoveryConfig
    generator: torch.Generator
    data_QI: Tensor | None
    progress: Progress | None
    deadline: float | None
    coordinates: Coordinates
    hidden_layers: int = 1
    memory: Stages | None = None
    committee: Committee | None = None  # students of an earlier round that was not verified
    places_SI: Tensor | None = None  # inputs round which something happens that other probes would miss
    history: list[tuple[str, int, list[float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def floors(self, data: Probed) -> tuple[float, float]:
        """The relative loss of an exact fit, and of one in relevant directions that carry an error of their own."""
        floor = max(self.config.solver.floor, (NOISE_MARGIN * self.box.noise / data.scale) ** 2)
        return floor, max(floor, (DIRECTION_MARGIN * self.coordinates.error) ** 2)

    def timed(self, stage: str, started: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started

    def say(self, stage: str, value: float) -> None:
        if self.progress is not None:
            self.progress(stage, value)

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def draw(self, count: int, scales: tuple[float, ...] = TRAIN_SCALES) -> Tensor:
        """Probes x[Q, I] in the coordinates, a share of them round the places of interest."""
        near = int(NEAR_SHARE * count) if self.places_SI is not None else 0
        x_QI = self.coordinates.draw(count - near, self.generator, scales)
        if self.places_SI is not None:
            x_QI = torch.cat([x_QI, self.coordinates.near(self.places_SI, near, self.generator)])
        return x_QI

    def disputed(self, count: int) -> Tensor:
        """Probes x[Q, I] where the committee disagrees most, of several times as many; none without a committee."""
        if self.committee is None or not count:
            return self.draw(0)
        x_QI = self.draw(CANDIDATES * count)
        return x_QI[self.committee.disagreement(x_QI).topk(count).indices]

    def probe(self, unknowns: int, patience: int = 1) -> Probed:
        """Training queries for a network of so many unknowns, some of them the user's data, in random order.

        Raises UserError when the settings ask for fewer equations than unknowns.
        """
        settings, outputs = self.config.probes, self.box.outputs
        if settings.count and settings.count * outputs < unknowns:
            raise UserError(
                f"probes.count = {settings.count} gives {settings.count * outputs} equations, "
                f"fewer than the students' {unknowns} unknowns"
            )
        started = time.monotonic()
        count = settings.count * patience or patience * max(2000, 4 * unknowns // outputs)
        own = 0 if self.data_QI is None else min(len(self.data_QI), int(settings.data_share * count))
        contested_QI = self.disputed(int(settings.disputed * (count - own)))
        x_QI = torch.cat([contested_QI, self.draw(count - own - len(contested_QI))])
        if self.data_QI is not None and own:
            rows = torch.randperm(len(self.data_QI), generator=self.generator)[:own]
            x_QI = torch.cat([x_QI, self.data_QI[rows]])
        x_QI = x_QI[torch.randperm(count, generator=self.generator)]
        data = Probed.of(x_QI, x_QI @ self.coordinates.to_RI.T, self.box(x_QI))
        self.timed("queries", started)
        return data
