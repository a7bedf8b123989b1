"""Exact multiplication by powers of two."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_STEP = 1000
"""Powers of two are multiplied on in steps that float64 can hold."""


def scaled(x: Tensor, exponent: Int64[Tensor, ...]) -> Float64[Tensor, ...]:
    """``x * 2**exponent`` in float64, exact unless the product itself leaves the range; 0 stays 0."""
    x, left = x.double(), exponent
    for _ in range(4):
        step = left.clamp(-_STEP, _STEP)
        x, left = x * torch.exp2(step.double()), left - step
    return x
