r"""Powers of two that keep a potential in range, however long or weak the chain.

A diagonal similarity :math:`N' = E N E^{-1}`, :math:`E = \mathrm{diag}(2^{k})`, leaves every product :math:`g \cdot h`
as it is: :math:`h = 2^{k} h'`, :math:`g = 2^{-k} g'` solve the same system in other units. With k the rounded binary
logarithm of the potential, every :math:`h'` is about 1, so nothing that matters can underflow or overflow; and as
powers of two are exact, nothing is rounded either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from flowgraph.propagation.interface import Sweeps


def exponents(sweeps: Sweeps, weight: Any, demand: Tensor) -> Int64[Tensor, ...]:
    """Rounded ``log2 h`` of every token that reaches the demand; the others get what keeps their influence in range.

    Computed in logarithms, one token at a time: an error of a few bits would do no harm.
    """
    with np.errstate(divide="ignore"):
        propagation_factor, own = (
            np.log2(x.detach().flatten().cpu().numpy()) for x in (sweeps.propagation_factor, demand)
        )
        log_h, accumulated = own.copy(), np.full(own.size, -np.inf)
        for token, read, weights in sweeps.weights_into(weight, last_first=True):
            log_h[token] = np.logaddexp2(own[token], propagation_factor[token] + accumulated[token])
            if log_h[token] > -np.inf:
                accumulated[read] = np.logaddexp2(accumulated[read], np.log2(weights) + log_h[token])
        unread = log_h == -np.inf
        k = np.where(unread, 0.0, np.rint(log_h))
        if unread.any():
            for token, read, weights in sweeps.weights_into(weight, last_first=False):
                arriving = np.log2(weights) + propagation_factor[read] - k[read]
                if unread[token] and arriving.max(initial=-np.inf) > -np.inf:
                    k[token] = -np.rint(np.logaddexp2.reduce(arriving))
    return torch.from_numpy(k).long().view(sweeps.propagation_factor.shape).to(sweeps.propagation_factor.device)


_STEP = 1000
"""Powers of two are multiplied on in steps that float64 can hold."""


def scaled(x: Tensor, exponent: Int64[Tensor, ...]) -> Float64[Tensor, ...]:
    """``x * 2**exponent`` in float64, exact unless the product itself leaves the range; 0 stays 0."""
    x, left = x.double(), exponent
    for _ in range(4):
        step = left.clamp(-_STEP, _STEP)
        x, left = x * torch.exp2(step.double()), left - step
    return x
