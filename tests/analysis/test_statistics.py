"""Intervals and tests of paired values: against enumeration, known coverage, and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flowgraph import InvalidInputError
from flowgraph.analysis.statistics import bootstrap_interval, holm, paired_bootstrap, sign_flip_p
from tests.reference import evaluation_statistics as reference


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


PAIRS = {
    # 6^6 = 46,656 resamples with 462 different means: a fine grid, but for one far value.
    "fine": ([0.91, 0.35, 0.62, 0.18, 0.77, 0.54], [0.40, 0.39, 0.11, 0.02, 0.80, 0.33]),
    "skewed": ([0.11, 0.42, 0.04, 0.23, 1.30, 0.66], [0.0, 0.05, 0.07, 0.31, 0.2, 0.0]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_paired_interval_is_that_of_all_resamples_where_their_grid_is_fine(pair: str):
    values_a, values_b = PAIRS[pair]
    draws = 400_000
    difference, interval = paired_bootstrap(values_a, values_b, resamples=draws)
    exact_difference, exact_low, exact_high = reference.bootstrap_interval(values_a, values_b)
    assert difference == pytest.approx(exact_difference)
    assert interval is not None
    # The share of all resampled means below each end is its level, up to the draws and to one value of the grid.
    differences = [a - b for a, b in zip(values_a, values_b, strict=True)]
    standard_error = math.sqrt(0.025 * 0.975 / draws)
    largest_step = 0.004
    for end, level in zip(interval, (0.025, 0.975), strict=True):
        assert reference.share_below(differences, end) == pytest.approx(level, abs=4 * standard_error + largest_step)
    spread = max(differences) - min(differences)
    assert interval == pytest.approx((exact_low, exact_high), abs=0.01 * spread)


@pytest.mark.parametrize(
    ("values_a", "values_b", "ends"),
    [
        # Means lie on 0, .2, ... 1; those that hold the quantiles have far more than .025.
        ([1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], (0.2, 1.0)),
        ([1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0], (-1.0, 0.6)),
        ([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], (2.0, 2.0)),
    ],
)
def test_a_paired_interval_of_few_possible_means_is_exact(values_a: list, values_b: list, ends: tuple[float, float]):
    _, low, high = reference.bootstrap_interval(values_a, values_b)
    assert (low, high) == pytest.approx(ends)
    assert paired_bootstrap(values_a, values_b)[1] == pytest.approx(ends)


@pytest.mark.parametrize(
    "differences",
    [
        [0.5],
        [0.25, -0.25],
        # Ties: patterns of equal sum count, whatever the order of addition.
        [0.1, 0.2, 0.3, -0.1, -0.2],
        [0.1, 0.1, 0.1, 0.1, 0.1, -0.1, 0.0],
        [0.0, 0.0, 0.0],
        [1e-9, 2e-9, -3e-9, 5e-9],
        [1e6, 0.5, -0.25, 3.0],
    ],
)
def test_sign_flips_are_exact(differences: list[float]):
    rounded = [round(value * 2**40) / 2**40 for value in differences]
    assert sign_flip_p(rounded) == pytest.approx(reference.sign_flip_p(rounded), abs=0)


@pytest.mark.parametrize("num_values", [2, 6, 10, 13])
def test_sign_flips_of_random_differences_are_exact(num_values: int):
    drawn = np.random.default_rng(num_values).normal(0.3, 1, num_values)
    assert sign_flip_p(drawn) == reference.sign_flip_p(drawn.tolist())


def test_random_sign_flips_estimate_the_exact_value():
    drawn = np.random.default_rng(7).normal(0.4, 1, 14).tolist()
    exact = reference.sign_flip_p(drawn)
    standard_error = math.sqrt(exact * (1 - exact) / 10_000)
    assert sign_flip_p(drawn) == pytest.approx(exact, abs=4 * standard_error + 1e-4)


@pytest.mark.parametrize("num_tests", [1, 2, 7, 30])
def test_holm_is_that_of_its_definition(num_tests: int):
    drawn = np.random.default_rng(num_tests).uniform(0, 0.2, num_tests)
    # Rounded, so that some are equal.
    p_values = [round(float(p), 2) for p in drawn]
    assert holm(p_values) == reference.holm(p_values)


@pytest.mark.unchecked
def test_numbers_that_are_none_and_sides_that_do_not_pair_are_refused():
    with pytest.raises(InvalidInputError, match="differences: must be finite, got nan; leave out what has no value"):
        sign_flip_p([0.5, math.nan])
    with pytest.raises(InvalidInputError, match="values: must be finite, got inf; leave out what has no value"):
        bootstrap_interval([0.5, math.inf, 1.0])
    with pytest.raises(InvalidInputError, match="other: must be finite, got nan"):
        paired_bootstrap([0.5, 1.0], [math.nan, 1.0])
    with pytest.raises(InvalidInputError, match="other: must be paired with one by position, got 1 values beside 3"):
        paired_bootstrap([0.5, 1.0, 2.0], [1.0])
    with pytest.raises(InvalidInputError, match=r"p_values: must lie in \[0, 1\], got nan; leave out tests"):
        holm([0.1, math.nan])
