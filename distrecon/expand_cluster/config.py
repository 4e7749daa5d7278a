"""Settings of a recovery; their dotted names are the keys of tune spaces (`students.count`, ...)."""

import math
from dataclasses import dataclass, field

from distrecon.errors import UserError, nearest
from distrecon.expand_cluster.warm_start import OPTIMISERS

CUT_RULES = ("distinct", "published")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class StudentsConfig:
    """How many students, and how wide."""

    count: int = 0  # N; 0: batches are added until two in a row give the same verified sizes
    rho: float = 2.0  # student width / guessed teacher width
    width: int = 0  # the guess of the teacher's width; 0: from the black box
    batch: int = 5  # students a batch of the automatic rule
    maximum: int = 20  # students at most under the automatic rule

    def __post_init__(self) -> None:
        _require(self.count >= 0, f"students.count must be 0 (automatic) or more, not {self.count}")
        _require(self.rho >= 1, f"students.rho must be at least 1, not {self.rho}")
        _require(self.width >= 0, f"students.width must be 0 (automatic) or more, not {self.width}")
        _require(self.batch >= 1, f"students.batch must be at least 1, not {self.batch}")
        _require(self.maximum >= 1, f"students.maximum must be at least 1, not {self.maximum}")


@dataclass(frozen=True)
class ProbesConfig:
    """The queries that the students learn from, and those that verify the result."""

    count: int = 0  # training queries; 0: several times the unknowns
    data_share: float = 0.0  # share of the training queries taken from the user's data, where given
    subspace: bool = True  # find the inputs' relevant directions by finite differences
    disputed: float = 0.0  # share of the training queries of a later round where the students before disagree most
    fresh: int = 1000  # queries that verify the result, never trained on

    def __post_init__(self) -> None:
        _require(self.count >= 0, f"probes.count must be 0 (automatic) or more, not {self.count}")
        _require(0 <= self.data_share <= 1, f"probes.data_share must lie between 0 and 1, not {self.data_share}")
        _require(0 <= self.disputed <= 1, f"probes.disputed must lie between 0 and 1, not {self.disputed}")
        _require(self.fresh >= 1, f"probes.fresh must be at least 1, not {self.fresh}")


@dataclass(frozen=True)
class WarmStartConfig:
    """The first-order optimiser that brings the students near their minima."""

    optimiser: str = "soap"
    steps: int = 1000
    learning_rate: float = 1e-2
    batch: int = 256

    def __post_init__(self) -> None:
        known = ", ".join(sorted(OPTIMISERS))
        _require(
            self.optimiser in OPTIMISERS,
            f"unknown warm_start.optimiser {self.optimiser!r}{nearest(self.optimiser, OPTIMISERS)} (known: {known})",
        )
        _require(self.steps >= 0, f"warm_start.steps must be 0 or more, not {self.steps}")
        _require(self.learning_rate > 0, f"warm_start.learning_rate must be above 0, not {self.learning_rate}")
        _require(self.batch >= 1, f"warm_start.batch must be at least 1, not {self.batch}")


@dataclass(frozen=True)
class SolverConfig:
    """The Levenberg-Marquardt solver; losses are relative to the outputs' variance."""

    iterations: int = 100  # at most, for one fit
    floor: float = 1e-24  # a fit at or below this loss is exact; raised to what a noisy (float32) teacher allows
    student_parameters: int = 400  # students up to this size are fitted by the solver alone, without a warm start
    polish_parameters: int = 3500  # recovered networks up to this size are polished in all inputs at once
    rows: int = 1000  # queries used in one fit (more when the unknowns need them)

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, f"solver.iterations must be at least 1, not {self.iterations}")
        _require(self.floor > 0, f"solver.floor must be above 0, not {self.floor}")
        _require(self.rows >= 1, f"solver.rows must be at least 1, not {self.rows}")


@dataclass(frozen=True)
class ClusteringConfig:
    """What makes a cluster of students' neurons a neuron of the teacher."""

    gamma: float = 0.8  # share of the students that must have the neuron; lower shares are tried when it fails
    beta: float = math.pi / 6  # widest mean angle inside a cluster, in radians
    rule: str = "distinct"

    def __post_init__(self) -> None:
        _require(0 < self.gamma <= 1, f"clustering.gamma must lie in (0, 1], not {self.gamma}")
        _require(0 < self.beta <= math.pi / 2, f"clustering.beta must lie in (0, pi/2], not {self.beta}")
        _require(self.rule in CUT_RULES, f"unknown clustering.rule {self.rule!r}{nearest(self.rule, CUT_RULES)}")


@dataclass(frozen=True)
class BudgetConfig:
    """What a recovery may spend."""

    queries: int = 0  # 0: no limit
    seconds: float = 0.0  # 0: no limit; results then depend on the machine's speed
    attempts: int = 6  # rounds of students; later ones are wider, or trained longer on more probes

    def __post_init__(self) -> None:
        _require(self.queries >= 0, f"budget.queries must be 0 (no limit) or more, not {self.queries}")
        _require(self.seconds >= 0, f"budget.seconds must be 0 (no limit) or more, not {self.seconds}")
        _require(self.attempts >= 1, f"budget.attempts must be at least 1, not {self.attempts}")


@dataclass(frozen=True)
class RecoveryConfig:
    """All settings of a recovery; the same configuration, data and seed give the same result."""

    seed: int = 0
    students: StudentsConfig = field(default_factory=StudentsConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
