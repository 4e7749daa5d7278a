"""What is shown of a recovery beside its metrics: the first layer's weights, and the certificate output by output.

Legend: N neurons shown, I inputs, O outputs.
"""

import numpy as np
import torch

from distrecon.expand_cluster.result import Recovery
from distrecon.expand_cluster.scores import first_layers
from distrecon.expand_cluster.weights import Weights

NEURONS = 40  # at most
OF_OUTPUTS = ("spread", "noise", "worst", "worst_share", "allowed", "smallest_seen")


def shown(recovery: Recovery, teacher: Weights | None = None) -> dict[str, np.ndarray]:
    """`first_layer` [N, I], beside `first_layer_teacher` [N, I] of the matched neurons where a teacher is known, and
    `certificate/<name>` [O], numbers of the certificate in the answers' own unit, where something was recovered; and
    `verdict`, sentences: whether it is verified and why, then what the black box was found to be."""
    said = f"{'Verified' if recovery.verified else 'Not verified'}: {recovery.reason}"
    arrays = {"verdict": np.array([said, *(str(found) for found in recovery.findings)])}
    if recovery.weights and len(recovery.weights[0][1]) and recovery.weights[0][0].ndim == 2:
        if teacher is None:
            arrays["first_layer"] = recovery.weights[0][0][:NEURONS].numpy()
        else:
            found_NI, true_NI = first_layers(recovery, teacher)
            arrays |= {"first_layer": found_NI[:NEURONS].numpy(), "first_layer_teacher": true_NI[:NEURONS].numpy()}
    if (certificate := recovery.certificate) is not None:
        for name in OF_OUTPUTS:
            arrays[f"certificate/{name}"] = torch.tensor(getattr(certificate, name), dtype=torch.float64).numpy()
        arrays["certificate/answers"] = np.array([certificate.given, certificate.fresh, certificate.not_compared])
        arrays["certificate/hidden_share"] = np.array(certificate.hidden_share)
    return arrays
