"""The two sweeps over arrays, for graphs too large for fractions; written from the method, section 2.

Each token pulls its own sum over the edges that leave it (h) or reach it (g), in the widest float of the machine.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.longdouble]


class Solution(NamedTuple):
    """One entry per token, `edge_flow` one per edge."""

    h: Wide
    source: Wide
    g: Wide
    throughput: Wide
    edge_flow: Wide


def solve(
    source: NDArray,
    target: NDArray,
    weight: NDArray,
    *,
    demand: NDArray,
    question: NDArray,
    absorbing: NDArray,
    damping: float = 1.0,
    rule: str | NDArray = "uniform",
) -> Solution:
    """Both sweeps; edges in any order, `absorbing` tokens hand nothing on, `rule` a name or a vector."""
    tokens = demand.size
    weight = np.where(absorbing[source], 0, weight.astype(np.longdouble) * np.longdouble(damping))
    h = demand.astype(np.longdouble)
    for s, out in reversed(list(enumerate(_grouped(source, tokens)))):
        h[s] += (weight[out] * h[target[out]]).sum()
    if isinstance(rule, str):
        share = np.where(question, h if rule == "potential" else 1, 0)
    else:
        share = rule.astype(np.longdouble)
    share = np.where(h > 0, share, 0)
    share = share / (share.sum() if share.any() else 1)
    g = np.where(h > 0, share / np.where(h > 0, h, 1), 0)
    for t, into in enumerate(_grouped(target, tokens)):
        g[t] += (weight[into] * g[source[into]]).sum()
    return Solution(h, share, g, g * h, g[source] * weight * h[target])


def _grouped(ends: NDArray, tokens: int) -> list[NDArray]:
    """The edges of each token, by position in the edge list."""
    order = np.argsort(ends, kind="stable")
    return np.split(order, np.searchsorted(ends[order], np.arange(1, tokens)))
