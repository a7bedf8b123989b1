"""Paired comparisons of two methods from their definitions, for few items: every resample, every pattern of signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

Numbers = Sequence[float]


def resampled_means(differences: Numbers) -> list[float]:
    """List the mean of every resample with replacement, sorted: n^n of them, so n is at most 6 or so."""
    means = [math.fsum(drawn) / len(drawn) for drawn in product(differences, repeat=len(differences))]
    return sorted(means)


def share_below(differences: Numbers, value: float) -> float:
    """Compute the exact probability that a resampled mean is below a value, equal ones counting half.

    The end of a percentile interval of level alpha lies where this is alpha / 2, up to the number of resamples.
    """
    means = resampled_means(differences)
    below = sum(mean < value for mean in means)
    equal = sum(mean == value for mean in means)
    return (below + equal / 2) / len(means)


def bootstrap_interval(values_a: Numbers, values_b: Numbers, level: float = 0.95) -> tuple[float, float, float]:
    """Compute the mean difference and its exact percentile interval: the limit of infinitely many resamples.

    The ends are the smallest resampled means that at least a share (1 - level) / 2 and (1 + level) / 2 do not exceed.
    """
    differences = [a - b for a, b in zip(values_a, values_b, strict=True)]
    means = resampled_means(differences)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        position = math.ceil(share * len(means)) - 1
        ends.append(means[max(position, 0)])
    return math.fsum(differences) / len(differences), ends[0], ends[1]


def sign_flip_p(differences: Numbers) -> float:
    """Compute the exact two-sided p value: the share of all 2^n sign patterns whose mean is as far from 0 or farther.

    Sums are exact fractions, so that patterns of equal sum count as equal. The observed pattern is one of them, so the
    value is never 0.
    """
    exact = [Fraction(difference) for difference in differences]
    observed = abs(sum(exact))
    extreme = 0
    for signs in product((1, -1), repeat=len(exact)):
        flipped = sum(sign * difference for sign, difference in zip(signs, exact, strict=True))
        extreme += abs(flipped) >= observed
    return extreme / 2 ** len(exact)


def holm(p_values: Numbers) -> list[float]:
    """Adjust p values step by step (Holm 1979): the smallest of m times m, the next times m - 1, never decreasing."""
    left = list(range(len(p_values)))
    adjusted = [math.nan] * len(p_values)
    largest_so_far = 0.0
    while left:
        smallest = min(left, key=lambda position: p_values[position])
        largest_so_far = max(largest_so_far, min(1.0, len(left) * p_values[smallest]))
        adjusted[smallest] = largest_so_far
        left.remove(smallest)
    return adjusted
