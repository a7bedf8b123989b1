"""95 % intervals of means and of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float] | None
_CONFIDENCE = 0.95


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of a mean by Student's t; None for a single value, or values without any spread to judge by."""
    if len(values) < 2 or min(values) == max(values):
        return None
    half = _t_quantile((1 + _CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def wilson_interval(rate: float, count: int) -> Interval:
    """95 % interval of a share by Wilson's score; None for a single unit. Conservative for averages of shares."""
    if count < 2:
        return None
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _t_quantile(level: float, degrees: int) -> float:
    """Quantile of Student's t for whole degrees of freedom: its finite sum (Abramowitz & Stegun 26.7.3-4), bisected."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        angle = (low + high) / 2
        odd = degrees % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for step in range(odd, degrees - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (step + 1) / (step + 2)
        inside = math.sin(angle) * total  # probability of -t < T < t, up to the part of odd degrees
        if odd:
            inside = 2 / math.pi * (angle + inside)
        low, high = (angle, high) if inside < 2 * level - 1 else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def spearman(one: Sequence[float] | NDArray, other: Sequence[float] | NDArray) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN where it is not defined."""
    if len(one) < 3:
        return math.nan
    ranks = [_mean_ranks(np.asarray(values, dtype=np.float64)) for values in (one, other)]
    a, b = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def _mean_ranks(values: NDArray) -> NDArray:
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]
