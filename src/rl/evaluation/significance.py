"""Statistics that several folders share: a normal quantile and Wilson's interval."""

from __future__ import annotations

import math

Z_95 = 1.959964
"""97.5 % quantile of the normal distribution: half the width of a 95 % interval, in standard errors."""


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
