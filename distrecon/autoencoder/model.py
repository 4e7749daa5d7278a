"""The weight autoencoder as users see it: weights in, latents out, and back.

It knows its architectures, how weights are standardised (one mean and deviation a layer, over a sample of the zoo;
variances by their logarithms), the reference that models are aligned to, and a few query inputs for refinement. The
learned maps are those of a coder, one of `coders.CODERS`.

Legend: B models, P parameters, T tokens, Z latent size, Q queries, F features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from distrecon.autoencoder import fisher
from distrecon.autoencoder.coder import Coder, Fit
from distrecon.autoencoder.coders import CODERS
from distrecon.autoencoder.config import AutoencoderConfig
from distrecon.autoencoder.goal import Goal
from distrecon.autoencoder.refine import LEARNING_RATE, refine
from distrecon.errors import UserError
from distrecon.images import ImageSet
from distrecon.images.queries import query_pool
from distrecon.nets import Architecture, align, outputs
from distrecon.zoos.models import Models

# of the parameters, by `optim.precision`
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.float32, "float64": torch.float64}
REFINE_QUERIES = 512
REFERENCE_MODELS, REFERENCE_ROUNDS = 1000, 10
CHUNK = 256  # models encoded or decoded at once
REFINE_CHUNK = 128  # models refined at once, and fewer of a network whose parameters times queries exceed this:
REFINE_NUMBERS = 100_000_000


@dataclass(frozen=True)
class ZooSample:
    """One zoo of a training: its architecture, a fixed sample of its training models [B, P], its images."""

    architecture: Architecture
    sample_BP: Tensor
    images: ImageSet


def statistics(config: AutoencoderConfig, zoo: ZooSample) -> dict[str, Tensor]:
    """What the autoencoder keeps of a zoo: reference, standardisation, queries, and what its coder fits to the sample.

    Raises UserError that names the first model whose weights are not finite.
    """
    arch = zoo.architecture
    sample_BP = zoo.sample_BP.to(DTYPES[config.optim.precision])
    arch.check(sample_BP)
    if len(sample_BP) < 2:
        raise UserError(f"an autoencoder of {arch.name} needs a sample of at least 2 models, not {len(sample_BP)}")
    check_finite(sample_BP, "the zoo's sample")
    aligned, fits = partial(align, arch, symmetries=config.data.symmetries), _fits(config)
    reference_P = _reference(aligned, sample_BP) if config.data.align else sample_BP[0]
    rescaled = config.data.symmetries != "order"  # the order of units changes no layer's mean and deviation
    canonical_BP = aligned(sample_BP, reference_P) if config.data.align and (fits or rescaled) else sample_BP
    numbers_BP = arch.to_logarithms(canonical_BP if rescaled else sample_BP)
    set_P = arch.standardised_together_P
    mean_P, std_P = torch.empty_like(reference_P), torch.empty_like(reference_P)
    for i in range(int(set_P.max()) + 1):
        values = numbers_BP[:, set_P == i]
        mean_P[set_P == i], std_P[set_P == i] = values.mean(), values.std().clamp_min(1e-8)
    pool = query_pool("data", zoo.images, arch, REFINE_QUERIES, config.seed).to(sample_BP)
    tensors = {"reference_P": reference_P, "mean_P": mean_P, "std_P": std_P, "queries": pool}
    for fit in fits:
        tensors |= fit(config.model, arch, arch.to_logarithms(canonical_BP), mean_P, std_P, pool)
    return tensors


def _fits(config: AutoencoderConfig) -> list[Fit]:
    """What fits tensors to a sample of models in canonical order: the coder, and the loss, which shares the Fisher
    coders' fit."""
    fits = [CODERS[config.model.kind].fit, fisher.fit if config.loss.structural == "fisher" else None]
    return [*dict.fromkeys(fit for fit in fits if fit is not None)]


def _reference(aligned: Callable[[Tensor, Tensor], Tensor], sample_BP: Tensor) -> Tensor:
    """What models are aligned to: the mean of models aligned to it, found by alternating from a typical model.

    The models then vary less than when they are aligned to one of them, so the same latent holds more of them.
    """
    few_BP = sample_BP[torch.linspace(0, len(sample_BP) - 1, min(REFERENCE_MODELS, len(sample_BP))).long()].cpu()
    norm_B = few_BP.norm(dim=1)
    reference_P = few_BP[(norm_B - norm_B.mean()).abs().argmin()]
    for _ in range(REFERENCE_ROUNDS):
        few_BP = aligned(few_BP, reference_P)
        reference_P = few_BP.mean(0)
    return reference_P.to(sample_BP)


