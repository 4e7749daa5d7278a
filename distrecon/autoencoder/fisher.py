"""The behavioural linear map: principal components of the weights in the metric of their effect on the outputs.

"Structure Is Not Enough" shows that the behavioural loss is, to second order, a structural loss weighted by
F = J^T J. Averaged over models and queries, in the metric of a softmax at temperature T, it is the Gauss-Newton matrix

    G = mean_j mean_i J_ji^T (diag(p) - p p^T) J_ji,   p = softmax(f_j(x_i) / T),

each model's matrix divided by its mean diagonal. With L = chol(G + ridge I), the principal components of L^T x keep
those directions of the weights that change the outputs most. No training is needed.

One matrix for all weights is the best and costs P^2 numbers (`global`). For larger networks there is one a layer
(`layer`), or one for all tokens of a layer (`token`); the latent numbers are then split between layers by eigenvalue.
Everything is in standardised weights x. With the structural metric, I in place of G, the map is plain PCA.

Legend: B models, P parameters, Q queries, C classes, N copies of a block (tokens that share it), E its entries, K its
latent numbers a copy, R rows of a Jacobian.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from distrecon.autoencoder.coder import CoderConfig
from distrecon.errors import UserError
from distrecon.nets import Architecture

ROW_NUMBERS = 30_000_000  # of Jacobian rows in memory at once: 120 MB in float32
LARGEST_BLOCK = 8192  # entries; its matrix has as many squared
SMALLEST_EIGENVALUE = 1e-10  # of the largest


@dataclass(frozen=True)
class Block:
    """Weights that share one linear map: entries `index_NE` of x, N copies of E."""

    index_NE: Tensor


def blocks(arch: Architecture, kind: str) -> list[Block]:
    """The blocks of `model.fisher_blocks`; UserError when their matrices would be too large."""
    if kind == "global":
        found = [Block(torch.arange(arch.num_parameters)[None])]
    else:
        layers, arch = range(len(arch.layer_names)), arch.with_pieces(None)
        found = [Block((arch.layer_of_parameter_P == i).nonzero().T) for i in layers]
        if kind == "token":
            layer_T = arch.token_positions_T3[:, 1]
            rows = [arch.token_index_TD[layer_T == i] for i in layers]
            found = [Block(r[:, (r < arch.num_parameters).all(0)]) for r in rows]
    largest = max(block.index_NE.shape[1] for block in found)
    if largest > LARGEST_BLOCK:
        finer = {"global": "layer", "layer": "token"}.get(kind, "")
        raise UserError(
            f"model.fisher_blocks: {kind!r} needs a {largest} x {largest} matrix for {arch.name}"
            + (f"; set it to {finer}" if finer else "")
        )
    return found


def jacobian_rows(arch: Architecture, theta_BP: Tensor, inputs: Tensor, temperature: float) -> Tensor:
    """Rows [B, Q * C, P] whose Gram matrix is sum_i J_i^T (diag(p) - p p^T) J_i of each model."""
    theta_BP = theta_BP.detach().requires_grad_(True)
    rows = []
    for i in range(len(inputs)):
        logits_BC = arch.forward(arch.from_logarithms(theta_BP), inputs[i : i + 1])[:, 0]
        p_BC = (logits_BC.detach() / temperature).softmax(1)
        weighted_BC = p_BC.sqrt() * (logits_BC - (p_BC * logits_BC).sum(1, keepdim=True))
        for c in range(arch.num_outputs):
            last = c + 1 == arch.num_outputs
            rows.append(torch.autograd.grad(weighted_BC[:, c].sum(), theta_BP, retain_graph=not last)[0])
    return torch.stack(rows, dim=1)


def metric(
    arch: Architecture, theta_BP: Tensor, std_P: Tensor, inputs: Tensor, found: list[Block], config: CoderConfig
) -> list[Tensor]:
    """G + ridge I of each block [E, E], in standardised weights, float64; I alone for the structural metric."""
    if config.fisher_metric == "structural":
        return [torch.eye(b.index_NE.shape[1], dtype=torch.float64) for b in found]
    sums = [torch.zeros(b.index_NE.shape[1], b.index_NE.shape[1], dtype=theta_BP.dtype) for b in found]
    numbers = len(inputs) * arch.num_outputs * arch.num_parameters
    for chunk in theta_BP.split(max(1, ROW_NUMBERS // numbers)):
        rows_BRP = jacobian_rows(arch, chunk, inputs, config.fisher_temperature) * std_P
        mean_diagonal_B = rows_BRP.square().sum(1).mean(1).clamp_min(1e-30)
        rows_RP = (rows_BRP / mean_diagonal_B.sqrt()[:, None, None]).flatten(0, 1)
        for total, block in zip(sums, found, strict=True):
            for index_E in block.index_NE:
                part_RE = rows_RP[:, index_E]
                total.addmm_(part_RE.T, part_RE, alpha=1 / len(block.index_NE))
    ridge = config.fisher_ridge
    return [s.double() / len(theta_BP) + ridge * torch.eye(len(s), dtype=torch.float64) for s in sums]


def _components(y_BE: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Principal directions [E, K] of centred samples and their variances [K], largest first, of numerical rank."""
    small = y_BE.numpy() if len(y_BE) >= y_BE.shape[1] else y_BE.numpy().T
    values, vectors = scipy.linalg.eigh(small.T @ small / len(y_BE))
    keep = values > SMALLEST_EIGENVALUE * max(values[-1], 1e-300)
    values, vectors = values[keep][::-1], vectors[:, keep][:, ::-1]
    if len(y_BE) < y_BE.shape[1]:  # the smaller matrix was that of samples
        vectors = small @ vectors / np.sqrt(values * len(y_BE))
    return vectors, values


