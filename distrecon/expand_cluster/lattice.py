"""Short vectors of integer lattices: LLL with deep insertions, in place and compiled.

Lenstra, Lenstra, Lovasz (1982); deep insertions of Schnorr and Euchner (1994), which find vectors about as short as a
block reduction of small blocks does, at some tens of lines. Gram-Schmidt runs in float64, enough for entries up
to some 2^30: larger numbers are reduced a few bits at a time, so that entries stay small (see signs.py).

Legend: N rows (the basis), M columns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

DELTA = 0.99  # of Lovasz's condition
SWEEPS = 20  # of size reduction of one row, at most: rounding may leave something for a second one


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # no folder for the cache can be written: every process compiles for itself
        return njit(function)


@_compiled
def reduce_basis(basis_NM: np.ndarray, depth: int, most: int) -> int:
    """Reduce the rows (integers in float64, linearly independent) in place; returns the steps taken, at most `most`.

    A row is inserted at the first place where it is shorter than the row that is there, among the first `depth` places
    and the `depth` before its own; depth 1 is LLL but for the very first place.
    """
    count, columns = basis_NM.shape
    mu = np.zeros((count, count))
    dot = np.zeros((count, count))
    length = np.zeros(count)  # squared, of the Gram-Schmidt vectors
    row, steps = 0, 0
    while row < count and steps < most:
        steps += 1
        for _ in range(SWEEPS):
            for j in range(row):
                value = 0.0
                for x in range(columns):
                    value += basis_NM[row, x] * basis_NM[j, x]
                for i in range(j):
                    value -= mu[j, i] * dot[row, i]
                dot[row, j] = value
                mu[row, j] = value / length[j]
            changed = False
            for j in range(row - 1, -1, -1):
                whole = np.rint(mu[row, j])
                if whole != 0.0:
                    changed = True
                    for x in range(columns):
                        basis_NM[row, x] -= whole * basis_NM[j, x]
                    for i in range(j):
                        mu[row, i] -= whole * mu[j, i]
                    mu[row, j] -= whole
            if not changed:
                break
        rest = 0.0
        for x in range(columns):
            rest += basis_NM[row, x] * basis_NM[row, x]
        place = row
        for i in range(row):
            if rest < DELTA * length[i] and (i < depth or row - i <= depth):
                place = i
                break
            rest -= mu[row, i] * dot[row, i]
        if place == row:
            length[row] = rest
            row += 1
            continue
        for x in range(columns):
            moved = basis_NM[row, x]
            for i in range(row, place, -1):
                basis_NM[i, x] = basis_NM[i - 1, x]
            basis_NM[place, x] = moved
        row = place
    return steps
