"""What a recovery returns: the network, whether it was verified, and everything the figures and reports need."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrecon.expand_cluster.certificate import Certificate, Dense
from distrecon.expand_cluster.convolution.files import write_chain
from distrecon.expand_cluster.convolution.hypothesis import Hypothesis
from distrecon.expand_cluster.convolution.network import Chain
from distrecon.expand_cluster.diagnosis import Finding
from distrecon.expand_cluster.neurons import LayerClustering
from distrecon.expand_cluster.odds import Odds
from distrecon.expand_cluster.weights import Weights, layer_sizes, write_weights
from distrecon.nets.activations import activation as find_activation


@dataclass
class Recovery:
    """A recovered network and how it was found.

    `weights` is [(W[out, in], b[out]), ...] in float64; `verified` is the verdict (the rule is in verdict.py), `reason`
    why it is so, and `certificate` what it rests on (None where no network was found). `contradictions_QI` are some
    inputs at which the black box's answers contradict a fit that was exact elsewhere. `findings` say what the black box
    was found to be. Where its answers are probabilities, `odds` tells how scores, which the weights give, become
    probabilities. `linkage` has the LayerClustering of every hidden layer that was clustered. `metrics` are named as in
    summary.json; `history` has the students' loss curves as (stage, step, [losses]). Of a convolutional network
    `hypothesis` says which layers it has, and the weights of convolutions are [out, in, kernel, kernel].
    """

    weights: Weights
    activation: str
    verified: bool
    reason: str
    linkage: list[LayerClustering] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[tuple[str, int, list[float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    odds: Odds | None = None
    certificate: Certificate | None = None
    contradictions_QI: Tensor | None = None
    hypothesis: Hypothesis | None = None

    @property
    def function(self) -> Dense | Chain:
        """The network that gives scores of inputs that come flat."""
        if self.hypothesis is None:
            return Dense(self.weights, self.activation)
        return Chain(self.hypothesis, self.weights, find_activation(self.activation))

    @property
    def layer_sizes(self) -> list[int]:
        """Sizes of the hidden layers, first to last: channels, of convolutions."""
        return [len(b) for _, b in self.weights[:-1]]

    def __call__(self, inputs_QI: Tensor) -> Tensor:
        """What the black box answers, y[Q, O] in float64: outputs, or probabilities where it gives those.

        Images may come as [Q, C, H, W] or flat.
        """
        scores_QO = self.function(inputs_QI.double().flatten(1))
        return scores_QO if self.odds is None else self.odds.of_classes(scores_QO)

    def report(self) -> str:
        """A few lines of text: sizes, verdict, precision, cost."""
        lines = [
            f"network      {'-'.join(map(str, layer_sizes(self.weights)))} {self.activation}"
            + (f" ({self.hypothesis.text})" if self.hypothesis else ""),
            f"verdict      {'verified' if self.verified else 'UNVERIFIED'}: {self.reason}",
        ]
        lines += [f"found        {finding}" for finding in self.findings]
        lines += self.certificate.lines() if self.certificate is not None else []
        labels = {
            "recover/output_rmse": "output RMSE on fresh queries (relative)",
            "recover/agreement": "argmax agreement on the given inputs",
            "recover/max_cosine_distance": "largest cosine distance to the teacher's neurons",
            "recover/students": "students",
            "recover/student_loss_best": "best student's loss",
            "recover/student_loss_median": "median student's loss",
            "recover/queries": "queries",
        }
        for name, label in labels.items():
            if name in self.metrics:
                value = self.metrics[name]
                lines.append(f"{label:<48} {value if isinstance(value, int) else f'{value:.3g}'}")
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        lines.append(f"seconds      {sum(self.seconds.values()):.1f} ({spent})")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the network as safetensors: layer<i>.weight, layer<i>.bias, and what it is as metadata.

        Of a convolutional network the state dict of `function.module()`.
        """
        metadata = {
            "activation": self.activation,
            "sizes": "-".join(map(str, layer_sizes(self.weights))),
            "verified": str(self.verified),
            "reason": self.reason,
        }
        network = self.function
        if isinstance(network, Chain):
            write_chain(Path(path), network, metadata)
        else:
            write_weights(Path(path), self.weights, metadata)


def better(new: Recovery, old: Recovery | None) -> Recovery:
    """Verified beats unverified; then the later of two verified ones, or the lower loss."""
    if old is None:
        return new
    if new.verified or old.verified:
        return new if new.verified else old
    return new if new.metrics["recover/train_loss"] < old.metrics["recover/train_loss"] else old


def relative_rmse(answers_QO: Tensor, outputs_QO: Tensor) -> float:
    """Root mean squared difference over the answers' standard deviation."""
    return float((answers_QO - outputs_QO).square().mean().sqrt() / answers_QO.std().clamp(min=torch.finfo().tiny))
