"""How far two results of the same computation are apart; NaN and infinity are never close to anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absolute_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two entries."""
    if not _comparable(found, expected):
        return math.inf
    return float(_gap(found, expected).max())


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of an entry relative to that entry; infinite where only one of the two is 0."""
    if not _comparable(found, expected):
        return math.inf
    gap = _gap(found, expected)
    scale = expected.detach().double().cpu().abs()
    return float(torch.where(gap == 0, 0.0, gap / scale).max())


def norm_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry: gradients have terms of both signs, which may cancel."""
    if not _comparable(found, expected):
        return math.inf
    scale = expected.detach().double().cpu().abs().max()
    return float(_gap(found, expected).max() / scale)


def _comparable(found: Tensor, expected: Tensor) -> bool:
    same_shape = found.shape == expected.shape
    return same_shape and bool(found.isfinite().all()) and bool(expected.isfinite().all())


def _gap(found: Tensor, expected: Tensor) -> Tensor:
    """Absolute differences in float64, on the CPU."""
    return (found.detach().double().cpu() - expected.detach().double().cpu()).abs()
