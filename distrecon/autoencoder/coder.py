"""What a coder is: the maps between standardised weights and latents that an autoencoder is built around.

A new coder is a class in a file of its own and an entry in `coders.CODERS`; a setting that only it reads is a field of
`CoderConfig`. It gives `latent_shape`, `encode`, `decode` and `project`; `fit`, where it starts from a sample of the
zoo; `move`, where the gradient of `decode` takes for constant what is not; `behavioral_scale` and `flat_noise`, where
it knows how its latents change the outputs.

Legend: B models, P parameters, T tokens, Z latent numbers of a token or of a model, Q queries, J projection size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from distrecon.config import check, setting
from distrecon.errors import UserError
from distrecon.nets import Architecture, ChainArchitecture


@dataclass(frozen=True)
class CoderConfig:
    """The settings `model.*`, each read by the coders that it concerns."""

    kind: str = "transformer"
    width: int = setting(64, "of the transformers", least=1)
    layers: int = setting(2, "blocks of the encoder, and as many of the decoder", least=1)
    heads: int = setting(4, "of the transformers' attention; they divide the width", least=1)
    latent: int = setting(16, "numbers a token; other coders have up to latent * tokens numbers a model", least=1)
    token_size: int | None = setting(
        None, "numbers of a token at most, longer rows are cut; empty: whole rows", least=2
    )
    window: int | None = setting(
        None, "tokens that attention spans; a step of the training then reads one window of each model", least=1
    )
    projection: int = setting(30, "numbers a model for the contrastive loss", least=1)
    fisher_metric: str = setting(
        "behavioral", "structural: plain principal components of the weights", choices=("behavioral", "structural")
    )
    fisher_models: int = setting(300, "of the sample, for the Gauss-Newton matrix", least=1)
    fisher_queries: int = setting(60, "for the Gauss-Newton matrix", least=1)
    fisher_temperature: float = setting(2.0, "of the softmax whose metric it is", above=0)
    fisher_ridge: float = setting(0.03, "of the identity, added to the matrix", above=0)
    fisher_blocks: str = setting(
        "global",
        "one linear map for all weights, one a layer or one for a layer's tokens; latents split by eigenvalue",
        choices=("global", "layer", "token"),
    )
    kronecker_damping: float = setting(3e-4, "of the mean eigenvalue, added to each side's", above=0)
    activation_queries: int = setting(200, "on which each model's own activations are taken", least=1)
    activation_shared: float = setting(0.03, "share of the zoo's mean activations in each model's", least=0, most=1)

    def __post_init__(self) -> None:
        check(self, "model")
        if self.width % self.heads:
            raise UserError(f"model.width ({self.width}) must be a multiple of model.heads ({self.heads})")


class Fit(Protocol):
    """What a coder takes from a zoo's sample of training models before training."""

    def __call__(
        self, config: CoderConfig, arch: Architecture, theta_BP: Tensor, mean_P: Tensor, std_P: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        """Tensors by name, from models in canonical order, as `arch.to_logarithms` gives them, and a few query inputs
        [Q, ...]."""


class Coder(nn.Module, ABC):
    """Maps for all zoos of a training; `zoo` is a position in `architectures`.

    Latents are [B, T, Z], a vector a token, or [B, Z], a vector a model. What is learned are parameters. What was
    fitted to each zoo's sample before training are the tensors `fitted[zoo]`: what `fit` gave, and mean_P, std_P,
    reference_P, queries, whose names are taken. Both are saved; `fitted` follows the autoencoder to its device.
    """

    fit: ClassVar[Fit | None] = None  # a static method, where the coder starts from a sample of training models
    learns: ClassVar[bool] = True  # False where `fit` gives all that maps weights to latents and back

    def __init__(
        self, config: CoderConfig, architectures: Sequence[Architecture], fitted: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__()
        self.config, self.architectures = config, tuple(architectures)
        self.fitted = list(fitted)  # the autoencoder's own buffers, which a list keeps from being saved twice

    @abstractmethod
    def latent_shape(self, zoo: int) -> tuple[int, ...]:
        """(T, Z) or (Z,)."""

    @abstractmethod
    def encode(self, x_BP: Tensor, zoo: int) -> Tensor:
        """Latents [B, *latent_shape] of standardised weights; B may be 0."""

    @abstractmethod
    def decode(self, z: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P] of latents; differentiable in them, for refinement."""

    def spans(self, zoo: int) -> list[slice]:
        """Windows of tokens that are coded by themselves, one of which a training step reads; none: whole models."""
        return []

    def encode_span(self, x_BP: Tensor, zoo: int, span: slice) -> Tensor:
        """Latents of the tokens of one of `spans`."""
        raise NotImplementedError

    def decode_span(self, z: Tensor, zoo: int, span: slice) -> Tensor:
        """Tokens [B, t, D] of the latents that `encode_span` gave."""
        raise NotImplementedError

    def move(self, z: Tensor, change: Tensor, zoo: int) -> Tensor:
        """Latents after a small change of them, as the gradient of `decode` understands it."""
        return z + change

    @abstractmethod
    def project(self, z: Tensor, zoo: int) -> Tensor:
        """[B, J] for the contrastive loss."""

    def behavioral_scale(self, zoo: int) -> Tensor:
        """What latents are multiplied by for equal steps to change the outputs about equally; here nothing is known."""
        return self.fitted[zoo]["mean_P"].new_ones(())

    def flat_noise(self, noise_BF: Tensor, zoo: int) -> Tensor:
        """White noise in the behavioural scale [B, F], turned to where weights move much and outputs little, if known.

        F are the numbers of `latent_shape`, flattened.
        """
        return noise_BF


def chain(arch: Architecture, kind: str) -> ChainArchitecture:
    """The architecture as a chain of layers, which this kind of coder walks; UserError where it is none."""
    if not isinstance(arch, ChainArchitecture):
        raise UserError(f"model.kind: {kind} is for chains of layers, which {arch.name} is not")
    return arch
