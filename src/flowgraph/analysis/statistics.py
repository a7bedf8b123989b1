"""95 % intervals of means and shares, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float] | None
"""(low, high); None where there is no interval."""

_CONFIDENCE = 0.95
_UPPER_LEVEL = (1 + _CONFIDENCE) / 2
_MIN_PAIRS = 3


def t_interval(values: Sequence[float]) -> Interval:
    r"""Compute the 95 % interval of a mean by Student's t.

    .. math:: \bar x \pm t_{.975,\, n - 1} \, s / \sqrt n

    Args:
        values: n numbers.

    Returns:
        (low, high); None for fewer than two values, or without spread.

    Example:
        >>> [round(end, 3) for end in t_interval([1.0, 2.0, 4.0])]
        [-1.461, 6.128]
    """
    # Imported here so that `import flowgraph` stays quick.
    from scipy import stats

    num_values = len(values)
    if num_values < 2 or min(values) == max(values):
        return None
    quantile = float(stats.t.ppf(_UPPER_LEVEL, num_values - 1))
    half_width = quantile * stdev(values) / math.sqrt(num_values)
    mean = fmean(values)
    return mean - half_width, mean + half_width


def wilson_interval(rate: float, count: int) -> Interval:
    r"""Compute the 95 % interval of a share by Wilson's score.

    .. math::
        \frac{p + z^2 / 2n}{1 + z^2 / n} \pm \frac{z}{1 + z^2 / n} \sqrt{\frac{p (1 - p)}{n} + \frac{z^2}{4 n^2}}

    Conservative where the units are themselves averages of shares, so ``rate * count`` need not be an integer.

    Args:
        rate: p, in [0, 1].
        count: n, the number of units.

    Returns:
        (low, high) within [0, 1]; None for fewer than two units.

    Source: Wilson, Journal of the American Statistical Association 22, 1927.

    Example:
        >>> [round(end, 3) for end in wilson_interval(0.8, 10)]
        [0.49, 0.943]
    """
    if count < 2:
        return None
    z = NormalDist().inv_cdf(_UPPER_LEVEL)
    shrinkage = 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / shrinkage
    variance = rate * (1 - rate) / count + z * z / (4 * count * count)
    half_width = z / shrinkage * math.sqrt(variance)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def spearman(one: Sequence[float] | NDArray, other: Sequence[float] | NDArray) -> float:
    """Compute Spearman's rank correlation; equal values share their mean rank.

    Args:
        one: n numbers.
        other: n numbers, paired with ``one`` by position.

    Returns:
        A number in [-1, 1]; NaN where it is not defined: for fewer than three pairs, or where one side is constant.

    Example:
        >>> round(spearman([1, 2, 3, 4], [1, 3, 2, 4]), 3)
        0.8
    """
    # Imported here so that `import flowgraph` stays quick.
    from scipy import stats

    x = np.asarray(one, dtype=np.float64)
    y = np.asarray(other, dtype=np.float64)
    if x.size < _MIN_PAIRS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    result: Any = stats.spearmanr(x, y)
    return float(result.statistic)
