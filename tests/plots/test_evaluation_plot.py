"""The forest plot of a task: values, intervals and controls as the table has them."""

import warnings

import numpy as np
import pytest

from flowgraph import InvalidInputError, plot_evaluation, save_figure
from tests.pages.test_evaluation_page import evaluation, record


def made(methods: list[str], number: int = 8, tasks: int = 1):
    return evaluation([record(place, methods, 4) for place in range(number)], methods, tasks)


def test_methods_are_drawn_best_on_top_with_their_intervals(tmp_path):
    result = made(["good", "control"])
    ax = plot_evaluation(result)
    rows = result.table(metric="primary")
    assert [label.get_text() for label in ax.get_yticklabels()] == [row["method"] for row in reversed(rows)]
    drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
    assert list(drawn["method"]) == [row["value"] for row in rows if not row["trivial"]]
    assert list(drawn["control, reads nothing of the model"]) == [row["value"] for row in rows if row["trivial"]]
    intervals = [tuple(np.asarray(line.get_xdata()).tolist()) for line in ax.lines]
    for row in rows:
        assert (row["low"], row["high"]) in intervals
    assert "made 0 (test), 8 items" in ax.get_title(loc="left")
    assert save_figure(ax, tmp_path / "made.svg").stat().st_size > 1000


def test_a_method_without_a_value_is_named_in_the_title():
    result = made(["good"])
    lacking = evaluation([record(place, ["good"], 4) for place in range(3)], ["good", "absent"])
    assert "without a value: absent" in plot_evaluation(lacking).get_title(loc="left").replace("\n", " ")
    assert "without" not in plot_evaluation(result, metric="loss").get_title(loc="left")


def test_an_evaluation_without_any_value_is_drawn_empty_and_without_a_warning():
    lacking = evaluation([record(place, ["good"], 4) for place in range(3)], ["absent"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plot_evaluation(lacking)
    assert "0 items; without a value: absent" in ax.get_title(loc="left").replace("\n", " ")


@pytest.mark.unchecked
def test_bad_requests():
    with pytest.raises(InvalidInputError, match=r"evaluation: must be an Evaluation, got int; flowgraph\.evaluate"):
        plot_evaluation(3)
    several = made(["good"], tasks=2)
    with pytest.raises(InvalidInputError, match="task: must be of made 0, made 1, got None; name one that was run"):
        plot_evaluation(several)
    with pytest.raises(InvalidInputError, match="split: must be of test, got 'dev'; name one that was run"):
        plot_evaluation(several, "made 0", split="dev")
    with pytest.raises(InvalidInputError, match="metric: must be 'primary' or of gain, loss, got 'other'"):
        plot_evaluation(several, "made 0", metric="other")
