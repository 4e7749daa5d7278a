"""The queries themselves: drawn in the relevant coordinates, round known bends, and where students disagree.

Legend: Q queries, I inputs, R relevant input directions, N students, P parameters, S bends.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.expand_cluster.config import ProbesConfig
from distrecon.expand_cluster.coordinates import Coordinates
from distrecon.expand_cluster.networks import DenseNet

NEAR_SHARE = 0.25  # of the probes lie round bends, where such are known
CANDIDATES = 8  # probes drawn for each that is chosen where students disagree
TRAIN_SCALES = (1.0, 1.0, 3.0)  # of the probes that students learn from, in turn


@dataclass(frozen=True)
class Committee:
    """Students that disagree where the answers are not determined yet.

    Query by committee (Seung, Opper and Sompolinsky, COLT 1992); compare arXiv 2511.20312.
    """

    net: DenseNet
    theta_NP: Tensor
    to_RI: Tensor

    def disagreement(self, x_QI: Tensor) -> Tensor:
        """[Q]: variance of the students' answers, relative to their size, so that large ones do not win by size."""
        y_NQO = self.net(self.theta_NP, x_QI @ self.to_RI.T)
        return y_NQO.var(0).sum(1) / (1 + y_NQO.mean(0).square().sum(1))


@dataclass(frozen=True)
class Probes:
    """Where queries are drawn.

    `bends_SI` are inputs at which the black box bends, or contradicts what was found before, which other probes would
    miss; `committee` the students of an
    earlier round that was not verified.
    """

    coordinates: Coordinates
    bends_SI: Tensor | None = None
    committee: Committee | None = None

    def draw(self, count: int, generator: torch.Generator, scales: tuple[float, ...] = TRAIN_SCALES) -> Tensor:
        """Probes x[Q, I] in the coordinates, a share of them round the bends."""
        near = int(NEAR_SHARE * count) if self.bends_SI is not None else 0
        x_QI = self.coordinates.draw(count - near, generator, scales)
        if self.bends_SI is not None:
            x_QI = torch.cat([x_QI, self.coordinates.near(self.bends_SI, near, generator)])
        return x_QI

    def disputed(self, count: int, generator: torch.Generator) -> Tensor:
        """Probes x[Q, I] where the committee disagrees most, of several times as many; none without a committee."""
        if self.committee is None or not count:
            return self.draw(0, generator)
        x_QI = self.draw(CANDIDATES * count, generator)
        return x_QI[self.committee.disagreement(x_QI).topk(count).indices]

    def training(
        self, count: int, settings: ProbesConfig, data_QI: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """`count` training queries in random order, some of them disputed, some of them the user's data."""
        own = 0 if data_QI is None else min(len(data_QI), int(settings.data_share * count))
        disputed_QI = self.disputed(int(settings.disputed * (count - own)), generator)
        x_QI = torch.cat([disputed_QI, self.draw(count - own - len(disputed_QI), generator)])
        if data_QI is not None and own:
            rows = torch.randperm(len(data_QI), generator=generator)[:own]
            x_QI = torch.cat([x_QI, data_QI[rows]])
        return x_QI[torch.randperm(count, generator=generator)]
