"""Which neurons are flipped: signs from the linear term that flips leave behind, exactly, for any width.

An activation with f(u) - f(-u) = kappa u shows a neuron [w, b] only up to its sign: flipping the set S turns
sum_S a f(u) into sum_S a f(-u) + kappa sum_S a u. So a fit with a free linear term K ends with K = -kappa sum_S a w for
the set S that is still to be turned round: a subset sum, in as many equations as outputs x inputs. Where these
determine the set over the reals, least squares and rounding find it. Else the set is a short vector of a lattice
(Lagarias and Odlyzko 1985; Coster et al. 1992), which lattice reduction finds as long as the equations' digits are
several times as many as the neurons. A set counts only if it leaves nothing of K beyond the rounding it came with.
Where no set does, the black box has a linear term of its own, and 2 neurons, v and -v, carry each of its directions,
since f(u) - f(-u) = kappa u.

Legend: H neurons, R inputs of the layer, K = R + 1, O outputs, E = O R equations, D directions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrecon.expand_cluster.lattice import reduce_basis
from distrecon.expand_cluster.thresholds import LINEAR_MARGIN
from distrecon.nets.activations import Activation

BITS = 12  # of the equations that are reduced at a time, so that the entries stay small
DEPTH = 10  # of insertions, where plain reduction does not find the set
DIGITS = (0.0, 3.0)  # bits fewer than the linear term's rounding allows, in turn: rounding makes the set long
STEPS = 1_000_000  # of one reduction, at most: seconds
SPARE_BITS = 20.0  # 2^-20 false sets of signs are expected, at most
GROWTH = 50.0  # neurons for which twice as many bits are needed as they are: reduced vectors get longer with dimension
ENUMERATED = 16  # neurons, of which all sets of signs are tried where none is exact
WIDEST = 160  # neurons that lattice reduction is tried for


@dataclass(frozen=True)
class Flips:
    """Neurons to turn round [H], and the linear term [O, R] that is left then: zero, or the black box's own.

    `sure_H` says whose sign shows in the linear term beyond its rounding: any sign of the others explains the answers.
    `determined`: no other set of these is to be expected to explain the linear term, too.
    """

    flips_H: Tensor
    rest_OR: Tensor
    sure_H: Tensor
    determined: bool


def flip_constant(activation: Activation) -> float:
    """kappa in f(u) - f(-u) = kappa u, for even-plus-linear activations."""
    one = torch.ones((), dtype=torch.float64)
    return float(activation(one) - activation(-one))


def choose_flips(neurons_HK: Tensor, outgoing_OH: Tensor, linear_OR: Tensor, kappa: float, rounding: float) -> Flips:
    """The set of neurons to flip so that the linear term vanishes; the nearest by least squares where there is none.

    `rounding` is the norm of the error of `linear_OR` and of the neurons' own terms in it, taken together.
    """
    terms_HE = -kappa * (outgoing_OH.T[:, :, None] * neurons_HK[:, None, :-1]).flatten(1)
    rounding = max(rounding, float(torch.finfo(terms_HE.dtype).eps * terms_HE.norm()))
    sure_H = terms_HE.norm(dim=1) > LINEAR_MARGIN * rounding
    terms_SE, right_E = terms_HE[sure_H], linear_OR.flatten()
    sign_S = _signs(terms_SE, 2 * right_E - terms_SE.sum(0), LINEAR_MARGIN * rounding)
    found = sign_S is not None
    if sign_S is None:
        sign_S = _closest(terms_SE, 2 * right_E - terms_SE.sum(0))
    flips_H = torch.zeros(len(neurons_HK), dtype=torch.bool)
    flips_H[sure_H] = sign_S > 0
    rest_E = torch.zeros_like(right_E) if found else right_E - terms_HE[flips_H].sum(0)
    determined = _determined(torch.linalg.svdvals(terms_SE), len(terms_SE), LINEAR_MARGIN * rounding)
    return Flips(flips_H, rest_E.reshape(linear_OR.shape), sure_H, determined)


def _determined(values_E: Tensor, count: int, allowed: float) -> bool:
    """Whether one set of signs alone is to be expected to leave no more than `allowed`, from the singular values.

    Two sets differ by at least twice the least singular value. Where that is no more than `allowed`: the sum of all
    terms with random signs has the singular values as standard deviations, so of 2^count sets about
    2^count prod(allowed / value) are within `allowed`.
    """
    seen_E = values_E[values_E > allowed]
    return len(seen_E) == count or float((seen_E / allowed).log2().sum()) > count + SPARE_BITS


def carriers(rest_OR: Tensor, kappa: float, rounding: float) -> tuple[Tensor, Tensor]:
    """Neurons [2 D, K] and their outgoing weights [O, 2 D] that add up to a linear term, D its rank beyond rounding."""
    u_OD, values_D, v_DR = torch.linalg.svd(rest_OR, full_matrices=False)
    kept_D = values_D > LINEAR_MARGIN * rounding
    neurons_DK = torch.cat([v_DR[kept_D], torch.zeros(int(kept_D.sum()), 1, dtype=rest_OR.dtype)], dim=1)
    outgoing_OD = u_OD[:, kept_D] * values_D[kept_D] / kappa
    return torch.cat([neurons_DK, -neurons_DK]), torch.cat([outgoing_OD, -outgoing_OD], dim=1)


def carried_term(hidden: int, added: int) -> str:
    """What is to be said of a network in which neurons were added that carry a linear term."""
    return (
        f"but {added} neurons carry a linear term, which no signs that were found for the other {hidden} explain: "
        "these are too many for the answers' digits, or the black box has a linear path or neurons that never bend "
        "where it was asked"
    )


def open_signs(hidden: int) -> str:
    """What is to be said where more sets of signs are to be expected to fit."""
    return f"but other signs of its {hidden} neurons may fit as well: the answers have too few digits"


def _signs(terms_SE: Tensor, right_E: Tensor, allowed: float) -> Tensor | None:
    """s[S] of +1 and -1 with |s terms - right| <= allowed; None where none is found."""

    def fits(sign_S: Tensor) -> bool:
        return bool((sign_S @ terms_SE - right_E).norm() <= allowed)

    rounded_S = _nearest(terms_SE, right_E)
    if fits(rounded_S):
        return rounded_S
    if not len(terms_SE):
        return None
    # rotated, so that no equation is empty or repeats others, and scaled so that rounding is 1
    _, values, directions = torch.linalg.svd(torch.cat([terms_SE, right_E[None]]), full_matrices=False)
    basis = directions[values > allowed].T
    unit = allowed / LINEAR_MARGIN
    terms = torch.cat([terms_SE, -right_E[None]]) @ basis / unit
    count, equations = len(terms_SE), basis.shape[1]
    if not equations:  # everything is rounding
        return None
    if equations * math.log2(float(terms.abs().max())) < count * (1 + count / GROWTH) or count > WIDEST:
        return None
    for sign_S in _short_vectors(terms.numpy()):
        if fits(torch.from_numpy(sign_S)):
            return torch.from_numpy(sign_S)
    return None


def _closest(terms_SE: Tensor, right_E: Tensor) -> Tensor:
    """s[S] of +1 and -1 with the least |s terms - right| of all, where they are few enough to try; else rounded."""
    count = len(terms_SE)
    if not 0 < count <= ENUMERATED:
        return _nearest(terms_SE, right_E)
    sets = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
    sign_XS = (2 * sets - 1).double()
    return sign_XS[(sign_XS @ terms_SE - right_E).square().sum(1).argmin()]


def _nearest(terms_SE: Tensor, right_E: Tensor) -> Tensor:
    """Least squares, rounded to +1 and -1."""
    solution_S = torch.linalg.lstsq(terms_SE.T, right_E[:, None], driver="gelsd").solution[:, 0]
    return torch.where(solution_S > 0, 1.0, -1.0).double()


def _short_vectors(terms_NE: np.ndarray):
    """Candidates s[S], all +1 or -1, with small s terms[:S] + terms[S]; terms in units of their rounding.

    The lattice of [x, 2^b x terms] for integers x[N], N = S + 1, with more and more bits b.
    """
    count = len(terms_NE)
    size = math.log2(np.abs(terms_NE).max())  # bits before the equations' rounding
    chosen_NN = np.eye(count)
    for bits in np.arange(BITS, size, BITS):
        chosen_NN = _reduced(chosen_NN, terms_NE * 2.0 ** (bits - size), 1)
        yield from _all_ones(chosen_NN)
    for depth in (1, DEPTH):
        for fewer in DIGITS:
            chosen_NN = _reduced(chosen_NN, terms_NE * 2.0**-fewer, depth)
            yield from _all_ones(chosen_NN)


def _reduced(chosen_NN: np.ndarray, terms_NE: np.ndarray, depth: int) -> np.ndarray:
    whole = np.rint(terms_NE)
    # products of whole numbers beyond 2^53 are not exact in float64: high and low parts apart
    high = np.rint(whole / 2.0**24)
    sums = (chosen_NN @ high) * 2.0**24 + chosen_NN @ (whole - high * 2.0**24)
    basis = np.ascontiguousarray(np.hstack([chosen_NN, sums]))
    reduce_basis(basis, depth, STEPS)
    return basis[:, : len(chosen_NN)]


def _all_ones(chosen_NN: np.ndarray):
    for row in chosen_NN:
        if (np.abs(row) == 1).all():
            yield row[:-1] * row[-1]
