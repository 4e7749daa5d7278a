"""Settings of a recovery; their dotted names are the keys of tune spaces (`students.count`, ...)."""

import math
from dataclasses import dataclass, field

from distrecon.config import check, setting
from distrecon.expand_cluster.warm_start import OPTIMISERS

CUT_RULES = ("distinct", "published")


@dataclass(frozen=True)
class StudentsConfig:
    """How many students, and how wide."""

    count: int = setting(0, "N; 0: batches are added until two in a row give the same verified sizes", least=0)
    rho: float = setting(2.0, "student width / guessed teacher width", least=1)
    width: int = setting(0, "the guess of the teacher's width; 0: from the black box", least=0)
    batch: int = setting(5, "students a batch of the automatic rule", least=1)
    maximum: int = setting(20, "students at most under the automatic rule", least=1)

    def __post_init__(self) -> None:
        check(self, "students")


@dataclass(frozen=True)
class ProbesConfig:
    """The queries that the students learn from, and those that verify the result."""

    count: int = setting(0, "training queries; 0: several times the unknowns", least=0)
    data_share: float = setting(
        0.0, "share of the training queries taken from the user's data, where given", least=0, most=1
    )
    subspace: bool = setting(True, "find the inputs' relevant directions by finite differences")
    derivatives: bool = setting(
        True, "read the neurons of one smooth hidden layer from derivatives before students that need a warm start"
    )
    disputed: float = setting(
        0.0, "share of the training queries of a later round where the students before disagree most", least=0, most=1
    )
    fresh: int = setting(1000, "queries that verify the result, never trained on", least=1)

    def __post_init__(self) -> None:
        check(self, "probes")


@dataclass(frozen=True)
class WarmStartConfig:
    """The first-order optimiser that brings the students near their minima."""

    optimiser: str = setting("soap", choices=OPTIMISERS)
    steps: int = setting(1000, least=0)
    learning_rate: float = setting(1e-2, above=0)
    batch: int = setting(256, "queries a step", least=1)

    def __post_init__(self) -> None:
        check(self, "warm_start")


@dataclass(frozen=True)
class SolverConfig:
    """The Levenberg-Marquardt solver; losses are relative to the outputs' variance."""

    iterations: int = setting(100, "at most, for one fit", least=1)
    floor: float = setting(
        1e-24, "a fit at or below this loss is exact; raised to what a noisy (float32) teacher allows", above=0
    )
    student_parameters: int = setting(
        400, "students up to this size are fitted by the solver alone, without a warm start"
    )
    polish_parameters: int = setting(10_000, "recovered networks up to this size are polished in all inputs at once")
    dense_parameters: int = setting(3500, "one network above this size is fitted without forming J^T J")
    rows: int = setting(1000, "queries used in one fit (more when the unknowns need them)", least=1)

    def __post_init__(self) -> None:
        check(self, "solver")


@dataclass(frozen=True)
class ClusteringConfig:
    """What makes a cluster of students' neurons a neuron of the teacher."""

    gamma: float = setting(
        0.8,
        "share of the students that must have the neuron; lower shares are tried when it fails",
        above=0,
        most=1,
    )
    beta: float = setting(
        math.pi / 6, "widest mean angle inside a cluster, in radians; up to pi/2", above=0, most=math.pi / 2
    )
    rule: str = setting("distinct", "how the tree is cut", choices=CUT_RULES)

    def __post_init__(self) -> None:
        check(self, "clustering")


@dataclass(frozen=True)
class BudgetConfig:
    """What a recovery may spend."""

    queries: int = setting(0, "0: no limit", least=0)
    seconds: float = setting(0.0, "0: no limit; results then depend on the machine's speed", least=0)
    attempts: int = setting(6, "rounds of students; later ones are wider, or trained longer on more probes", least=1)

    def __post_init__(self) -> None:
        check(self, "budget")


@dataclass(frozen=True)
class RecoveryConfig:
    """All settings of a recovery; the same configuration, data and seed give the same result."""

    seed: int = setting(0, "of everything random", least=0)
    students: StudentsConfig = field(default_factory=StudentsConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    def __post_init__(self) -> None:
        check(self)
