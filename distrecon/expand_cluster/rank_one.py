"""The rank-one matrices in a space of matrices, which are the terms that all matrices of a sample are sums of.

Matrices M_s = sum_h c_sh a_h b_h^T with more samples than terms span the same space as the terms themselves, and where
the terms are few enough that space has no other rank-one matrices; so they are found one by one, without knowing c.
This is the canonical polyadic decomposition of the tensor M_sAB by its first mode's span (De Lathauwer, SIAM J. Matrix
Anal. Appl. 2006, without his lift to larger matrices). The search is alternating projection between the space and the
rank-one matrices (Nakatsukasa, Soma, Uschmajew: Finding a low-rank basis in a matrix subspace, Math. Program. 2017),
with a power step in place of a singular value decomposition (subspace power method: Kileel, Pereira, arXiv 1912.04007).

Legend: S samples, K dimensions of the space, A x B the matrices' shape, N searches side by side, H terms found.
"""

import torch
from torch import Tensor

from distrecon.expand_cluster.thresholds import RANK_ONE, SAME_TERM

SEARCHES = 4  # times the dimensions: searches in one batch, as several find the same term
BATCHES = 6
STEPS, CHECKED = 600, 20  # of a batch at most, and how often those that have arrived are taken out
SCALINGS, LEAST_SHARE = 10, 1e-6  # of rows and columns in turn; of their mean square, below which it is rounding
SHARPENED = 30  # times CHECKED steps in the end at most, while they bring the terms nearer to the space


