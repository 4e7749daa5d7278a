"""The Fisher coders: a fixed behavioural linear map (see `fisher.py`), with or without a trained residual on it.

The residual is a transformer on each side whose last layers start at zero, so that training starts from the linear map:
the encoder adds to its latents, the decoder, which reads both latents and linear reconstruction, adds to the weights.

Legend: B models, P parameters, T tokens, D token size, W width, Z latent numbers of a model.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.autoencoder import fisher
from distrecon.autoencoder.config import ModelConfig
from distrecon.autoencoder.transformer import Block, Positions, Projection
from distrecon.nets import Architecture


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """Corrections to latents and weights of one architecture, zero at the start."""

    def __init__(self, config: ModelConfig, arch: Architecture, latents: int) -> None:
        super().__init__()
        self.arch, self.latents, width = arch, latents, config.width
        self.slot = -(-latents // arch.num_tokens)  # latent numbers that a token's place holds
        blocks = range(config.layers)
        self.encoder_in, self.decoder_in = (
            nn.Linear(arch.token_size, width),
            nn.Linear(arch.token_size + self.slot, width),
        )
        self.encoder_positions, self.decoder_positions = (Positions([arch], width) for _ in range(2))
        self.encoder = nn.Sequential(*(Block(width, config.heads) for _ in blocks), nn.LayerNorm(width))
        self.decoder = nn.Sequential(*(Block(width, config.heads) for _ in blocks), nn.LayerNorm(width))
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


class FisherCoder(nn.Module):
    """Standardised weights [B, P] -> latents [B, Z] -> standardised weights, one linear map for each architecture."""

    def __init__(
        self, config: ModelConfig, architectures: Sequence[Architecture], fitted: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__()
        self._fitted = list(fitted)  # the autoencoder's own buffers, which a list keeps from being saved twice
        self.sizes = [fisher.latent_size(tensors) for tensors in fitted]
        self.projections = nn.ModuleList(Projection(size, config.projection) for size in self.sizes)
        self.residuals: nn.ModuleList | None = None
        if config.kind == "fisher_residual":
            pairs = zip(architectures, self.sizes, strict=True)
            self.residuals = nn.ModuleList(Residual(config, arch, size) for arch, size in pairs)

    def latent_shape(self, zoo: int) -> tuple[int, ...]:
        return (self.sizes[zoo],)

    def behavioral_scale(self, zoo: int) -> Tensor:
        """[Z]: what a latent number must be multiplied by for equal steps to change the outputs about equally."""
        return self._fitted[zoo]["scale_Z"]

    def flat_noise(self, noise_BZ: Tensor, zoo: int) -> Tensor:
        """White noise in the behavioural scale, turned to where weights move much and outputs little."""
        return fisher.flattened(self._fitted[zoo], noise_BZ.to(self._fitted[zoo]["scale_Z"])).to(noise_BZ)

    def encode(self, x_BP: Tensor, zoo: int) -> Tensor:
        """z[B, Z]."""
        with torch.autocast(x_BP.device.type, enabled=False):  # bf16 would round the linear map away
            z_BZ = fisher.encode(self._fitted[zoo], x_BP.to(self._fitted[zoo]["center_P"].dtype))
        if self.residuals is None:
            return z_BZ
        return z_BZ + self.residuals[zoo].latent(x_BP).to(z_BZ)  # type: ignore[operator]

    def decode(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P]."""
        with torch.autocast(z_BZ.device.type, enabled=False):
            linear_BP = fisher.decode(self._fitted[zoo], z_BZ.to(self._fitted[zoo]["center_P"].dtype))
        if self.residuals is None:
            return linear_BP
        return linear_BP + self.residuals[zoo].weights(z_BZ, linear_BP).to(linear_BP)  # type: ignore[operator]

    def project(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """[B, J] for the contrastive loss."""
        return self.projections[zoo](z_BZ[:, None])
