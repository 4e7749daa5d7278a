"""Expand-and-Cluster: the layer sizes and weights of a black box from its answers (arXiv 2304.12794).

`recover(teacher, input_size, ...)` is the whole method; `score` compares its result with a known teacher. Needs torch,
numpy and scipy only.
"""

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.clustering import LayerClustering
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.recovery import recover
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.scores import score
from distrecon.expand_cluster.teachers import network, synthetic_teacher, train_teacher

__all__ = [
    "BlackBox",
    "LayerClustering",
    "Recovery",
    "RecoveryConfig",
    "network",
    "recover",
    "score",
    "synthetic_teacher",
    "train_teacher",
]
