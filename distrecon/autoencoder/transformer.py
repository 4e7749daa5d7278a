"""The plain weight autoencoder: a transformer over the tokens of a model, one latent vector per token.

After SANE (Schürholt et al., ICML 2024) and "Structure Is Not Enough" (arXiv 2503.17138): a linear tokeniser with three
position embeddings, an encoder, a linear map to the latent; the decoder mirrors it. Unlike the published code,
attention runs over the tokens of one model and never over the batch. One set of weights serves several architectures,
whose tokens are padded to the longest.

Legend: B models, T tokens, D token size, W width, Z latent per token, H heads.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrecon.autoencoder.coder import Coder, CoderConfig
from distrecon.nets import Architecture


class Norm(nn.LayerNorm):
    """Layer normalisation that answers in the type it reads, also under autocast; its sums are float32 in any case."""

    def forward(self, x_BTW: Tensor) -> Tensor:
        weight_W, bias_W = self.weight.to(x_BTW.dtype), self.bias.to(x_BTW.dtype)
        with torch.autocast(x_BTW.device.type, enabled=False):
            return F.layer_norm(x_BTW, self.normalized_shape, weight_W, bias_W, self.eps)


class Block(nn.Module):
    """Pre-norm transformer block over [B, T, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = Norm(width), Norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        if not len(x_BTW):  # a worker without models in this step; attention kernels reject empty batches
            return x_BTW
        x_BTW = x_BTW + self._attention(self.norm_attention(x_BTW))
        return x_BTW + self.down(F.gelu(self.up(self.norm_mlp(x_BTW))))

    def _attention(self, x_BTW: Tensor) -> Tensor:
        parts = self.qkv(x_BTW).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)  # each [B, H, T, W / H]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Positions(nn.Module):
    """Sum of learned embeddings of a token's index in the sequence, its layer and its index in the layer."""

    def __init__(self, architectures: Sequence[Architecture], width: int) -> None:
        super().__init__()
        sizes_3 = torch.stack([a.token_positions_T3.amax(0) + 1 for a in architectures]).amax(0)
        embeddings = [nn.Embedding(int(size), width) for size in sizes_3]
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.02)
        self.embeddings = nn.ModuleList(embeddings)
        for i, arch in enumerate(architectures):
            self.register_buffer(f"index{i}", arch.token_positions_T3, persistent=False)

    def forward(self, zoo: int, span: slice = slice(None)) -> Tensor:
        """[t, W] for the tokens of this span, of the architecture of that zoo."""
        index_T3: Tensor = getattr(self, f"index{zoo}")[span]
        index, layer, within = (embedding(index_T3[:, i]) for i, embedding in enumerate(self.embeddings))
        return index + layer + within


class TransformerCoder(Coder):
    """Standardised weights [B, P] -> latents [B, T, Z] -> standardised weights; one set of weights for all zoos."""

    def __init__(
        self, config: CoderConfig, architectures: Sequence[Architecture], fitted: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__(config, architectures, fitted)
        self.token_size = max(a.token_size for a in architectures)
        width, blocks = config.width, range(config.layers)
        self.tokeniser = nn.Linear(self.token_size, width)
        self.encoder_positions, self.decoder_positions = (Positions(architectures, width) for _ in range(2))
        self.encoder = nn.Sequential(*(Block(width, config.heads) for _ in blocks), Norm(width))
        self.to_latent, self.from_latent = nn.Linear(width, config.latent), nn.Linear(config.latent, width)
        self.decoder = nn.Sequential(*(Block(width, config.heads) for _ in blocks), Norm(width))
        self.detokeniser = nn.Linear(width, self.token_size)
        self.projection = Projection(config.latent, config.projection)

    def latent_shape(self, zoo: int) -> tuple[int, ...]:
        return (self.architectures[zoo].num_tokens, self.config.latent)

    def encode(self, x_BP: Tensor, zoo: int) -> Tensor:
        """z[B, T, Z]. Padding enters as zeros."""
        return self._in_windows(self._encoded, self.architectures[zoo].tokenize(x_BP), zoo)

    def decode(self, z_BTZ: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P]; what the network writes into padding is dropped."""
        return self.architectures[zoo].detokenize(self._in_windows(self._decoded, z_BTZ, zoo))

    def spans(self, zoo: int) -> list[slice]:
        size, tokens = self.config.window, self.architectures[zoo].num_tokens
        return [] if size is None or size >= tokens else [slice(i, i + size) for i in range(0, tokens, size)]

    def encode_span(self, x_BP: Tensor, zoo: int, span: slice) -> Tensor:
        return self._encoded(self.architectures[zoo].tokens_of(x_BP, span), zoo, span)

    def decode_span(self, z_BtZ: Tensor, zoo: int, span: slice) -> Tensor:
        return self._decoded(z_BtZ, zoo, span)

    def _in_windows(self, code: Callable[[Tensor, int, slice], Tensor], sequence_BTD: Tensor, zoo: int) -> Tensor:
        """Every window coded by itself: memory of attention grows with the sequence, not with its square."""
        spans = self.spans(zoo)
        if not spans:
            return code(sequence_BTD, zoo, slice(None))
        return torch.cat([code(sequence_BTD[:, span], zoo, span) for span in spans], dim=1)

    def _encoded(self, tokens_BtD: Tensor, zoo: int, span: slice) -> Tensor:
        if padding := self.token_size - tokens_BtD.shape[2]:
            tokens_BtD = F.pad(tokens_BtD, (0, padding))
        return self.to_latent(self.encoder(self.tokeniser(tokens_BtD) + self.encoder_positions(zoo, span)))

    def _decoded(self, z_BtZ: Tensor, zoo: int, span: slice) -> Tensor:
        hidden_BtW = self.decoder(self.from_latent(z_BtZ) + self.decoder_positions(zoo, span))
        size, tokens_BtD = self.architectures[zoo].token_size, self.detokeniser(hidden_BtW)
        return tokens_BtD if size == self.token_size else tokens_BtD[..., :size]

    def project(self, z_BTZ: Tensor, zoo: int) -> Tensor:
        """[B, J] for the contrastive loss."""
        return self.projection(z_BTZ)


class Projection(nn.Module):
    """Head of the contrastive loss: the mean latent over tokens -> [B, J]; a small MLP, as in SimCLR."""

    def __init__(self, latent: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, z_BTZ: Tensor) -> Tensor:
        return self.layers(z_BTZ.mean(1))