def split_budget(spectra: list[np.ndarray], copies: list[int], budget: int) -> list[int]:
    """Latent numbers a copy for each block: directions by falling variance until `budget` numbers are spent."""
    order = sorted(((-value, i) for i, values in enumerate(spectra) for value in values), key=lambda pair: pair[0])
    counts = [0] * len(spectra)
    for _, i in order:
        if copies[i] <= budget:
            counts[i] += 1
            budget -= copies[i]
    return counts


def fit(
    config: CoderConfig, arch: Architecture, theta_BP: Tensor, mean_P: Tensor, std_P: Tensor, queries: Tensor
) -> dict[str, Tensor]:
    """The map: `center_P, scale_Z`; of block i `index{i}_NE, encode{i}_KE, decode{i}_EK, factor{i}_EE` (L^T).

    `scale_Z` are the latents' deviations in the behavioural metric, by which they are divided.

    `theta_BP` are the sample's models in canonical order. Raises UserError when the sample is too small for the latent.
    """
    found = blocks(arch, config.fisher_blocks)
    x_BP = (theta_BP - mean_P) / std_P
    center_P = x_BP.mean(0)
    few = torch.linspace(0, len(theta_BP) - 1, min(config.fisher_models, len(theta_BP))).round().long()
    metrics = metric(arch, theta_BP[few], std_P, queries[: config.fisher_queries].to(theta_BP), found, config)
    factors = [torch.linalg.cholesky(g).T for g in metrics]  # L^T, upper
    bases, spectra = [], []
    for block, factor in zip(found, factors, strict=True):
        centred = (x_BP - center_P).double()[:, block.index_NE].flatten(0, 1)
        basis, values = _components(centred @ factor.T)
        bases.append(basis)
        spectra.append(values)
    copies = [len(block.index_NE) for block in found]
    budget = config.latent * arch.num_tokens
    available = sum(n * len(values) for n, values in zip(copies, spectra, strict=True))
    if available < budget:
        raise UserError(
            f"model.latent: {config.latent} numbers for each of {arch.num_tokens} tokens are {budget}, but the sample "
            f"of {len(theta_BP)} models of {arch.name} varies in {available} directions; take fewer, or a larger zoo"
        )
    tensors, scales = {"center_P": center_P}, []
    for i, count in enumerate(split_budget(spectra, copies, budget)):
        scale_K = torch.from_numpy(np.sqrt(spectra[i][:count].copy()))
        basis_EK = torch.from_numpy(bases[i][:, :count].copy())
        scales.append(scale_K.repeat(copies[i]))
        encode_KE = (basis_EK.T @ factors[i]) / scale_K[:, None]
        decode_EK = torch.linalg.solve_triangular(factors[i], basis_EK * scale_K, upper=True)
        tensors |= {
            f"index{i}_NE": found[i].index_NE,
            f"encode{i}_KE": encode_KE.to(x_BP),
            f"decode{i}_EK": decode_EK.to(x_BP),
            f"factor{i}_EE": factors[i].to(x_BP),
        }
    tensors["scale_Z"] = torch.cat(scales).to(x_BP)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _block_count(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("index") for name in tensors)


