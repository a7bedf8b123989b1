"""The two sweeps as machine code, each one fused pass over the weights. Imported only where numba is installed.

Nodes of a batch are numbered through and edges never leave their graph, so a whole batch is one DAG: a range of
nodes that ends at graph borders can be swept on its own, by its own thread.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[import-not-found]
from numpy.typing import NDArray

# Dense sums may be regrouped, which vector instructions need. Gathered ones may not: vector gathers were measured
# two to three times slower than scalar loads. Unsigned sources spare a check for negative indices.
_REGROUP = {"reassoc", "contract"}


@njit(nogil=True, cache=True)
def potential(
    row_ptr: NDArray,
    source: NDArray,
    weight: NDArray,
    propagation_factor: NDArray,
    h: NDArray,
    accumulated: NDArray,
    first: int,
    last: int,
) -> None:
    """``h = b + D C^T h`` on nodes ``[first, last)``; ``h`` holds b at first. Each row hands its value back."""
    for t in range(last - 1, first - 1, -1):
        h[t] += propagation_factor[t] * accumulated[t]
        value = h[t]
        if value != 0.0:
            for edge in range(row_ptr[t], row_ptr[t + 1]):
                accumulated[source[edge]] += weight[edge] * value


@njit(nogil=True, cache=True)
def influence(
    row_ptr: NDArray,
    source: NDArray,
    weight: NDArray,
    propagation_factor: NDArray,
    g: NDArray,
    propagated: NDArray,
    first: int,
    last: int,
) -> None:
    """``g = q + C D g`` on nodes ``[first, last)``; ``g`` holds q at first. Each row gathers what it reads."""
    for t in range(first, last):
        received = 0.0
        for edge in range(row_ptr[t], row_ptr[t + 1]):
            received += weight[edge] * propagated[source[edge]]
        g[t] += received
        propagated[t] = propagation_factor[t] * g[t]


@njit(nogil=True, cache=True, fastmath=_REGROUP)
def dense_potential(matrix: NDArray, propagation_factor: NDArray, h: NDArray) -> None:
    """``h = b + D C^T h`` for one matrix ``[T, T]``, four rows at a time, so that each partial sum is stored once."""
    accumulated = np.zeros(h.size)
    t = h.size - 1
    while t >= 3:
        for row in range(t, t - 4, -1):
            h[row] += propagation_factor[row] * accumulated[row]
            for s in range(t - 3, row):
                accumulated[s] += matrix[row, s] * h[row]
        a, b, c, d = h[t], h[t - 1], h[t - 2], h[t - 3]
        for s in range(t - 3):
            accumulated[s] += matrix[t, s] * a + matrix[t - 1, s] * b + matrix[t - 2, s] * c + matrix[t - 3, s] * d
        t -= 4
    for row in range(t, -1, -1):
        h[row] += propagation_factor[row] * accumulated[row]
        for s in range(row):
            accumulated[s] += matrix[row, s] * h[row]


@njit(nogil=True, cache=True, fastmath=_REGROUP)
def dense_influence(matrix: NDArray, propagation_factor: NDArray, g: NDArray) -> None:
    """``g = q + C D g`` for one matrix ``[T, T]``, four rows at a time, so that each read of g serves four sums."""
    propagated = np.zeros(g.size)
    whole = g.size - g.size % 4
    for t in range(0, whole, 4):
        a = b = c = d = 0.0
        for s in range(t):
            x = propagated[s]
            a += matrix[t, s] * x
            b += matrix[t + 1, s] * x
            c += matrix[t + 2, s] * x
            d += matrix[t + 3, s] * x
        g[t] += a
        g[t + 1] += b
        g[t + 2] += c
        g[t + 3] += d
        for row in range(t, t + 4):
            for s in range(t, row):
                g[row] += matrix[row, s] * propagated[s]
            propagated[row] = propagation_factor[row] * g[row]
    for row in range(whole, g.size):
        for s in range(row):
            g[row] += matrix[row, s] * propagated[s]
        propagated[row] = propagation_factor[row] * g[row]
