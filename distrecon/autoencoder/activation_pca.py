"""The coder of activations: each layer's weights in the principal components of what that layer reads.

Weights matter only by what they do to the layer's inputs. So the first layer is written in the principal components of
the pictures, and those components that the pictures hardly have are left out; the decoded layer is run, which gives
what the second layer reads, hence the second layer's components; and so on upwards. The decoder has the same pictures
and runs the same layers, so it finds the same components, and no bases need to be kept. This is the idea of pruning by
activations (SliceGPT, Ashkboos et al. 2024), made a code: no training, no matrix larger than a layer's fan-in, exact
when nothing is left out, and hardly dependent on the zoo, of which it takes

- the mean weights, which stand in for what is left out;
- how many components each layer keeps: over all layers at once, those with the largest product of eigenvalue, mean
  square of the weights along them and mean square of the outputs' gradients (the factors of `nets/kronecker.py`);
- the mean second moments, mixed into each model's own where few inputs tell little.

Inside the space that is kept any basis will do. The one nearest to the zoo's own components is taken (the orthogonal
Procrustes problem), so that a latent number means about the same in every model and does not jump.

Legend: B models, P parameters, O a layer's outputs, F its fan-in and one, K the components it keeps, Z latent numbers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distrecon.autoencoder.coder import Coder, CoderConfig, chain
from distrecon.autoencoder.transformer import Projection
from distrecon.errors import UserError
from distrecon.nets import Architecture
from distrecon.nets.kronecker import factors, layer_by_layer, models_at_once

SMALLEST_DEVIATION = 1e-6  # of a latent number, relative to the largest
SMALLEST_SCALE = 1e-3  # of a latent number in the behavioural metric: some change no output of the sample at all


def fit(
    config: CoderConfig, arch: Architecture, theta_BP: Tensor, mean_P: Tensor, std_P: Tensor, queries: Tensor
) -> dict[str, Tensor]:
    """What the coder takes from a zoo: `center_P, scale_Z, deviation_Z` and, of layer i, `moment{i}_FF, basis{i}_FK`.

    `deviation_Z` are the latents' root mean squares over the sample, by which they are divided, `scale_Z` the same in
    the behavioural metric. Raises UserError when the latent has no room for a single component.
    """
    arch = chain(arch, "activation_pca")
    few = torch.linspace(0, len(theta_BP) - 1, min(config.fisher_models, len(theta_BP))).round().long()
    few_BP, center_P = theta_BP[few], theta_BP.mean(0)
    found = factors(arch, few_BP, queries[: config.fisher_queries].to(few_BP), config.fisher_temperature)
    tensors, eigenvalues, importance, sensitivity = {"center_P": center_P}, [], [], []
    for i, (layer, difference_BOF) in enumerate(zip(found, arch.table.as_matrices(few_BP - center_P), strict=True)):
        tensors[f"moment{i}_FF"] = layer.inputs.mean(0)
        value_BF, basis_BFF = leading(torch.lerp(layer.inputs, tensors[f"moment{i}_FF"], config.activation_shared))
        variance_BF = (difference_BOF.double() @ basis_BFF).square().mean(1)
        sensitivity.append(layer.outputs.diagonal(dim1=1, dim2=2).mean(0))
        eigenvalues.append(value_BF.mean(0))
        importance.append((value_BF * variance_BF).mean(0) * sensitivity[i].mean())
    counts = allocate(importance, [len(s) for s in sensitivity], config.latent * arch.num_tokens)
    if not any(counts):
        raise UserError(f"model.latent: {config.latent} is too small for a single component of a layer of {arch.name}")
    for i, count in enumerate(counts):
        tensors[f"basis{i}_FK"] = leading(tensors[f"moment{i}_FF"])[1][:, :count].contiguous()
    rms_Z = Walk(config, arch, tensors | {"queries": queries}).encode(few_BP).square().mean(0).sqrt()
    tensors["deviation_Z"] = rms_Z.clamp_min(SMALLEST_DEVIATION * float(rms_Z.max()))
    effect = [(s[:, None] * e[:k]).sqrt().flatten() for s, e, k in zip(sensitivity, eigenvalues, counts, strict=True)]
    scale_Z = tensors["deviation_Z"] * torch.cat(effect).to(center_P)
    tensors["scale_Z"] = scale_Z.clamp_min(SMALLEST_SCALE * float(scale_Z.max()))
    return tensors


def leading(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., F], the largest first, and eigenvectors [..., F, F] of symmetric matrices."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp_min(0).flip(-1), vectors.flip(-1)


def allocate(values: Sequence[Tensor], sizes: Sequence[int], budget: int) -> list[int]:
    """How many components each layer keeps: by falling value, each costing its layer's `size`, while they fit."""
    order = sorted(((-float(v), i) for i, layer in enumerate(values) for v in layer), key=lambda pair: pair[0])
    counts = [0] * len(values)
    for _, i in order:
        if sizes[i] <= budget:
            counts[i] += 1
            budget -= sizes[i]
    return counts


