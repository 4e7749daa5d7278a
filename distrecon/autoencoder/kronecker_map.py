"""The Kronecker map: each layer's weights in the eigenvectors of what it reads and of how its sums change the outputs.

A layer's weights and bias are one matrix W [O, F]. Its block of the Gauss-Newton matrix is about the Kronecker product
of A [F, F], the second moment of what it reads, and S [O, O], that of the outputs' gradients (`nets/kronecker.py`). So
with U and V their eigenvectors, V^T (W - mean) U are coordinates of which each changes the outputs by itself, by the
product of its two eigenvalues: two small rotations a layer in place of one matrix for all weights. Costs and memory
grow with the layers' sizes; any list of layers will do, and any number of models.

Latents are those coordinates, over all layers, that vary most in this metric; the others stay at the zoo's mean. With
room for all of them the map is exact. Where the sample has more models than a model has parameters, so that its
covariance has full rank, latents are its principal components in the same metric instead; with fewer models,
components fit the sample and miss the models beside it.

Bases are products of Householder reflections, of which as many are kept as a basis has eigenvectors that are not null:
a basis of 4,609 directions from 1,024 places costs a few seconds and 20 MB.

Legend: B models, P parameters, N models of the sample, O a layer's outputs, F its fan-in and one, D a side's
directions, K its reflections, R principal components, Z latent numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 8192  # parameters of a network for principal components: their matrix has as many squared
PRIOR_MODELS = 10  # that a layer's mean variance counts for beside the sample's own variance of a coordinate
SMALLEST_DEVIATION = 1e-3  # of a latent number, relative to the largest
TINY = 1e-30


@dataclass(frozen=True)
class Basis:
    """An orthogonal basis [D, D] as K reflections, and the eigenvalues [D] that go with it, the last D - K null."""

    values_D: Tensor
    reflectors_DK: Tensor
    scales_K: Tensor

    def turn(self, rows: Tensor) -> Tensor:
        """Coordinates [..., D] of vectors [..., D]."""
        return self._product(rows, transpose=False)

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of `turn`."""
        return self._product(rows, transpose=True)

    def _product(self, rows: Tensor, transpose: bool) -> Tensor:
        if not len(self.scales_K):
            return rows
        flat = rows.reshape(-1, rows.shape[-1])
        turned = torch.ormqr(self.reflectors_DK, self.scales_K, flat, left=False, transpose=transpose)
        return turned.view(rows.shape)


def eigenbasis(moment_DD: Tensor) -> Basis:
    """Of a symmetric matrix, the largest eigenvalue first; of a diagonal one, given as [D], the axes as they are."""
    if moment_DD.ndim == 1:
        return Basis(moment_DD, moment_DD.new_empty(len(moment_DD), 0), moment_DD.new_empty(0))
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    return Basis(values_D.clamp_min(0).flip(0), *torch.geqrf(vectors_DD.flip(1)))


def eigenbasis_of_columns(columns_DN: Tensor) -> Basis:
    """Of columns columns^T / N: for sides with more directions than columns, at the cost of an N x N matrix."""
    size, count = columns_DN.shape
    if count >= size:
        return eigenbasis(columns_DN @ columns_DN.T / count)
    values_N, vectors_NN = torch.linalg.eigh(columns_DN.T @ columns_DN / count)
    order_K = values_N.argsort(descending=True)[: int((values_N > 1e-6 * values_N.max()).sum())]
    leading_DK = columns_DN @ vectors_NN[:, order_K]
    values_D = torch.nn.functional.pad(values_N[order_K], (0, size - len(order_K)))
    return Basis(values_D, *torch.geqrf(leading_DK / leading_DK.norm(dim=0)))


@dataclass(frozen=True)
class Sides:
    """The two sides of one layer's metric."""

    outputs: Basis  # S [O, O]
    inputs: Basis  # A [F, F]

    def turn(self, matrix_BOF: Tensor) -> Tensor:
        return self.outputs.turn(self.inputs.turn(matrix_BOF).transpose(1, 2)).transpose(1, 2)

    def back(self, turned_BOF: Tensor) -> Tensor:
        return self.outputs.back(self.inputs.back(turned_BOF).transpose(1, 2)).transpose(1, 2)

    def scale(self, damping: float) -> Tensor:
        """Roots of the products of damped eigenvalues [O, F]: what coordinates are multiplied by in the metric."""
        output_O, input_F = (v + damping * v.mean() for v in (self.outputs.values_D, self.inputs.values_D))
        return (output_O[:, None] * input_F).sqrt()