def check_finite(theta_BP: Tensor, where: str, names: Sequence[str] | None = None) -> None:
    """UserError that names the first model with a weight that is not finite."""
    bad_B = ~theta_BP.isfinite().all(1)
    if bad_B.any():
        row = int(bad_B.nonzero()[0, 0])
        name = names[row] if names is not None else row
        raise UserError(f"{where}: model {name} has a weight that is not finite (distrecon.zoo check lists a zoo's)")


class Statistics(nn.Module):
    """The tensors of one zoo that are not learned, as buffers."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The live buffers by name: they follow this module to another device."""
        return cast(Mapping[str, Tensor], self._buffers)


class Autoencoder(nn.Module):
    """`encode`, `decode` and `embed` for one or several architectures.

    Where several were trained together, `zoo` says which: its position in `architectures` or the architecture itself;
    without it the number of parameters (or the latent's shape) decides, and UserError asks when that is ambiguous.
    """

    coder: Coder

    def __init__(
        self,
        config: AutoencoderConfig,
        architectures: Sequence[Architecture],
        fitted: Sequence[Mapping[str, Tensor]],
    ) -> None:
        super().__init__()
        self.config = config
        self.architectures = tuple(arch.with_pieces(config.model.token_size) for arch in architectures)
        kept = [Statistics(tensors) for tensors in fitted]
        self.statistics = nn.ModuleList(kept)
        self.coder = CODERS[config.model.kind](config.model, self.architectures, [s.tensors for s in kept])
        self.to(DTYPES[config.optim.precision])

    def adopt(self, zoo: int, arch: Architecture) -> None:
        """Takes an equal architecture in place of one, for what it can run."""
        architectures = [*self.architectures]
        architectures[zoo] = arch.with_pieces(self.config.model.token_size)
        self.architectures = tuple(architectures)

    def fitted(self, zoo: int, name: str) -> Tensor:
        """What was fitted to a zoo before training: mean_P, std_P, reference_P, queries, and the coder's own."""
        return self.statistics[zoo].get_buffer(name)

    # -- choosing the zoo ---------------------------------------------------------------------------------------------

    def zoo_of(self, zoo: int | Architecture | None, fits: Sequence[bool], what: str) -> int:
        """The position of the zoo meant; `fits` says which architectures the data could belong to."""
        if isinstance(zoo, Architecture):
            if zoo not in self.architectures:
                raise UserError(f"this autoencoder was not trained on {zoo.name}: {self._known()}")
            return self.architectures.index(zoo)
        if zoo is not None:
            if not 0 <= zoo < len(self.architectures):
                raise UserError(f"this autoencoder has {len(self.architectures)} zoos, not one at position {zoo}")
            return zoo
        matches = [i for i, fit in enumerate(fits) if fit]
        if not matches:
            raise UserError(f"{what} fit no architecture of this autoencoder: {self._known()}")
        if len(matches) > 1:
            raise UserError(f"{what} fit several architectures of this autoencoder; say zoo=: {self._known()}")
        return matches[0]

    def _known(self) -> str:
        return ", ".join(f"{i}: {a.name} ({a.num_parameters} parameters)" for i, a in enumerate(self.architectures))

    def _zoo_by_weights(self, theta_BP: Tensor, zoo: int | Architecture | None) -> int:
        fits = [theta_BP.ndim == 2 and a.num_parameters == theta_BP.shape[1] for a in self.architectures]
        index = self.zoo_of(zoo, fits, f"weights of shape {tuple(theta_BP.shape)}")
        self.architectures[index].check(theta_BP)
        return index

    # -- weights and latents ------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.optim.precision]

    def latent_shape(self, zoo: int = 0) -> tuple[int, ...]:
        return self.coder.latent_shape(zoo)

    def canonical(self, theta_BP: Tensor, zoo: int) -> Tensor:
        """The models as the autoencoder sees them: aligned where `data.align` says so, by `data.symmetries`."""
        if not self.config.data.align or not len(theta_BP):
            return theta_BP
        reference_P = self.fitted(zoo, "reference_P")
        symmetries = self.config.data.symmetries
        aligned_BP = align(self.architectures[zoo], theta_BP.cpu(), reference_P.cpu(), symmetries)
        return aligned_BP.to(theta_BP.device)

    def standardise(self, theta_BP: Tensor, zoo: int) -> Tensor:
        """x[B, P]: weights, and of variances the logarithms, less their mean, over their deviation."""
        numbers_BP = self.architectures[zoo].to_logarithms(theta_BP)
        return (numbers_BP - self.fitted(zoo, "mean_P")) / self.fitted(zoo, "std_P")

    def unstandardise(self, x_BP: Tensor, zoo: int) -> Tensor:
        """The inverse of `standardise`; variances are never below zero."""
        numbers_BP = x_BP * self.fitted(zoo, "std_P") + self.fitted(zoo, "mean_P")
        return self.architectures[zoo].from_logarithms(numbers_BP)

    def encode(
        self, theta_BP: Tensor, refine: int = 0, zoo: int | Architecture | None = None, refiner: str = "gauss_newton"
    ) -> Tensor:
        """Latents of models theta[B, P]; `refine` steps on the latent bring it closer to their outputs (`refine.py`).

        The transformer's are [B, T, Z], one vector a token; the other coders' [B, Z], one vector a model.
        Raises UserError that names a model whose weights are not finite.
        """
        index = self._zoo_by_weights(theta_BP, zoo)
        check_finite(theta_BP, "encode")
        theta_BP = self.canonical(theta_BP.to(self.fitted(index, "mean_P")), index)
        z = self.coder.encode(self.standardise(theta_BP, index), index)
        if not refine:
            return z
        arch, queries = self.architectures[index], self.fitted(index, "queries")
        return self.refine(z, outputs(arch, theta_BP, queries).softmax(2), refine, index, refiner)

    def refine(
        self,
        z: Tensor,
        targets_BQC: Tensor,
        steps: int,
        zoo: int = 0,
        refiner: str = "gauss_newton",
        seed: int = 0,
        learning_rate: float = LEARNING_RATE,
    ) -> Tensor:
        """Latents moved by `steps` steps towards networks with these probabilities on the zoo's `queries`."""
        arch, queries, scale = self.architectures[zoo], self.fitted(zoo, "queries"), self.coder.behavioral_scale(zoo)
        decode, move = partial(self.decode, zoo=zoo), partial(self.coder.move, zoo=zoo)
        size = min(REFINE_CHUNK, max(1, REFINE_NUMBERS // (len(queries) * arch.num_parameters)))
        parts = zip(z.split(size), targets_BQC.split(size), strict=True)
        goals = ((z_part, Goal(arch, decode, move, scale, queries, targets)) for z_part, targets in parts)
        return torch.cat([refine(refiner, goal, z_part, steps, seed, learning_rate) for z_part, goal in goals])

    def decode(self, z: Tensor, zoo: int | Architecture | None = None) -> Tensor:
        """Weights [B, P] of latents [B, *latent_shape]."""
        shapes = [self.latent_shape(i) for i in range(len(self.architectures))]
        index = self.zoo_of(zoo, [tuple(z.shape[1:]) == s for s in shapes], f"latents of shape {tuple(z.shape)}")
        if tuple(z.shape[1:]) != shapes[index]:
            raise UserError(f"latents of {self.architectures[index].name} are [models, {shapes[index]}], not {z.shape}")
        z = z.to(self.fitted(index, "mean_P"))
        return self.unstandardise(self.coder.decode(z, index), index)

    def embed(self, theta_BP: Tensor, zoo: int | Architecture | None = None) -> Tensor:
        """Features [B, F] for predicting a model's properties (see `pooled`)."""
        index = self._zoo_by_weights(theta_BP, zoo)
        return pooled(self.encode(theta_BP, zoo=index), self.architectures[index])


def pooled(z_BTZ: Tensor, arch: Architecture) -> Tensor:
    """Per layer the mean and deviation of its tokens' latents, [B, layers * 2 * Z]; latents [B, Z] stay as they are."""
    if z_BTZ.ndim == 2:
        return z_BTZ
    layer_T = arch.token_positions_T3[:, 1].to(z_BTZ.device)
    parts = [z_BTZ[:, layer_T == i] for i in range(len(arch.layer_names))]
    return torch.cat([f for part in parts for f in (part.mean(1), part.std(1, correction=0))], dim=1)


@torch.no_grad()
def encode_models(
    autoencoder: Autoencoder, models: Models, zoo: int = 0, refine: int = 0, refiner: str = "gauss_newton"
) -> Tensor:
    """Latents of all models, in chunks, on the CPU; UserError names a model whose weights are not finite."""
    check_finite(models.theta_BP, "zoo", models.model_id)
    chunks = models.theta_BP.split(CHUNK)
    return torch.cat([autoencoder.encode(chunk, refine, zoo, refiner).cpu() for chunk in chunks])


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, z: Tensor, zoo: int = 0) -> Tensor:
    """Weights [B, P] of latents, in chunks, float32 on the CPU."""
    return torch.cat([autoencoder.decode(chunk, zoo=zoo).float().cpu() for chunk in z.split(CHUNK)])
