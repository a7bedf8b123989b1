"""Statistics that several folders share: a normal quantile, Wilson's interval, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959964
"""97.5 % quantile of the normal distribution: half the width of a 95 % interval, in standard errors."""


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Compute Holm's adjusted p-values for several tests.

    The k-th smallest of m p-values is multiplied by :math:`m - k + 1`; the results are non-decreasing and at most 1.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    num_tests = len(p_values)
    # From the smallest to the largest: scaled by the number of tests that are left, and never below the one before.
    ascending = sorted(range(num_tests), key=lambda index: p_values[index])
    adjusted = [0.0] * num_tests
    largest_so_far = 0.0
    for rank, index in enumerate(ascending):
        scaled = min(1.0, (num_tests - rank) * p_values[index])
        largest_so_far = max(largest_so_far, scaled)
        adjusted[index] = largest_so_far
    return adjusted


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    r"""Compute Wilson's 95 % interval of a share.

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}}{1 + z^2 / n}

    Args:
        successes: of the trials; may be fractional.
        trials: n, positive.

    Returns:
        The ends of the interval, within [0, 1].

    Source: Wilson, Journal of the American Statistical Association 22, 1927.

    Example:
        >>> [round(end, 3) for end in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    share = successes / trials
    spread = Z_95**2 / trials  # z² / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)
