"""Compiled loops of `direct.py`: convolutions and pools of many models, on numpy arrays, without intermediate columns.

Images lie [channels, height, width, q] with the inputs q innermost. What one tap of a kernel reads for a row of outputs
is then one run of n = width * q numbers, beginning at `starts[K]` in the flat image for the first row and `step`
numbers later for each further row; all sums below are sums of such runs.

Compiled at the first call, which takes seconds, and stored in a cache beside the package (or in the user's, where that
cannot be written). One thread; the interpreter's lock is released meanwhile. The arguments are numpy arrays and
numbers, typed when compiled.

Legend: b models, O output channels, K fan-in (channels x kernel x kernel), h rows of outputs, n = width * q.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

# sums in any order (vectors need that), but NaN and infinity as they are
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder for the cache can be written: every process compiles for itself
        return njit(**OPTIONS)(function)


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Becomes part of the loop that calls it: a call would count the references to each of its arrays."""
    return njit(inline="always", **OPTIONS)(function)


@_inlined
def _add_runs(out, weights, source, starts, offset):
    """out[n] += the sum over t of weights[t] * source[offset + starts[t] :][:n], four runs at a time."""
    n, t = len(out), 0
    while t + 4 <= len(weights):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        s0, s1, s2, s3 = offset + starts[t], offset + starts[t + 1], offset + starts[t + 2], offset + starts[t + 3]
        r0, r1, r2, r3 = source[s0 : s0 + n], source[s1 : s1 + n], source[s2 : s2 + n], source[s3 : s3 + n]
        for i in range(n):
            out[i] += w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i]
        t += 4
    while t < len(weights):
        w0, s0 = weights[t], offset + starts[t]
        r0 = source[s0 : s0 + n]
        for i in range(n):
            out[i] += w0 * r0[i]
        t += 1


@_inlined
def _add_products(out, grad, source, starts, offset):
    """out[t] += grad[n] . source[offset + starts[t] :][:n], four runs at a time."""
    n, t = len(grad), 0
    while t + 4 <= len(out):
        s0, s1, s2, s3 = offset + starts[t], offset + starts[t + 1], offset + starts[t + 2], offset + starts[t + 3]
        r0, r1, r2, r3 = source[s0 : s0 + n], source[s1 : s1 + n], source[s2 : s2 + n], source[s3 : s3 + n]
        p0, p1, p2, p3 = out[t], out[t + 1], out[t + 2], out[t + 3]
        for i in range(n):
            p0 += grad[i] * r0[i]
            p1 += grad[i] * r1[i]
            p2 += grad[i] * r2[i]
            p3 += grad[i] * r3[i]
        out[t], out[t + 1], out[t + 2], out[t + 3] = p0, p1, p2, p3
        t += 4
    while t < len(out):
        s0, p0 = offset + starts[t], out[t]
        r0 = source[s0 : s0 + n]
        for i in range(n):
            p0 += grad[i] * r0[i]
        out[t] = p0
        t += 1


@_inlined
def _pool(sums, pool, largest, indices):
    """The maxima [h', w', q] of sums [h, n], and where in its pool each was (the first of equals)."""
    q = largest.shape[2]
    for y in range(largest.shape[0]):
        for x in range(largest.shape[1]):
            left = x * pool * q
            if pool == 2:
                _pool_of_two(sums[2 * y, left:], sums[2 * y + 1, left:], largest[y, x], indices[y, x])
                continue
            top, index = largest[y, x], indices[y, x]
            top[:], index[:] = sums[y * pool, left : left + q], 0
            for t in range(1, pool * pool):
                start = left + t % pool * q
                other = sums[y * pool + t // pool, start : start + q]
                for i in range(q):
                    larger = (other[i] > top[i]) | (other[i] != other[i])
                    top[i], index[i] = (other[i], t) if larger else (top[i], index[i])


@_inlined
def _pool_of_two(upper, lower, top, index):
    """The usual pool in one pass, five times faster than in four."""
    q = len(top)
    a, b, c, d = upper[:q], upper[q : 2 * q], lower[:q], lower[q : 2 * q]
    for i in range(q):
        largest = a[i]
        first = 0
        larger = (b[i] > largest) | (b[i] != b[i])
        largest = b[i] if larger else largest
        first = 1 if larger else first
        larger = (c[i] > largest) | (c[i] != c[i])
        largest = c[i] if larger else largest
        first = 2 if larger else first
        larger = (d[i] > largest) | (d[i] != d[i])
        top[i] = d[i] if larger else largest
        index[i] = 3 if larger else first


@_inlined
def _unpool(grad, indices, pool, unpooled):
    """The gradient [h, n] before pooling, from that after it [h', w', q]: the adjoint of `_pool`."""
    q, zero = grad.shape[2], unpooled.dtype.type(0)
    if pool * grad.shape[0] < unpooled.shape[0] or pool * grad.shape[1] * q < unpooled.shape[1]:
        unpooled[:] = zero  # rows or columns that no pool reads
    for y in range(grad.shape[0]):
        for x in range(grad.shape[1]):
            from_above, index = grad[y, x], indices[y, x]
            for t in range(pool * pool):
                start = (x * pool + t % pool) * q
                into = unpooled[y * pool + t // pool, start : start + q]
                for i in range(q):
                    into[i] = from_above[i] if index[i] == t else zero


@_compiled
def convolve(weight, bias, images, starts, step, pool, largest, indices, sums):
    """Writes the convolution of images [b or 1, numbers] to largest [b, O, h', w', q], pooled where pool > 1.

    weight [b, O, K], bias [b, O]; sums [h, n] is scratch memory; indices [b, O, h', w', q] as in `_pool`.
    """
    for b in range(len(weight)):
        image = images[b % len(images)]
        for o in range(weight.shape[1]):
            for y in range(len(sums)):
                row = sums[y] if pool > 1 else largest[b, o, y].reshape(-1)
                row[:] = bias[b, o]
                _add_runs(row, weight[b, o], image, starts, y * step)
            if pool > 1:
                _pool(sums, pool, largest[b, o], indices[b, o])


@_compiled
def gradients(weight, images, starts, step, pool, grad, indices, grad_weight, grad_images, unpooled):
    """Adds to grad_weight [b, O, K], and to grad_images [b, numbers] unless that is empty, from grad [b, O, h', w', q].

    weight [b, K, O]: transposed; unpooled [O, h, n] is scratch memory.
    """
    outputs, rows, n = unpooled.shape
    channels = np.arange(outputs) * (rows * n)
    for b in range(len(weight)):
        image = images[b % len(images)]
        for o in range(outputs):
            if pool > 1:
                _unpool(grad[b, o], indices[b, o], pool, unpooled[o])
            else:
                unpooled[o] = grad[b, o].reshape((rows, n))
            for y in range(rows):
                _add_products(grad_weight[b, o], unpooled[o, y], image, starts, y * step)
        if len(grad_images):
            flat = unpooled.reshape(-1)
            for t in range(len(starts)):
                for y in range(rows):
                    start = starts[t] + y * step
                    _add_runs(grad_images[b, start : start + n], weight[b, t], flat, channels, y * n)