class Walk:
    """The walk up the layers of one architecture, which encoder and decoder share; latents as they are, undivided."""

    def __init__(self, config: CoderConfig, arch: Architecture, tensors: Mapping[str, Tensor]) -> None:
        self.arch = chain(arch, "activation_pca")
        self.shared, layers = config.activation_shared, range(len(self.arch.layers))
        self.queries = tensors["queries"][: config.activation_queries]
        self.moments = [tensors[f"moment{i}_FF"].double() for i in layers]
        self.bases = [tensors[f"basis{i}_FK"].double() for i in layers]
        self.centers = [m[0] for m in self.arch.table.as_matrices(tensors["center_P"][None])]
        self.sizes = [len(c) * b.shape[1] for c, b in zip(self.centers, self.bases, strict=True)]

    def encode(self, theta_BP: Tensor) -> Tensor:
        """z[B, Z] of models in canonical order."""
        parts = theta_BP.split(models_at_once(self.arch, len(self.queries)))
        return torch.cat([self._encode(part) for part in parts])

    def _encode(self, theta_BP: Tensor) -> Tensor:
        matrices, latents = self.arch.table.as_matrices(theta_BP.to(self.queries)), []

        def project(i: int, basis: Tensor) -> Tensor:
            latents.append((matrices[i] - self.centers[i]) @ basis)
            return latents[i]

        self._bases(project)
        return torch.cat([z_BOK.flatten(1) for z_BOK in latents], dim=1)

    def decode(self, z_BZ: Tensor) -> Tensor:
        """theta[B, P]; to the gradient, the components are constants."""
        parts = z_BZ.split(models_at_once(self.arch, len(self.queries)))
        return torch.cat([self._decode(part) for part in parts])

    def _decode(self, z_BZ: Tensor) -> Tensor:
        return self._weights(z_BZ, self._found(z_BZ))

    def move(self, z_BZ: Tensor, change_BZ: Tensor) -> Tensor:
        """Latents of the weights that a change leads to while the components stay as they are."""
        parts = zip(
            *(rows.split(models_at_once(self.arch, len(self.queries))) for rows in (z_BZ, change_BZ)), strict=True
        )
        return torch.cat([self._encode(self._weights(z + change, self._found(z))) for z, change in parts])

    def _found(self, z_BZ: Tensor) -> list[Tensor]:
        """The components of decoded layers."""
        latents = self._latents(z_BZ.detach())
        return self._bases(lambda i, basis: latents[i])

    def _latents(self, z_BZ: Tensor) -> list[Tensor]:
        """Of each layer [B, O, K]."""
        pieces = zip(z_BZ.split(self.sizes, dim=1), self.centers, strict=True)
        return [z.unflatten(1, (len(center), -1)) for z, center in pieces]

    def _weights(self, z_BZ: Tensor, bases: Sequence[Tensor]) -> Tensor:
        return self.arch.table.of_matrices([self._matrix(i, z, bases[i]) for i, z in enumerate(self._latents(z_BZ))])

    def _bases(self, latent: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Each layer's components [B or 1, F, K], from `latent(index, components)` [B, O, K] of the layers below."""
        bases: list[Tensor] = []

        def choose(i: int, moment: Tensor) -> Tensor:
            bases.append(self._components(i, moment).to(self.queries))
            return self._matrix(i, latent(i, bases[i]), bases[i])

        layer_by_layer(self.arch, self.queries, choose)
        return bases

    def _components(self, index: int, moment: Tensor) -> Tensor:
        """The leading eigenspace of second moments [B or 1, F, F], in the basis nearest the zoo's."""
        zoo_FK = self.bases[index]
        # latents so far off that outputs overflow still mean some weights; eigh would reject the models beside them too
        finite_B11 = moment.isfinite().all(2, keepdim=True).all(1, keepdim=True)
        own = torch.lerp(torch.where(finite_B11, moment, self.moments[index]), self.moments[index], self.shared)
        space = leading(own)[1][:, :, : zoo_FK.shape[1]]
        left, _, right = torch.linalg.svd(space.transpose(1, 2) @ zoo_FK, full_matrices=False)
        return space @ (left @ right)

    def _matrix(self, index: int, z_BOK: Tensor, basis: Tensor) -> Tensor:
        return z_BOK @ basis.transpose(1, 2) + self.centers[index]


class ActivationPCA(Coder):
    """Standardised weights [B, P] -> latents [B, Z] of unit variance over the zoo -> standardised weights."""

    fit, learns = staticmethod(fit), False

    def __init__(
        self, config: CoderConfig, architectures: Sequence[Architecture], fitted: Sequence[Mapping[str, Tensor]]
    ) -> None:
        super().__init__(config, architectures, fitted)
        self.projections = nn.ModuleList(Projection(len(t["scale_Z"]), config.projection) for t in fitted)

    def latent_shape(self, zoo: int) -> tuple[int, ...]:
        return (len(self.fitted[zoo]["scale_Z"]),)

    def behavioral_scale(self, zoo: int) -> Tensor:
        """[Z]: the latents' deviations in the behavioural metric, by which they are divided."""
        return self.fitted[zoo]["scale_Z"]

    def encode(self, x_BP: Tensor, zoo: int) -> Tensor:
        """z[B, Z]."""
        stats = self.fitted[zoo]
        with torch.autocast(x_BP.device.type, enabled=False):
            theta_BP = x_BP.to(stats["std_P"]) * stats["std_P"] + stats["mean_P"]
            return self._walk(zoo).encode(theta_BP) / stats["deviation_Z"]

    def decode(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """Standardised weights [B, P]."""
        stats = self.fitted[zoo]
        with torch.autocast(z_BZ.device.type, enabled=False):
            theta_BP = self._walk(zoo).decode(z_BZ.to(stats["std_P"]) * stats["deviation_Z"])
            return (theta_BP - stats["mean_P"]) / stats["std_P"]

    def move(self, z: Tensor, change: Tensor, zoo: int) -> Tensor:
        """Latents of the weights that the change leads to while the components stay as they are."""
        deviation_Z = self.fitted[zoo]["deviation_Z"]
        return self._walk(zoo).move(z * deviation_Z, change * deviation_Z) / deviation_Z

    def flat_noise(self, noise_BF: Tensor, zoo: int) -> Tensor:
        """D^T D noise, D the decoder in the behavioural scale, whose columns are orthogonal (see `Coder`)."""
        stats = self.fitted[zoo]
        return noise_BF * (stats["deviation_Z"] / stats["scale_Z"]).square().to(noise_BF)

    def project(self, z_BZ: Tensor, zoo: int) -> Tensor:
        """[B, J] for the contrastive loss."""
        return self.projections[zoo](z_BZ[:, None])

    def _walk(self, zoo: int) -> Walk:
        return Walk(self.config, self.architectures[zoo], self.fitted[zoo])
