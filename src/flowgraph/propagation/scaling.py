r"""Balancing: powers of two that keep potentials in the range of float64, however long or weak the chain.

A diagonal similarity :math:`N' = E N E^{-1}` with :math:`E = \mathrm{diag}(2^{k})` keeps every product
:math:`g \cdot h`: if :math:`h'` and :math:`g'` solve the balanced system, then :math:`h = 2^{k} h'` and
:math:`g = 2^{-k} g'` solve the original one. With k the rounded binary logarithm of the potential, every :math:`h'` is
about 1, so no number that matters underflows or overflows. Multiplying by a power of two is exact, so nothing is
rounded either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from flowgraph.propagation.interface import Sweeps

_STEP = 1000
"""The largest exponent of one multiplication: 2**1000 is in the range of float64."""
_NUM_STEPS = 4
"""Enough steps to carry the smallest positive float64 to infinity, and the largest to 0."""


def scaled(x: Tensor, exponent: Int64[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
    """Return ``x * 2**exponent`` in float64, exact unless the product leaves the range; 0 stays 0.

    Example:
        >>> scaled(torch.tensor([3.0, 0.0]), torch.tensor([-2, 5000])).tolist()
        [0.75, 0.0]
    """
    product = x.double()
    remaining = exponent
    for _ in range(_NUM_STEPS):
        step = remaining.clamp(-_STEP, _STEP)
        product = product * torch.exp2(step.double())
        remaining = remaining - step
    return product


def scale_exponents(sweeps: Sweeps, weight: Any, demand: Tensor) -> Int64[Tensor, " ..."]:
    """Compute the exponents k that balance a system.

    A token that reaches the demand gets ``k = round(log2 h)``. The other tokens have h = 0. They get the k that keeps
    their influence near 1.

    Args:
        sweeps: the structure, with D.
        weight: C.
        demand: b.

    Returns:
        k in the shape of the vectors. Cost: one or two reads of the weights, one token at a time. The sums run in
        logarithms; their rounding moves k by at most a few bits, far less than the range.
    """
    # log2(0) is minus infinity here: the logarithm of "reaches nothing".
    with np.errstate(divide="ignore"):
        log_factor = np.log2(_flat(sweeps.propagation_factor))
        log_demand = np.log2(_flat(demand))
        log_h = _log_potentials(sweeps, weight, log_factor, log_demand)

        reaches_nothing = log_h == -np.inf
        k = np.where(reaches_nothing, 0.0, np.rint(log_h))
        if reaches_nothing.any():
            _balance_influence(sweeps, weight, log_factor, reaches_nothing, k)

    factor = sweeps.propagation_factor
    return torch.from_numpy(k).long().view(factor.shape).to(factor.device)


def _flat(x: Tensor) -> NDArray[np.float64]:
    """Flatten a vector over graphs or sequences to one numpy vector."""
    return x.detach().flatten().cpu().numpy()


def _log_potentials(
    sweeps: Sweeps,
    weight: Any,
    log_factor: NDArray,
    log_demand: NDArray,
) -> NDArray[np.float64]:
    """Solve ``h = b + D C^T h`` for log2 h, last token first."""
    log_h = log_demand.copy()
    # log2 of C^T h over the tokens that are solved already.
    accumulated = np.full(log_h.size, -np.inf)
    for t, sources, weights in sweeps.incoming_edges(weight, last_first=True):
        log_h[t] = np.logaddexp2(log_demand[t], log_factor[t] + accumulated[t])
        if log_h[t] > -np.inf:
            propagated = np.log2(weights) + log_h[t]
            accumulated[sources] = np.logaddexp2(accumulated[sources], propagated)
    return log_h


def _balance_influence(
    sweeps: Sweeps,
    weight: Any,
    log_factor: NDArray,
    reaches_nothing: NDArray,
    k: NDArray[np.float64],
) -> None:
    """Set k of the tokens with h = 0 in place, first token first: the balanced weights into each sum to about 1."""
    for t, sources, weights in sweeps.incoming_edges(weight, last_first=False):
        if not reaches_nothing[t]:
            continue
        # The balanced weight of an edge s -> t is C[t, s] D[s] 2**(k[t] - k[s]); k[t] sets their sum to about 1.
        arriving = np.log2(weights) + log_factor[sources] - k[sources]
        has_incoming = arriving.max(initial=-np.inf) > -np.inf
        if has_incoming:
            k[t] = -np.rint(np.logaddexp2.reduce(arriving))
