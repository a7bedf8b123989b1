r"""Rank tokens by their scores: the AUC of two groups of tokens within a response, and its mean over responses.

.. math:: AUC = P(s_i > s_j) + \tfrac12 P(s_i = s_j), \quad i \in positive,\ j \in negative

.5 is a rule that cannot tell the two groups apart, 1 one that ranks every positive token above every negative one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from rl.seeds import generator

_RESAMPLES_AT_ONCE = 256
"""Bootstrap samples that are summed together, so that the memory does not grow with their number."""


class MeanWithInterval(NamedTuple):
    """A mean over responses with its 95 % bootstrap interval over problems.

    Attributes:
        value: the mean; None where no response has a value.
        low: lower end; None with fewer than two problems that have a value.
        high: upper end; None with fewer than two problems that have a value.
        n: responses with a value.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def within_auc(
    scores: Float[Tensor, "batch response"],
    positive: Bool[Tensor, "batch response"],
    negative: Bool[Tensor, "batch response"],
) -> Float64[Tensor, " batch"]:
    """Compute the AUC of each response.

    Args:
        scores: ``[B, R]``.
        positive: ``[B, R]``, tokens that should rank high.
        negative: ``[B, R]``, tokens that should rank low.

    Returns:
        ``[B]``; NaN where one of the two groups is empty.

    Cost: O(R log R) for each response.

    Example:
        >>> scores = torch.tensor([[0.9, 0.2, 0.2, 0.1]])
        >>> decisive = torch.tensor([[True, True, False, False]])
        >>> within_auc(scores, decisive, ~decisive).tolist()
        [0.875]
    """
    found = torch.full((len(scores),), torch.nan, dtype=torch.float64)
    for row, (values, is_positive, is_negative) in enumerate(zip(scores, positive, negative, strict=True)):
        of_positive = values[is_positive]
        of_negative = values[is_negative].sort().values
        if len(of_positive) == 0 or len(of_negative) == 0:
            continue
        # The number of negative tokens below, and at or below, each positive one. Their mean counts a tie as half.
        num_below = torch.searchsorted(of_negative, of_positive, right=False).double()
        num_up_to = torch.searchsorted(of_negative, of_positive, right=True).double()
        num_beaten = (num_below + num_up_to) / 2
        found[row] = num_beaten.mean() / len(of_negative)
    return found


def mean_over_problems(
    values: Float64[Tensor, " batch"], groups: Int64[Tensor, " batch"], *, seed: int, resamples: int
) -> MeanWithInterval:
    """Average the values of responses, with a percentile bootstrap over problems.

    Responses to one problem are not independent, so whole problems are drawn.

    Args:
        values: ``[B]``; NaN has no part in the mean.
        groups: ``[B]``, problem of each response.
        seed: of the bootstrap.
        resamples: bootstrap samples.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.

    Example:
        >>> values = torch.tensor([0.5, 1.0, float("nan")], dtype=torch.float64)
        >>> mean_over_problems(values, torch.tensor([0, 1, 2]), seed=0, resamples=200)
        MeanWithInterval(value=0.75, low=0.5, high=1.0, n=2)
    """
    # A response without both groups has no value, and this may hold for every response of a run.
    is_defined = ~values.isnan()
    if not bool(is_defined.any()):
        return MeanWithInterval(None, None, None, 0)
    defined = values[is_defined]
    num_defined = len(defined)
    mean = float(defined.mean())

    # Sum and count of each problem: a resample is a ratio of sums over the problems that were drawn.
    _, problem = groups[is_defined].unique(return_inverse=True)
    num_problems = int(problem.max()) + 1
    if num_problems < 2:
        return MeanWithInterval(mean, None, None, num_defined)
    ones = torch.ones(num_defined, dtype=torch.float64)
    sums = torch.zeros(num_problems, dtype=torch.float64).index_add_(0, problem, defined)
    counts = torch.zeros(num_problems, dtype=torch.float64).index_add_(0, problem, ones)

    # The percentile interval of the resampled means.
    drawn = resampled_sums(torch.stack([sums, counts]), seed=seed, resamples=resamples)
    drawn_sums = drawn[:, 0]
    drawn_counts = drawn[:, 1]
    ends = interval(drawn_sums / drawn_counts)
    assert ends is not None, "every problem has a count"
    return MeanWithInterval(mean, *ends, num_defined)


def interval(values: Float64[Tensor, " resamples"]) -> tuple[float, float] | None:
    """Return the 2.5 % and 97.5 % quantiles of resampled values; None where none of them is finite."""
    # A resample whose denominator is 0 has no value.
    known = values[values.isfinite()]
    if len(known) == 0:
        return None
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(known, levels).tolist()
    return low, high


def resampled_sums(
    contributions: Float64[Tensor, "figures problems"], *, seed: int, resamples: int
) -> Float64[Tensor, "resamples figures"]:
    """Sum the contributions of problems that are drawn with replacement.

    The draws depend on the seed and the number of problems alone, so that figures may be compared across calls.

    Args:
        contributions: ``[m, n]``, of each of n problems to each of m sums.
        seed: of the draws.
        resamples: bootstrap samples.

    Cost: ``resamples * n * m`` multiplications.
    """
    # A sum over drawn problems is a product of the contributions with the number of times that each was drawn.
    num_problems = contributions.shape[1]
    random = generator(seed, "bootstrap", num_problems)
    sums = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = torch.randint(num_problems, (size, num_problems), generator=random)
        times_drawn = torch.zeros(size, num_problems, dtype=torch.float64)
        times_drawn.scatter_add_(1, drawn, torch.ones_like(times_drawn))
        sums.append(times_drawn @ contributions.T)
    return torch.cat(sums)
