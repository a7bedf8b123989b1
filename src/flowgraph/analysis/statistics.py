"""95 % intervals of means and shares, rank correlation, and paired comparisons with Holm's correction."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowgraph.errors import InvalidInputError

Interval = tuple[float, float] | None
"""(low, high); None where there is no interval."""

_CONFIDENCE = 0.95
_UPPER_LEVEL = (1 + _CONFIDENCE) / 2
_MIN_PAIRS = 3
RESAMPLES = 10_000
"""Draws of a bootstrap interval, and of a sign-flip test that is not exact."""
_MOST_EXACT_FLIPS = 13
"""Largest number of values whose sign flips are all tried: there are 8,192."""
_TIE = 1e-12
"""Sums that differ by less than this share of the largest possible sum count as equal."""


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
    spread = stdev(values)
    half_width = quantile * spread / math.sqrt(num_values)
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
    # The formula, with 1 + z² / n as the common denominator of centre and half width.
    z = NormalDist().inv_cdf(_UPPER_LEVEL)
    z_squared = z * z
    denominator = 1 + z_squared / count
    centre = (rate + z_squared / (2 * count)) / denominator
    variance = rate * (1 - rate) / count + z_squared / (4 * count * count)
    half_width = z / denominator * math.sqrt(variance)

    # Rounding can put an end just outside of [0, 1].
    low = max(0.0, centre - half_width)
    high = min(1.0, centre + half_width)
    return low, high


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
    if x.size < _MIN_PAIRS:
        return math.nan
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    result: Any = stats.spearmanr(x, y)
    return float(result.statistic)


def bootstrap_interval(values: Sequence[float] | NDArray, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    r"""Compute the 95 % interval of a mean by the percentile bootstrap.

    .. math:: \hat F^{-1}(.025), \hat F^{-1}(.975) \quad\text{of}\quad
        \bar x^*_b = \frac1n \sum_i x_{j_{bi}}, \; j_{bi} \text{ uniform on } 1 \dots n

    The draws depend on the number of values and the seed alone, so the intervals of two methods over the same items
    use the same draws. Differences of paired values give a paired interval.

    A quantile between two of the sorted means is interpolated linearly (type 7 of Hyndman and Fan, numpy's default).
    With many draws this is the inverse of the distribution over all :math:`n^n` resamples, up to the error of the
    draws; where few values are possible and one holds the quantile, the end is that value.

    Args:
        values: n numbers.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        (low, high), 10 significant digits; None for fewer than two values.

    Raises:
        InvalidInputError: NaN or infinite values.

    Cost: a product of resamples x n and n numbers; the draws are kept for the next call.

    Source: Efron, Annals of Statistics 7, 1979.

    Example:
        >>> low, high = bootstrap_interval([0.2, 0.4, 0.6, 0.8])
        >>> 0.2 <= low < 0.5 < high <= 0.8
        True
    """
    return bootstrap_intervals([values], seed=seed, resamples=resamples)[0]


def bootstrap_intervals(
    samples: Sequence[Sequence[float] | NDArray], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Compute :func:`bootstrap_interval` of many samples at once.

    Args:
        samples: each n numbers; n may differ.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        An interval for each sample.

    Cost: one matrix product for all samples of one size.
    """
    # Samples of one size share their draws, and are the columns of one product.
    arrays = [_finite("values", values) for values in samples]
    places_of_size: dict[int, list[int]] = defaultdict(list)
    for place, array in enumerate(arrays):
        places_of_size[array.size].append(place)

    intervals: list[Interval] = [None] * len(arrays)
    for size, places in sorted(places_of_size.items()):
        if size < 2:
            continue
        columns = np.stack([arrays[place] for place in places], axis=1)
        weights = _bootstrap_weights(size, seed, resamples)
        means = weights @ columns
        lows, highs = np.quantile(means, [1 - _UPPER_LEVEL, _UPPER_LEVEL], axis=0)
        for place, low, high in zip(places, lows, highs, strict=True):
            intervals[place] = (_ten_digits(low), _ten_digits(high))
    return intervals


def paired_bootstrap(
    one: Sequence[float] | NDArray,
    other: Sequence[float] | NDArray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, Interval]:
    """Compute a mean difference of paired values, one minus other, and its 95 % bootstrap interval.

    Args:
        one: n numbers.
        other: n numbers, paired with ``one`` by position.
        seed: see :func:`bootstrap_interval`.
        resamples: see :func:`bootstrap_interval`.

    Returns:
        The difference, NaN without pairs, and the interval of :func:`bootstrap_interval`.

    Raises:
        InvalidInputError: NaN or infinite values, or another number of values on each side.

    Example:
        >>> difference, (low, high) = paired_bootstrap([3.0, 4.0], [1.0, 2.0])
        >>> difference, low, high
        (2.0, 2.0, 2.0)
    """
    first = _finite("one", one)
    second = _finite("other", other)
    if first.shape != second.shape:
        raise InvalidInputError(
            f"other: must be paired with one by position, got {second.size} values beside {first.size}; leave out what "
            "has no partner"
        )
    # The interval of the differences, and not of each side, keeps the pairs together.
    differences = first - second
    if differences.size == 0:
        return math.nan, None
    return float(differences.mean()), bootstrap_interval(differences, seed=seed, resamples=resamples)


def sign_flip_p(differences: Sequence[float] | NDArray, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    r"""Compute the two-sided p-value of a mean difference of 0 by flipping signs of paired differences.

    .. math:: p = P\big(|\textstyle\sum_i s_i d_i| \ge |\sum_i d_i|\big), \; s_i = \pm 1 \text{ with equal chance}

    Exact for up to 13 differences. For more, ``resamples`` random flips are tried, the observed one counts as one of
    them, and the smallest p-value is 1 / (resamples + 1).

    Args:
        differences: n numbers.
        seed: of the random flips.
        resamples: number of random flips.

    Returns:
        A number in (0, 1]; NaN without differences.

    Raises:
        InvalidInputError: NaN or infinite differences.

    Source: Fisher, The Design of Experiments, 1935; Phipson and Smyth, Statistical Applications in Genetics and
    Molecular Biology 9, 2010 (the observed flip counts).

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0])
        0.25
    """
    sample = _finite("differences", differences)
    if sample.size == 0:
        return math.nan

    # |sum s_i d_i| of every flip, and of the observed signs.
    flips = _sign_flips(sample.size, seed, resamples)
    sums = np.abs(flips @ sample)
    observed = abs(float(sample.sum()))

    # Flips that give the same sum in another order of addition must count as equal.
    tolerance = _TIE * float(np.abs(sample).sum())
    num_as_large = int((sums >= observed - tolerance).sum())
    num_flips = len(flips)
    if sample.size <= _MOST_EXACT_FLIPS:
        return num_as_large / num_flips
    # The observed signs count as one more flip, so that no p-value is 0.
    return (num_as_large + 1) / (num_flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Compute Holm's adjusted p-values for several tests.

    The k-th smallest of m p-values is multiplied by :math:`m - k + 1`; the results are non-decreasing and at most 1.

    Raises:
        InvalidInputError: a number outside [0, 1], or NaN.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    num_tests = len(p_values)
    # NaN fails this comparison too; sorted among numbers, it would change the ranks of the others.
    for p in p_values:
        if not 0 <= p <= 1:
            raise InvalidInputError(f"p_values: must lie in [0, 1], got {p}; leave out tests without a p-value")

    # From the smallest to the largest: scaled by the number of tests that are left, and never below the one before.
    ascending = sorted(range(num_tests), key=lambda index: p_values[index])
    adjusted = [0.0] * num_tests
    largest_so_far = 0.0
    for rank, index in enumerate(ascending):
        num_left = num_tests - rank
        scaled = min(1.0, num_left * p_values[index])
        largest_so_far = max(largest_so_far, scaled)
        adjusted[index] = largest_so_far
    return adjusted


@lru_cache(maxsize=64)
def _bootstrap_weights(num_values: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """Return ``[resamples, n]``: the share that each value has in each draw; rows sum to 1."""
    generator = np.random.default_rng([seed, num_values])
    uniform = np.full(num_values, 1 / num_values)
    counts = generator.multinomial(num_values, uniform, size=resamples)
    return counts.astype(np.float64) / num_values


@lru_cache(maxsize=64)
def _sign_flips(num_values: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """Return rows of +1 and -1: all of them where they are few, else ``resamples`` random ones."""
    if num_values <= _MOST_EXACT_FLIPS:
        # The binary digits of 0 to 2^n - 1 are all flips.
        codes = np.arange(2**num_values)[:, None]
        digits = np.arange(num_values)
        bits = (codes >> digits) & 1
    else:
        generator = np.random.default_rng([seed, num_values, 1])
        bits = generator.integers(0, 2, size=(resamples, num_values))
    return np.where(bits == 1, -1.0, 1.0)


def _finite(name: str, values: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """Return numbers as an array; reject NaN, whose comparisons are all false.

    Raises:
        InvalidInputError: NaN or infinity.
    """
    array = np.asarray(values, dtype=np.float64)
    is_finite = np.isfinite(array)
    if not is_finite.all():
        raise InvalidInputError(
            f"{name}: must be finite, got {array[~is_finite][0]}; leave out what has no value, in both of a pair"
        )
    return array


def _ten_digits(value: float) -> float:
    """Round to 10 significant digits, so that the order of additions does not show."""
    return float(f"{value:.10g}")