def fit(layers: Sequence[Sides], matrices: Sequence[Tensor], budget: int, damping: float) -> dict[str, Tensor]:
    """The map from a sample of models, each layer's matrices [N, O, F]; N may be 1.

    Tensors: `scale_P` (the metric), `scale_Z` (the latents' deviations in it, by which they are divided), `kept_Z`
    (which coordinates they are, after `components_RP` where there are such) and of layer i `center{i}_OF` and
    `{outputs, inputs}{i}_{values, reflectors, scales}`.
    """
    tensors: dict[str, Tensor] = {}
    for i, sides in enumerate(layers):
        for side in ("outputs", "inputs"):
            basis: Basis = getattr(sides, side)
            tensors[f"{side}{i}_values"], tensors[f"{side}{i}_reflectors"] = basis.values_D, basis.reflectors_DK
            tensors[f"{side}{i}_scales"] = basis.scales_K
        tensors[f"center{i}_OF"] = matrices[i].mean(0)
    tensors["scale_P"] = torch.cat([sides.scale(damping).flatten() for sides in layers]).clamp_min(TINY)
    models, parameters = len(matrices[0]), len(tensors["scale_P"])
    if parameters < models and parameters <= LARGEST and budget < parameters:
        component_RP, variance_R = _components(coordinates(tensors, matrices))
        tensors["components_RP"], variance_Z = component_RP[:budget], variance_R[:budget]
    else:
        variance_P = torch.cat([_variance(*pair) for pair in zip(layers, matrices, strict=True)])
        variance_P = variance_P * tensors["scale_P"].square()
        tensors["kept_Z"] = variance_P.topk(min(budget, parameters)).indices.sort().values
        variance_Z = variance_P[tensors["kept_Z"]]
    tensors["scale_Z"] = variance_Z.sqrt().clamp_min(SMALLEST_DEVIATION * float(variance_Z.max()) ** 0.5)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _variance(sides: Sides, matrix_NOF: Tensor) -> Tensor:
    """Of a layer's coordinates over the sample [O * F], drawn towards their mean where models are few."""
    own = sides.turn(matrix_NOF - matrix_NOF.mean(0)).square().mean(0).flatten()
    mean = own.mean() if own.any() else own.new_ones(())
    return (len(matrix_NOF) * own + PRIOR_MODELS * mean) / (len(matrix_NOF) + PRIOR_MODELS)


def _components(centred_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components [R, P] of centred samples, N > P, and their variances [R], the largest first."""
    variance_P, basis_PP = torch.linalg.eigh((centred_NP.T @ centred_NP).double() / len(centred_NP))
    return basis_PP.flip(1).T.to(centred_NP), variance_P.clamp_min(0).flip(0).to(centred_NP)


# -- the map ----------------------------------------------------------------------------------------------------------


def sides(tensors: Mapping[str, Tensor], index: int) -> Sides:
    parts = ("values", "reflectors", "scales")
    outputs, inputs = (Basis(*(tensors[f"{side}{index}_{part}"] for part in parts)) for side in ("outputs", "inputs"))
    return Sides(outputs, inputs)


def num_layers(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("center") and name.endswith("_OF") for name in tensors)


def coordinates(tensors: Mapping[str, Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """[B, P] in the metric of layers' matrices [B, O, F]."""
    turned = [sides(tensors, i).turn(m - tensors[f"center{i}_OF"]).flatten(1) for i, m in enumerate(matrices)]
    return torch.cat(turned, dim=1) * tensors["scale_P"]


def matrices(tensors: Mapping[str, Tensor], y_BP: Tensor) -> list[Tensor]:
    """The inverse of `coordinates`."""
    centers = [tensors[f"center{i}_OF"] for i in range(num_layers(tensors))]
    parts = (y_BP / tensors["scale_P"]).split([c.numel() for c in centers], dim=1)
    pairs = enumerate(zip(parts, centers, strict=True))
    return [sides(tensors, i).back(part.unflatten(1, center.shape)) + center for i, (part, center) in pairs]


def compress(tensors: Mapping[str, Tensor], y_BP: Tensor) -> Tensor:
    """z[B, Z] of coordinates [B, P]."""
    return _taken(tensors, y_BP) / tensors["scale_Z"]


def expand(tensors: Mapping[str, Tensor], z_BZ: Tensor) -> Tensor:
    """Coordinates [B, P] of latents."""
    return _put_back(tensors, z_BZ * tensors["scale_Z"])


def _taken(tensors: Mapping[str, Tensor], y_BP: Tensor) -> Tensor:
    if "components_RP" in tensors:
        return y_BP @ tensors["components_RP"].T
    return y_BP[:, tensors["kept_Z"]]


def _put_back(tensors: Mapping[str, Tensor], taken_BZ: Tensor) -> Tensor:
    """The transpose of `_taken`."""
    if "components_RP" in tensors:
        return taken_BZ @ tensors["components_RP"]
    zeros_BP = taken_BZ.new_zeros(len(taken_BZ), len(tensors["scale_P"]))
    return zeros_BP.index_add(1, tensors["kept_Z"], taken_BZ)


def flattened(tensors: Mapping[str, Tensor], noise_BZ: Tensor) -> Tensor:
    """White noise in the latents' behavioural scale, turned to directions in which the outputs are flat.

    With D the decoder in that scale, D^T D noise: its variance along a direction grows with the fourth power of how far
    a unit of behaviour moves the weights.
    """
    return _taken(tensors, _put_back(tensors, noise_BZ) / tensors["scale_P"].square())
