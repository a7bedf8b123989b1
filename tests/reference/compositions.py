"""Compositions by their papers' formulas: dense inverses and matrix powers, in float64.

Shapes: T tokens. C[t, s] is the capacity of the edge s -> t, zero unless s < t; masks are over tokens. Every function
returns one score per token.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def row_stochastic(C: Matrix) -> Matrix:
    """Each row divided by its sum; rows of zeros stay zeros."""
    out = np.zeros_like(C)
    for t, row in enumerate(C):
        if row.sum() > 0:
            out[t] = row / row.sum()
    return out


def flowtracer(C: Matrix, question: Vector, answer: Vector) -> Vector:
    """arXiv 2606.10646: condition on the answer, P(s -> t) = A[t, s] h[t] / h[s], then f = src + P^T f."""
    tokens = len(C)
    N = C * (1 - answer)[None, :]
    h = np.linalg.inv(np.eye(tokens) - N.T) @ answer
    P = np.zeros_like(C)
    for s in range(tokens):
        if h[s] > 0:
            P[s] = N[:, s] * h / h[s]
    reachable = question * (h > 0)
    if not reachable.any():
        return np.zeros(tokens)
    source = reachable / reachable.sum()
    return np.linalg.inv(np.eye(tokens) - P.T) @ source


def cage(C: Matrix, prompt: Vector, answer: Vector) -> Vector:
    """arXiv 2512.15663: Y = (I - A)^-1, A row-stochastic over generated tokens; the rows of the answer, summed."""
    A = row_stochastic(C) * (1 - prompt)[:, None]
    Y = np.linalg.inv(np.eye(len(C)) - A)
    return answer @ Y


def vtrace(C: Matrix, answer: Vector, damping: float) -> Vector:
    """Weight of all walks into the answer through a token, as a share of all walks; W = C / max, damped per hop."""
    largest = C.max() if C.max() > 0 else 1.0
    R = np.linalg.inv(np.eye(len(C)) - damping * C / largest)
    before = R.sum(1)
    after = answer @ R
    return before * after / after.sum()


def powers(M: Matrix, b: Vector, first: int, last: int) -> Vector:
    """Sum over j = first..last of (M^T)^j b."""
    total = np.zeros(len(M))
    for j in range(first, last + 1):
        total += np.linalg.matrix_power(M.T, j) @ b
    return total


def hops(C: Matrix, answer: Vector, k: int, normalize: bool = True) -> Vector:
    """FlashTrace with row-stochastic rows, linear in the weights: the walks of at most k edges into the answer."""
    M = row_stochastic(C) if normalize else C
    return powers(M * (1 - answer)[None, :], answer, 0, k)


def one_hop(C: Matrix, answer: Vector) -> Vector:
    """What the answer's rows read directly from the other tokens."""
    return (answer @ C) * (1 - answer)


def katz(C: Matrix, damping: float) -> Vector:
    """Katz 1953: sum over k >= 1 of damping^k (C^T)^k 1; the series ends after T terms."""
    return powers(damping * C, np.ones(len(C)), 1, len(C))


def rollout(layers: Sequence[Matrix], targets: Vector, residual: float = 0.5) -> Vector:
    """Abnar & Zuidema 2020: A_L ... A_1 with A_l = (1 - r) W_l + r I; the rows of the targets, summed."""
    product = np.eye(len(targets))
    for W in layers:
        rows = row_stochastic(W)
        for t in range(len(rows)):
            if rows[t].sum() == 0:
                rows[t, t] = 1.0
        product = ((1 - residual) * rows + residual * np.eye(len(rows))) @ product
    return targets @ product
