"""Intervals and tests of paired values: against enumeration, known coverage, and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flowgraph.analysis.statistics import bootstrap_interval, holm, paired_bootstrap, sign_flip_p


def test_an_interval_of_few_values_is_that_of_all_resamples():
    values = np.array([0.1, 0.5, 0.6, 2.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values, resamples=200_000) == pytest.approx((low, high), abs=0.02)


def test_an_interval_is_that_of_scipy_up_to_the_draws():
    values = np.random.default_rng(1).normal(size=60)
    other = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(2))
    assert bootstrap_interval(values) == pytest.approx(tuple(other.confidence_interval), abs=0.02)


def test_intervals_are_seeded_and_paired():
    values = [0.2, 0.9, 0.4, 0.1, 0.7]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)
    # A constant difference has no spread, however much the values themselves have.
    difference, interval = paired_bootstrap([v + 1 for v in values], values)
    assert difference == pytest.approx(1.0)
    assert interval == pytest.approx((1.0, 1.0))


def test_too_few_values_have_no_interval():
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([1.0]) is None
    difference, interval = paired_bootstrap([], [])
    assert math.isnan(difference)
    assert interval is None


@pytest.mark.parametrize("num_values", [1, 2, 5, 9])
def test_few_differences_are_tested_exactly(num_values: int):
    differences = np.random.default_rng(num_values).normal(0.4, 1, num_values)
    flips = itertools.product((1, -1), repeat=num_values)
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    exact = np.mean([value >= abs(differences.sum()) - 1e-12 for value in sums])
    assert sign_flip_p(differences) == exact


def test_many_differences_are_tested_as_scipy_does():
    differences = np.random.default_rng(3).normal(0.25, 1, 40)
    other = stats.permutation_test(
        (differences, np.zeros(40)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        rng=np.random.default_rng(4),
    )
    assert sign_flip_p(differences) == pytest.approx(other.pvalue, abs=0.02)


def test_p_values_at_the_ends():
    assert math.isnan(sign_flip_p([]))
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p([1.0] * 50) == pytest.approx(1 / 10_001)


def test_holm_is_in_the_order_of_its_input():
    assert holm([]) == []
    assert holm([0.5, 0.01, 0.02]) == [0.5, 0.03, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
