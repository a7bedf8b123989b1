"""The slow statistics against scipy and values worked by hand."""

import numpy as np
import pytest
from scipy import stats

from tests.reference import evaluation_statistics as reference


def test_sign_flips_agree_with_the_permutation_test_of_scipy():
    differences = [0.5, -0.25, 1.0, 0.125, 0.75, -0.5]
    expected = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert reference.sign_flip_p(differences) == pytest.approx(expected.pvalue)
    assert reference.sign_flip_p([1.0, 1.0, 1.0]) == 0.25
    assert reference.sign_flip_p([0.0, 0.0]) == 1


def test_the_exact_interval_is_the_limit_of_resampling():
    values_a = [1.0, 0.5, 0.75, 0.25, 2.0]
    values_b = [0.5, 0.75, 0.5, 0.25, 1.0]
    difference, low, high = reference.bootstrap_interval(values_a, values_b)
    resampled = stats.bootstrap(
        (np.subtract(values_a, values_b),), np.mean, method="percentile", n_resamples=20_000, rng=0
    )
    assert difference == pytest.approx(0.3)
    assert resampled.confidence_interval.low == pytest.approx(low, abs=0.06)
    assert resampled.confidence_interval.high == pytest.approx(high, abs=0.06)
    assert reference.share_below([0.0, 1.0], 0.5) == 0.5


def test_holm_by_hand():
    assert reference.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert reference.holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert reference.holm([]) == []
