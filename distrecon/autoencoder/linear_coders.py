"""Coders of a fixed behavioural linear map, with or without a trained residual on it.

The map is the Kronecker one (`kronecker_map.py`), for networks of any size, or the Fisher one (`fisher.py`).

The residual is a transformer on each side whose last layers start at zero, so that training starts from the linear map:
the encoder adds to its latents, the decoder, which reads both latents and linear reconstruction, adds to the weights.

Legend: B models, P parameters, T tokens, D token size, W width, Z latent numbers of a model.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.autoencoder import fisher, kronecker_map
from distrecon.autoencoder.coder import Coder, CoderConfig
from distrecon.autoencoder.transformer import Block, Norm, Positions, Projection
from distrecon.nets import Architecture, ChainArchitecture, ModuleArchitecture, kronecker, traced_kronecker


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """Corrections to latents and weights of one architecture, zero at the start."""

    def __init__(self, config: CoderConfig, arch: Architecture, latents: int) -> None:
        super().__init__()
        self.arch, self.latents, width = arch, latents, config.width
        self.slot = -(-latents // arch.num_tokens)  # latent numbers that a token's place holds
        blocks = range(config.layers)
        self.encoder_in, self.decoder_in = (
            nn.Linear(arch.token_size, width),
            nn.Linear(arch.token_size + self.slot, width),
        )
        self.encoder_positions, self.decoder_positions = (Positions([arch], width) for _ in range(2))
        self.encoder = nn.Sequential(*(Block(width, config.heads) for _ in blocks), Norm(width))
        self.decoder = nn.Sequential(*(Block(width, config.heads) for _ in blocks), Norm(width))
        self.encoder_out = _zero(nn.Linear(width, self.slot))
        self.decoder_out = _zero(nn.Linear(width, arch.token_size))

    def latent(self, x_BP: Tensor) -> Tensor:
        """[B, Z] to add to the linear latents."""
        tokens_BTD = self.arch.tokenize(x_BP)
        hidden_BTW = self.encoder(self.encoder_in(tokens_BTD) + self.encoder_positions(0))
        return self.encoder_out(hidden_BTW).flatten(1)[:, : self.latents]

    def weights(self, z_BZ: Tensor, linear_BP: Tensor) -> Tensor:
        """[B, P] to add to the linear reconstruction."""
        places = self.arch.num_tokens * self.slot
        z_BTS = F.pad(z_BZ, (0, places - self.latents)).unflatten(1, (self.arch.num_tokens, self.slot))
        hidden_BTW = self.decoder_in(torch.cat([self.arch.tokenize(linear_BP), z_BTS.to(linear_BP)], dim=2))
        return self.arch.detokenize(self.decoder_out(self.decoder(hidden_BTW + self.decoder_positions(0))))


class LinearCoder(Coder):
    """Standardised weights [B, P] -> latents [B, Z] -> standardised weights, one linear map for each architecture."""

    learns = False

    def __init__(
        self, config: CoderConfig, architectures: Sequence[Architecture], fitted: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__(config, architectures, fitted)
        self.sizes = [len(tensors["scale_Z"]) for tensors in fitted]
        self.projections = nn.ModuleList(Projection(size, config.projection) for size in self.sizes)

    @abstractmethod
    def compress(self, x_BP: Tensor, zoo: int) -> Tensor:
        """z[B, Z] of standardised weights of the map's own type."""

    @abstractmethod
    def expand(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P]."""

    def latent_shape(self, zoo: int) -> tuple[int, ...]:
        return (self.sizes[zoo],)

    def behavioral_scale(self, zoo: int) -> Tensor:
        """[Z]: the latents' deviations in the behavioural metric, by which they were divided."""
        return self.fitted[zoo]["scale_Z"]

    def encode(self, x_BP: Tensor, zoo: int) -> Tensor:
        """z[B, Z]."""
        with torch.autocast(x_BP.device.type, enabled=False):  # bf16 would round the linear map away
            return self.compress(x_BP.to(self.behavioral_scale(zoo).dtype), zoo)

    def decode(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P]."""
        with torch.autocast(z_BZ.device.type, enabled=False):
            return self.expand(z_BZ.to(self.behavioral_scale(zoo).dtype), zoo)

    def project(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """[B, J] for the contrastive loss."""
        return self.projections[zoo](z_BZ[:, None])


class FisherPCA(LinearCoder):
    """The map of `fisher.py`."""

    fit = staticmethod(fisher.fit)

    def flat_noise(self, noise_BF: Tensor, zoo: int) -> Tensor:
        return fisher.flattened(self.fitted[zoo], noise_BF.to(self.fitted[zoo]["scale_Z"])).to(noise_BF)

    def compress(self, x_BP: Tensor, zoo: int) -> Tensor:
        return fisher.encode(self.fitted[zoo], x_BP)

    def expand(self, z_BZ: Tensor, zoo: int) -> Tensor:
        return fisher.decode(self.fitted[zoo], z_BZ)


def factors(arch: Architecture, theta_BP: Tensor, inputs: Tensor, temperature: float) -> list[kronecker.Factors]:
    """Those of `kronecker.py`, by kernels of chains of layers or by the graph of a traced module."""
    if isinstance(arch, ChainArchitecture):
        return kronecker.factors(arch, theta_BP, inputs, temperature)
    return traced_kronecker.factors(cast(ModuleArchitecture, arch), theta_BP, inputs, temperature)


class KroneckerPCA(LinearCoder):
    """The map of `kronecker_map.py`."""

    @staticmethod
    def fit(
        config: CoderConfig, arch: Architecture, theta_BP: Tensor, mean_P: Tensor, std_P: Tensor, queries: Tensor
    ) -> dict[str, Tensor]:
        """The map's tensors (see `kronecker_map.fit`)."""
        few = torch.linspace(0, len(theta_BP) - 1, min(config.fisher_models, len(theta_BP))).round().long()
        few_BP, inputs = arch.from_logarithms(theta_BP[few]), queries[: config.fisher_queries].to(theta_BP)
        sides = [
            kronecker_map.Sides(*(kronecker_map.eigenbasis(m.mean(0).to(theta_BP)) for m in (f.outputs, f.inputs)))
            for f in factors(arch, few_BP, inputs, config.fisher_temperature)
        ]
        budget = config.latent * arch.num_tokens
        return kronecker_map.fit(sides, arch.table.as_matrices(theta_BP), budget, config.kronecker_damping)

    def flat_noise(self, noise_BF: Tensor, zoo: int) -> Tensor:
        return kronecker_map.flattened(self.fitted[zoo], noise_BF.to(self.fitted[zoo]["scale_Z"])).to(noise_BF)

    def compress(self, x_BP: Tensor, zoo: int) -> Tensor:
        tensors = self.fitted[zoo]
        matrices = self.architectures[zoo].table.as_matrices(x_BP * tensors["std_P"] + tensors["mean_P"])
        return kronecker_map.compress(tensors, kronecker_map.coordinates(tensors, matrices))

    def expand(self, z_BZ: Tensor, zoo: int) -> Tensor:
        tensors = self.fitted[zoo]
        matrices = kronecker_map.matrices(tensors, kronecker_map.expand(tensors, z_BZ))
        return (self.architectures[zoo].table.of_matrices(matrices) - tensors["mean_P"]) / tensors["std_P"]


class Corrected(LinearCoder):
    """Either map, corrected by a `Residual` for each architecture."""

    learns = True

    def __init__(
        self, config: CoderConfig, architectures: Sequence[Architecture], fitted: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__(config, architectures, fitted)
        pairs = zip(architectures, self.sizes, strict=True)
        self.residuals = nn.ModuleList(Residual(config, arch, size) for arch, size in pairs)

    def residual(self, zoo: int) -> Residual:
        return cast(Residual, self.residuals[zoo])

    def encode(self, x_BP: Tensor, zoo: int) -> Tensor:
        """z[B, Z]."""
        z_BZ = super().encode(x_BP, zoo)
        return z_BZ + self.residual(zoo).latent(x_BP).to(z_BZ)

    def decode(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P]."""
        linear_BP = super().decode(z_BZ, zoo)
        return linear_BP + self.residual(zoo).weights(z_BZ, linear_BP).to(linear_BP)


class FisherResidual(Corrected, FisherPCA):
    """The map of `fisher.py` and what is learned on top of it."""


class KroneckerResidual(Corrected, KroneckerPCA):
    """The map of `kronecker_map.py` and what is learned on top of it."""
