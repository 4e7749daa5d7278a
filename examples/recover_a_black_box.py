"""Recovers the layer size and weights of a network from its answers alone."""

import distrecon
from distrecon.expand_cluster import network, synthetic_teacher

teacher = synthetic_teacher(inputs=4, width=3, activation="tanh", seed=1)  # [(W, b), ...], known here only
black_box = network(teacher, "tanh")

result = distrecon.recover_network(black_box, input_size=4, activation="tanh")
print(result.report())
assert result.verified
assert result.layer_sizes == [3]
