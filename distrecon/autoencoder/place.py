"""A network's place in a zoo: what the autoencoder's probes predict of it, its nearest training models, how new it is.

The network's weights come from anywhere, a black box that was recovered for one; which of the weights with its function
they are makes no difference. Distances are those of weights with all symmetries undone (`novelty.neighbours`).

Legend: P parameters, N training models, K neighbours, V validation models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrecon.autoencoder.model import Autoencoder, check_finite
from distrecon.autoencoder.novelty import neighbours
from distrecon.autoencoder.predict import predicted
from distrecon.autoencoder.probes import Probes
from distrecon.errors import UserError
from distrecon.nets import Architecture, ChainArchitecture, align
from distrecon.zoos.models import Models

CANDIDATES = 32  # training models matched to each model
NEAREST = 5  # models that are named


@dataclass(frozen=True)
class Neighbour:
    """The state of a training model that is nearest, of that model's."""

    model_id: str
    epoch: int
    distance: float
    test_accuracy: float


@dataclass(frozen=True)
class Place:
    """`predicted` has each property's value; `novelty` is the distance to the nearest training model over the mean one
    of validation models. For a figure: the distance of every training model, matched to the zoo's reference alone."""

    predicted: dict[str, float]
    nearest: list[Neighbour]
    novelty: float
    latent: Tensor
    distance_N: Tensor


def zoo_with(
    architectures: Sequence[Architecture],
    weights: Sequence[tuple[Tensor, Tensor]],
    activation: str,
    images: Architecture | None = None,
) -> int:
    """The position of the architecture that has networks with these layers [(W[out, in, ...], b[out]), ...].

    `images`: what a network with convolutions is, as weights do not tell padding, pooling and the size of images.
    Raises UserError that says in what they differ.
    """
    shapes = [tuple(weight.shape) for weight, _ in weights]
    for index, arch in enumerate(architectures):
        if (
            isinstance(arch, ChainArchitecture)
            and [layer.weight_shape for layer in arch.layers] == shapes
            and arch.activation == activation
            and (images is None or _described(images) == _described(arch))
        ):
            return index
    sizes = "-".join(map(str, [shapes[0][1], *(shape[0] for shape in shapes)]))
    known = " or ".join(_described(arch) for arch in architectures)
    found = f"{sizes} {activation}" if images is None else _described(images)
    raise UserError(f"the network is {found}, the autoencoder's models are {known}")


def _described(arch: Architecture) -> str:
    if not isinstance(arch, ChainArchitecture):
        return f"{arch.name} ({arch.kind})"
    if not any(layer.kernel for layer in arch.layers):
        sizes = [arch.layers[0].in_features, *(layer.out_features for layer in arch.layers)]
        return f"{'-'.join(map(str, sizes))} {arch.activation}"
    words = ["x".join(map(str, arch.input_shape))]
    for layer in arch.layers:
        kind = f"conv{layer.kernel}p{layer.padding}" if layer.kernel else "linear"
        words.append(f"{kind}-{layer.out_features}" + f" pool{layer.pool}" * (layer.pool > 1))
    return f"{' '.join(words)} {arch.activation}"


def place(
    autoencoder: Autoencoder, probes: Probes, theta_P: Tensor, train: Models, validation: Models, count: int = NEAREST
) -> Place:
    """Where a network theta[P] lies among the models of the probes' zoo; `count` training models are named.

    Raises UserError when its weights are not finite or not of that zoo's architecture.
    """
    zoo = probes.zoo
    arch, reference_P = autoencoder.architectures[zoo], autoencoder.fitted(zoo, "reference_P").float().cpu()
    theta_1P = theta_P[None].float()
    arch.check(theta_1P)
    check_finite(theta_1P, "place")
    seen_1P = align(arch, theta_1P, reference_P, "all")  # an autoencoder that knows the order alone sees this one
    with torch.no_grad():
        z = autoencoder.encode(seen_1P, zoo=zoo).cpu()
    values = predicted(autoencoder, probes, seen_1P, z)
    train_NP = align(arch, train.theta_BP, reference_P, "all")
    distance_1K, row_1K = neighbours(arch, seen_1P, train_NP, reference_P, CANDIDATES, "all")
    usual_VK, _ = neighbours(arch, validation.theta_BP, train_NP, reference_P, CANDIDATES, "all")
    nearest: dict[str, Neighbour] = {}
    for distance, row in zip(distance_1K[0].tolist(), row_1K[0].tolist(), strict=True):
        name = train.model_id[row]
        here = Neighbour(name, int(train.epoch_B[row]), distance, float(train.test_accuracy_B[row]))
        nearest.setdefault(name, here)
    return Place(
        {name: float(value_1[0]) for name, value_1 in values.items()},
        [*nearest.values()][:count],
        float(distance_1K[0, 0]) / float(usual_VK[:, 0].mean().clamp_min(1e-12)),
        z[0],
        (train_NP - seen_1P).norm(dim=1),
    )