def latent_size(tensors: Mapping[str, Tensor]) -> int:
    """Latent numbers of a model."""
    count = _block_count(tensors)
    return sum(len(tensors[f"index{i}_NE"]) * len(tensors[f"encode{i}_KE"]) for i in range(count))


def encode(tensors: Mapping[str, Tensor], x_BP: Tensor) -> Tensor:
    """Latents [B, Z] of standardised weights; every number has unit variance over the sample."""
    centred_BP = x_BP - tensors["center_P"]
    parts = [
        (centred_BP[:, tensors[f"index{i}_NE"]] @ tensors[f"encode{i}_KE"].T).flatten(1)
        for i in range(_block_count(tensors))
    ]
    return torch.cat(parts, dim=1)


def decode(tensors: Mapping[str, Tensor], z_BZ: Tensor) -> Tensor:
    """Standardised weights [B, P] of latents."""
    x_BP = tensors["center_P"].expand(len(z_BZ), -1).clone()
    start = 0
    for i in range(_block_count(tensors)):
        index_NE, decode_EK = tensors[f"index{i}_NE"], tensors[f"decode{i}_EK"]
        width = len(index_NE) * decode_EK.shape[1]
        z_BNK = z_BZ[:, start : start + width].unflatten(1, (len(index_NE), -1)) if width else None
        start += width
        if z_BNK is not None:
            x_BP = x_BP.index_add(1, index_NE.flatten(), (z_BNK @ decode_EK.T).flatten(1))
    return x_BP


def weighted(tensors: Mapping[str, Tensor], difference_BP: Tensor) -> Tensor:
    """Mean of difference^T G difference over the parameters [B]: the structural loss in the behavioural metric."""
    squares = [
        (difference_BP[:, tensors[f"index{i}_NE"]] @ tensors[f"factor{i}_EE"].T).flatten(1).square().sum(1)
        for i in range(_block_count(tensors))
    ]
    return torch.stack(squares).sum(0) / difference_BP.shape[1]


def flattened(tensors: Mapping[str, Tensor], noise_BZ: Tensor) -> Tensor:
    """White noise in the latents' behavioural scale, turned to directions in which the outputs are flat.

    With D the linear decoder in that scale, D^T D noise: its variance along a direction grows with the fourth power of
    how far a unit of behaviour moves the weights.
    """
    parts, start = [], 0
    for i in range(_block_count(tensors)):
        copies, decode_EK = len(tensors[f"index{i}_NE"]), tensors[f"decode{i}_EK"]
        width = copies * decode_EK.shape[1]
        scale_NK = tensors["scale_Z"][start : start + width].view(copies, -1)
        noise_BNK = noise_BZ[:, start : start + width].unflatten(1, scale_NK.shape)
        parts.append(((noise_BNK / scale_NK) @ decode_EK.T @ decode_EK / scale_NK).flatten(1))
        start += width
    return torch.cat(parts, dim=1)
