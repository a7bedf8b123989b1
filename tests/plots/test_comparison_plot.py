"""Figures of comparisons: both throughputs and their difference are drawn as the comparison has them."""

import numpy as np
import pytest

from flowgraph import InvalidInputError, compare, plot_comparison
from flowgraph.plots.drawing import drawable
from tests.fixtures.figures import bars_of, labels_of, make_trace, plain_trace


def test_a_comparison_shows_both_and_their_difference():
    comparison = compare(make_trace(40, 12, 2), make_trace(40, 12, 2, seed=5))
    ax = plot_comparison(comparison)
    for side in (0, 1):
        np.testing.assert_array_equal(ax.lines[side].get_ydata(), comparison.throughput[:, side])
    change = {float(k): float(d) for k, d in enumerate(comparison.difference) if d}
    assert bars_of(ax) == pytest.approx(change)
    assert f"total variation {comparison.total_variation:.3f}" in ax.get_title(loc="left")
    largest = int(comparison.difference.abs().argmax())
    assert labels_of(ax)[0].get_text() == (
        f"{drawable(comparison.text(largest))} ({float(comparison.difference[largest]):+.2g})"
    )


def test_equal_traces_have_no_bars():
    assert bars_of(plot_comparison(compare(plain_trace(), plain_trace()))) == {}


@pytest.mark.unchecked
def test_bad_requests():
    with pytest.raises(InvalidInputError, match=r"comparison: must be a Comparison, got FlowTrace; flowgraph\.compare"):
        plot_comparison(plain_trace())
    with pytest.raises(InvalidInputError, match="top: must be an integer of at least 0, got -1; omit"):
        plot_comparison(compare(plain_trace(), plain_trace()), top=-1)
