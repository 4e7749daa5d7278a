"""Expand-and-Cluster: the layer sizes and weights of a black box from its answers (arXiv 2304.12794).

`recover_network(black_box, input_size, ...)` is the whole method; `score` compares its result with a known teacher.
Needs torch, numpy and scipy only. In the order in which a recovery passes through them:

- blackbox, coordinates, probes     the answers (checked, counted, cached); the directions that matter; where to ask
- problem, students, warm_start     training data and what an exact fit is; students wider than the black box
- neurons, tree                     which neurons most students share: the clusters
- outgoing, collapse, peel          one network from the clusters: of one hidden layer, of several
- bends, hyperplanes, from_bends    relu and leaky_relu without students, from where the answers bend
- convolution/                      the same for convolutional networks: hypotheses, filters, students, kinks
- verdict, result, scores           whether to believe it; what is returned; how near a known teacher it is
- recovery                          all of it, round by round; run and stages are what the rounds share and keep
- networks, least_squares, weights  groups of dense networks, their solver, their weights
- config, thresholds                what users set, and what decides
- teachers, sources                 black boxes to try it on, and those named on a command line
"""

from distrecon.expand_cluster.blackbox import BlackBox
from distrecon.expand_cluster.config import RecoveryConfig
from distrecon.expand_cluster.recovery import recover_network
from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.scores import score
from distrecon.expand_cluster.teachers import synthetic_teacher, train_teacher
from distrecon.expand_cluster.weights import network

__all__ = [
    "BlackBox",
    "Recovery",
    "RecoveryConfig",
    "network",
    "recover_network",
    "score",
    "synthetic_teacher",
    "train_teacher",
]