def span(samples_SAB: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [K, A, B] of the strongest `rank` directions of the samples."""
    _, _, right_KF = torch.linalg.svd(samples_SAB.flatten(1), full_matrices=False)
    return right_KF[:rank].unflatten(1, samples_SAB.shape[1:])


def rank_one_terms(basis_KAB: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit vectors a[H, A] and b[H, B] of the rank-one matrices in the span of an orthonormal basis, at most K.

    Fewer than K where the search does not find all. If there are infinitely many, K of them, whichever come.
    """
    count, shape = len(basis_KAB), basis_KAB.shape[1:]
    original_KF = basis_KAB.flatten(1)
    basis_KAB, left_AA, right_BB = _isotropic(basis_KAB)
    basis_KF = basis_KAB.flatten(1)
    left_HA, right_HB = basis_KAB.new_empty(0, shape[0]), basis_KAB.new_empty(0, shape[1])
    for _ in range(BATCHES):
        left_NA, right_NB = _starts(basis_KF, left_HA, right_HB, SEARCHES * count, generator)
        for _ in range(STEPS // CHECKED):
            left_NA, right_NB = _power_steps(basis_KF, left_NA, right_NB, CHECKED)
            arrived_N = _distance(basis_KF, left_NA, right_NB) < RANK_ONE
            left_HA, right_HB = _distinct(
                torch.cat([left_HA, left_NA[arrived_N]]), torch.cat([right_HB, right_NB[arrived_N]])
            )
            left_NA, right_NB = left_NA[~arrived_N], right_NB[~arrived_N]
            if len(left_HA) >= count or not len(left_NA):
                break
        if len(left_HA) >= count:
            break
    left_HA = torch.linalg.solve(left_AA, left_HA[:count].T).T
    right_HB = torch.linalg.solve(right_BB, right_HB[:count].T).T
    unit = torch.nn.functional.normalize
    return _sharpened(original_KF, unit(left_HA, dim=1), unit(right_HB, dim=1))


def _isotropic(basis_KAB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of L M R^T for all M of the space, with L[A, A] and R[B, B] that make rows and columns isotropic.

    Terms that are much alike are farther apart then, so that searches reach each of them (operator scaling: Gurvits,
    J. Comput. Syst. Sci. 2004).
    """
    left_AA, right_BB = (torch.eye(size, dtype=basis_KAB.dtype) for size in basis_KAB.shape[1:])
    scaled_KAB = basis_KAB
    for _ in range(SCALINGS):
        for rows in (True, False):
            gram = torch.einsum("kab,kcb->ac" if rows else "kab,kac->bc", scaled_KAB, scaled_KAB)
            values, vectors = torch.linalg.eigh(gram * len(gram) / gram.trace())
            inverse_root = vectors * torch.where(values < LEAST_SHARE, 1.0, values).rsqrt() @ vectors.T
            if rows:
                left_AA, scaled_KAB = inverse_root @ left_AA, inverse_root @ scaled_KAB
            else:
                right_BB, scaled_KAB = inverse_root @ right_BB, scaled_KAB @ inverse_root
        orthonormal_FK, _ = torch.linalg.qr(scaled_KAB.flatten(1).T)
        scaled_KAB = orthonormal_FK.T.unflatten(1, basis_KAB.shape[1:])
    return scaled_KAB, left_AA, right_BB


def _sharpened(basis_KF: Tensor, left_HA: Tensor, right_HB: Tensor) -> tuple[Tensor, Tensor]:
    """The same terms when further steps bring them no nearer to the space: only its own error is left."""
    distance_H = _distance(basis_KF, left_HA, right_HB)
    for _ in range(SHARPENED):
        before_H = distance_H
        left_HA, right_HB = _power_steps(basis_KF, left_HA, right_HB, CHECKED)
        distance_H = _distance(basis_KF, left_HA, right_HB)
        if not (distance_H < before_H / 2).any():
            break
    return left_HA, right_HB


def _products(left_NA: Tensor, right_NB: Tensor) -> Tensor:
    """a b^T of every pair, flattened: [N, A B]."""
    return (left_NA[:, :, None] * right_NB[:, None, :]).flatten(1)


def _starts(
    basis_KF: Tensor, left_HA: Tensor, right_HB: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random elements of the space, orthogonal to the terms found, as the strongest pair of singular vectors."""
    coefficients_NK = torch.randn(count, len(basis_KF), generator=generator, dtype=torch.float64)
    if len(left_HA):
        found_KH, _ = torch.linalg.qr(basis_KF @ _products(left_HA, right_HB).T)
        coefficients_NK -= coefficients_NK @ found_KH @ found_KH.T
    matrices_NAB = (coefficients_NK @ basis_KF).unflatten(1, (left_HA.shape[1], right_HB.shape[1]))
    left_NAA, _, right_NAB = torch.linalg.svd(matrices_NAB, full_matrices=False)
    return left_NAA[:, :, 0], right_NAB[:, 0]


def _power_steps(basis_KF: Tensor, left_NA: Tensor, right_NB: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Each step projects a b^T on the space, M, and takes M b and M^T M b; |M| never falls."""
    for _ in range(steps):
        products_NF = _products(left_NA, right_NB)
        matrices_NAB = (products_NF @ basis_KF.T @ basis_KF).unflatten(1, (left_NA.shape[1], right_NB.shape[1]))
        left_NA = torch.nn.functional.normalize((matrices_NAB @ right_NB[:, :, None])[:, :, 0], dim=1)
        right_NB = torch.nn.functional.normalize((left_NA[:, None] @ matrices_NAB)[:, 0], dim=1)
    return left_NA, right_NB


def _distance(basis_KF: Tensor, left_NA: Tensor, right_NB: Tensor) -> Tensor:
    """Squared distance of every unit a b^T from the space, [N]."""
    products_NF = _products(left_NA, right_NB)
    return (products_NF - products_NF @ basis_KF.T @ basis_KF).square().sum(1)


def _distinct(left_NA: Tensor, right_NB: Tensor) -> tuple[Tensor, Tensor]:
    """The first of all those that are the same matrix up to sign."""
    cosine_NN = ((left_NA @ left_NA.T) * (right_NB @ right_NB.T)).abs()
    seen_N = (cosine_NN > 1 - SAME_TERM).tril(-1).any(1)
    return left_NA[~seen_N], right_NB[~seen_N]
