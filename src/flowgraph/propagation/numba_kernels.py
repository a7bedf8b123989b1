"""The two sweeps as compiled code, each one pass over the weights. Imported only where numba is installed.

The nodes of a batch are numbered consecutively and edges stay within their graph, so a batch is one DAG. A range of
nodes that ends at the border of a graph can be swept on its own, in a thread of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-not-found]
from numpy.typing import NDArray

# Vector instructions need permission to regroup a sum. Dense sums have it. Sums over gathered values do not: vector
# gathers were measured two to three times slower than scalar loads.
_REGROUP = {"reassoc", "contract"}


_NO_CACHE = "cannot cache function"
"""Start of numba's message where no folder can hold compiled code."""

_has_warned = False


def _compiled(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile without the interpreter lock, and keep the code on disk where some folder can hold it.

    numba keeps it beside the package or in the user's cache folder. Where neither can be written (a read-only
    installation without a home folder), it refuses to compile at all; the code is then compiled in each process.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        global _has_warned
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError as error:
            if not str(error).startswith(_NO_CACHE):
                raise

        # No folder for compiled code: warn once per process, and compile in memory.
        if not _has_warned:
            _has_warned = True
            warnings.warn(
                "numba: should keep compiled code in a folder, got none that can be written, so each process compiles "
                "it anew (some seconds); set NUMBA_CACHE_DIR to a folder of yours",
                stacklevel=2,
            )
        return njit(nogil=True, **options)(function)

    return decorate


# Sources are unsigned: the compiled code then needs no check for negative indices.
@_compiled()
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
    """Solve ``h = b + D C^T h`` on the nodes ``[first, last)``: each row adds its value to its sources.

    Args:
        row_ptr: ``[N + 1]`` first edge into each node.
        source: ``[E]`` unsigned.
        weight: ``[E]`` C.
        propagation_factor: ``[N]`` the diagonal of D.
        h: ``[N]``; holds b at first, and h at the end.
        accumulated: ``[N]`` scratch, zeros at first: ``C^T h`` over the nodes that are solved.
        first: first node.
        last: end of the range, at the border of a graph.
    """
    for t in range(last - 1, first - 1, -1):
        h[t] += propagation_factor[t] * accumulated[t]
        # h[t] is final: all later rows t' > t have been added to accumulated[t].
        value = h[t]
        if value != 0.0:
            for edge in range(row_ptr[t], row_ptr[t + 1]):
                accumulated[source[edge]] += weight[edge] * value


@_compiled()
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
    """Solve ``g = q + C D g`` on the nodes ``[first, last)``: each row gathers the values of its sources.

    Args:
        row_ptr: ``[N + 1]`` first edge into each node.
        source: ``[E]`` unsigned.
        weight: ``[E]`` C.
        propagation_factor: ``[N]`` the diagonal of D.
        g: ``[N]``; holds q at first, and g at the end.
        propagated: ``[N]`` scratch, zeros at first: ``D g`` over the nodes that are solved.
        first: first node.
        last: end of the range, at the border of a graph.
    """
    for t in range(first, last):
        # g[t] = q[t] + sum over s < t of C[t, s] D[s] g[s]; every g[s] is final.
        received = 0.0
        for edge in range(row_ptr[t], row_ptr[t + 1]):
            received += weight[edge] * propagated[source[edge]]
        g[t] += received
        propagated[t] = propagation_factor[t] * g[t]


@_compiled(fastmath=_REGROUP)
def dense_potential(matrix: NDArray, propagation_factor: NDArray, h: NDArray) -> None:
    """Solve ``h = b + D C^T h`` for one matrix, four rows at a time: each partial sum is then stored once per four.

    Args:
        matrix: ``[T, T]`` C; entries on and above the diagonal are ignored.
        propagation_factor: ``[T]`` the diagonal of D.
        h: ``[T]``; holds b at first, and h at the end.
    """
    accumulated = np.zeros(h.size)
    t = h.size - 1
    while t >= 3:
        # The triangle of the rows t-3 .. t, last row first.
        for row in range(t, t - 4, -1):
            h[row] += propagation_factor[row] * accumulated[row]
            for s in range(t - 3, row):
                accumulated[s] += matrix[row, s] * h[row]

        # The columns before them, all four rows in one pass.
        h0 = h[t]
        h1 = h[t - 1]
        h2 = h[t - 2]
        h3 = h[t - 3]
        for s in range(t - 3):
            accumulated[s] += matrix[t, s] * h0 + matrix[t - 1, s] * h1 + matrix[t - 2, s] * h2 + matrix[t - 3, s] * h3
        t -= 4

    # The rest: up to three rows, one by one.
    for row in range(t, -1, -1):
        h[row] += propagation_factor[row] * accumulated[row]
        for s in range(row):
            accumulated[s] += matrix[row, s] * h[row]


@_compiled(fastmath=_REGROUP)
def dense_influence(matrix: NDArray, propagation_factor: NDArray, g: NDArray) -> None:
    """Solve ``g = q + C D g`` for one matrix, four rows at a time: each value of g is then read once per four sums.

    Args:
        matrix: ``[T, T]`` C; entries on and above the diagonal are ignored.
        propagation_factor: ``[T]`` the diagonal of D.
        g: ``[T]``; holds q at first, and g at the end.
    """
    propagated = np.zeros(g.size)
    in_fours = g.size - g.size % 4
    for t in range(0, in_fours, 4):
        # The columns before the rows t .. t+3, all four rows in one pass.
        sum0 = 0.0
        sum1 = 0.0
        sum2 = 0.0
        sum3 = 0.0
        for s in range(t):
            x = propagated[s]
            sum0 += matrix[t, s] * x
            sum1 += matrix[t + 1, s] * x
            sum2 += matrix[t + 2, s] * x
            sum3 += matrix[t + 3, s] * x
        g[t] += sum0
        g[t + 1] += sum1
        g[t + 2] += sum2
        g[t + 3] += sum3

        # The triangle of the four rows, first row first.
        for row in range(t, t + 4):
            for s in range(t, row):
                g[row] += matrix[row, s] * propagated[s]
            propagated[row] = propagation_factor[row] * g[row]

    # The rest: up to three rows, one by one.
    for row in range(in_fours, g.size):
        for s in range(row):
            g[row] += matrix[row, s] * propagated[s]
        propagated[row] = propagation_factor[row] * g[row]
