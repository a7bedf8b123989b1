"""Tables of made-up records: values, controls, corrections and notes, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowgraph import EvaluationMethod, EvaluationTask, Metric
from flowgraph.analysis.statistics import bootstrap_interval, holm, sign_flip_p
from flowgraph.evaluation.tables import COLUMNS, MIN_ITEMS, task_table

GAIN = Metric("gain", "higher is better")
LOSS = Metric("loss", "lower is better", higher_is_better=False)


def task(*metrics: Metric) -> EvaluationTask:
    return EvaluationTask(
        name="made", items=lambda *_: [], function=lambda _: None, metrics=metrics or (GAIN,), reads="tokens",  # type: ignore[arg-type, return-value]
        causal=False, summary="Made up.", shows="", cannot_show="", licence="",
    )  # fmt: skip


def method(name: str, trivial: bool = False) -> EvaluationMethod:
    return EvaluationMethod(name, lambda _: None, "A method.", trivial=trivial)  # type: ignore[arg-type, return-value]


def records(values: dict[str, list[float | None]], metric: str = "gain", right: bool | None = None) -> list[dict]:
    """A record per item; a method without a value at a place is undefined there."""
    number = len(next(iter(values.values())))
    return [
        {
            "task": "made", "error": None, "unusable": None, "model_right": right,
            "scores": {name: {metric: own[place]} for name, own in values.items()}, "skipped": {},
        }
        for place in range(number)
    ]  # fmt: skip


def table(values: dict[str, list[float | None]], controls: set[str], split: str = "test", metric: Metric = GAIN) -> Any:
    methods = [method(name, name in controls) for name in values]
    return task_table(task(metric), split, records(values, metric.name), methods, seed=0)


GOOD = [0.8, 0.9, 0.7, 0.95, 0.6, 0.85, 0.9, 0.75]
FAIR = [0.5, 0.7, 0.6, 0.85, 0.5, 0.75, 0.7, 0.55]
POOR = [0.4, 0.3, 0.2, 0.45, 0.3, 0.35, 0.4, 0.25]
TEXT = [0.1, 0.3, 0.1, 0.25, 0.2, 0.15, 0.3, 0.15]


def test_values_intervals_differences_and_corrected_p():
    summary, rows = table({"good": GOOD, "fair": FAIR, "poor": POOR, "text_only": TEXT}, {"poor", "text_only"})
    assert [row["method"] for row in rows] == ["good", "fair", "poor", "text_only"]
    assert summary.best_control == "poor"
    for row, own in zip(rows, (GOOD, FAIR, POOR, TEXT), strict=True):
        assert set(row) == set(COLUMNS)
        assert row["value"] == pytest.approx(np.mean(own))
        assert (row["low"], row["high"]) == bootstrap_interval(own, seed=0)
        assert (row["n"], row["undefined"], row["skipped"], row["control"]) == (8, 0, 0, "poor")
    good = np.subtract(GOOD, POOR)
    fair = np.subtract(FAIR, POOR)
    assert rows[0]["control_difference"] == pytest.approx(good.mean())
    assert (rows[0]["control_low"], rows[0]["control_high"]) == bootstrap_interval(good, seed=0)
    p_values = [sign_flip_p(good), sign_flip_p(fair)]
    assert [row["control_p"] for row in rows[:2]] == p_values
    assert [row["control_p_holm"] for row in rows[:2]] == holm(p_values)
    assert rows[1]["text_difference"] == pytest.approx(np.mean(FAIR) - np.mean(TEXT))
    # Controls are references: no p-value, and no difference to themselves.
    assert rows[2]["control_difference"] is None
    assert rows[3]["text_difference"] is None
    assert rows[3]["control_difference"] == pytest.approx(np.mean(TEXT) - np.mean(POOR))
    assert rows[3]["control_p"] is None
    assert not any("control" in note and "beats" in note for note in summary.notes)
    assert summary.num_compared == 2


def test_where_lower_is_better_the_smallest_is_first_and_the_best_control():
    summary, rows = table({"good": TEXT, "bad": GOOD, "near": POOR, "far": FAIR}, {"near", "far"}, metric=LOSS)
    assert [row["method"] for row in rows] == ["good", "near", "far", "bad"]
    assert summary.best_control == "near"
    assert rows[0]["control_difference"] < 0
    assert not any("the best method" in note for note in summary.notes)
    assert not any("no method is clearly better" in note for note in summary.notes)


def test_a_control_that_beats_every_method_is_said_first():
    summary, _ = table({"fair": FAIR, "poor": POOR, "best": GOOD}, {"best"})
    assert summary.notes[0] == (
        "the control best (0.806), which reads nothing of the model, beats the best method, fair (0.644): nothing here "
        "shows that a method reads more of the model than this control"
    )
    # A tie is no gain either.
    summary, _ = table({"same": GOOD, "best": GOOD}, {"best"})
    assert "equals the best method, same (0.806)" in summary.notes[0]
    summary, _ = table({"low": GOOD, "lower": FAIR, "high": POOR}, {"high"}, metric=LOSS)
    assert "the control high (0.331), which" in summary.notes[0]
    assert "beats the best method, lower (0.644)" in summary.notes[0]


def test_a_difference_within_chance_is_said_first():
    close = [value + (0.01 if place else -0.05) for place, value in enumerate(GOOD)]
    summary, rows = table({"close": close, "best": GOOD}, {"best"})
    assert rows[0]["method"] == "close"
    assert rows[0]["control_p_holm"] > 0.05
    assert summary.notes[0].startswith("no method is clearly better than the control best (0.806): corrected p")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_task_that_compares_with_nothing_has_values_and_no_differences(split: str):
    methods = [method(name, name in {"random", "text_only"}) for name in ("good", "fair", "random", "text_only")]
    values = {"good": GOOD, "fair": FAIR, "random": POOR, "text_only": TEXT}
    own = replace(task(LOSS), compares=False)
    summary, rows = task_table(own, split, records(values, "loss"), methods, seed=0)
    assert [row["method"] for row in rows] == ["text_only", "random", "fair", "good"]
    assert summary.best_control is None
    assert summary.notes[0].startswith("compared with no control: scores that have nothing to do with the model")
    assert not any("no trivial control" in note or "luck" in note for note in summary.notes)
    for row in rows:
        assert row["value"] == pytest.approx(np.mean(values[row["method"]]))
        assert row["low"] is not None
        references = [name for name in row if name.startswith(("control", "text_"))]
        assert all(row[name] is None for name in references)


def test_without_a_control_the_table_says_what_it_lacks():
    summary, rows = table({"good": GOOD}, set())
    assert summary.best_control is None
    assert summary.notes[0].startswith("no trivial control was run")
    assert rows[0]["control_difference"] is None


def test_undefined_items_are_left_out_pairwise():
    holes = [None, *GOOD[1:]]
    summary, rows = table({"holes": holes, "poor": [*POOR[:-1], None]}, {"poor"})
    by_name = {row["method"]: row for row in rows}
    assert by_name["holes"]["value"] == pytest.approx(np.mean(GOOD[1:]))
    assert (by_name["holes"]["n"], by_name["holes"]["undefined"]) == (7, 1)
    assert by_name["holes"]["control_n"] == 6
    expected = np.subtract(GOOD[1:-1], POOR[1:-1]).mean()
    assert by_name["holes"]["control_difference"] == pytest.approx(expected)
    assert "undefined on some items, left out pairwise: holes 1, poor 1" in summary.notes


@pytest.mark.parametrize("number", [1, MIN_ITEMS - 1, MIN_ITEMS])
def test_few_items_have_values_and_no_intervals(number: int):
    summary, rows = table({"good": GOOD[:number], "poor": POOR[:number]}, {"poor"})
    has_interval = number >= MIN_ITEMS
    assert (rows[0]["low"] is not None) is has_interval
    assert (rows[0]["control_p"] is not None) is has_interval
    assert (rows[0]["control_low"] is not None) is has_interval
    assert any("too few for intervals" in note for note in summary.notes) is not has_interval
    assert rows[0]["value"] == pytest.approx(np.mean(GOOD[:number]))


def test_dev_and_test_say_what_they_are_for():
    summary, _ = table({"good": GOOD, "fair": FAIR, "poor": POOR}, {"poor"}, split="dev")
    assert "dev: for choosing; read test once for what was chosen" in summary.notes
    summary, _ = table({"good": GOOD, "fair": FAIR, "poor": POOR}, {"poor"}, split="test")
    assert any(note.startswith("2 scores compared on test: the best of them is partly luck") for note in summary.notes)


def test_the_same_records_in_another_order_of_methods_give_the_same_rows():
    one = table({"good": GOOD, "fair": FAIR, "poor": POOR}, {"poor"})
    other = table({"poor": POOR, "good": GOOD, "fair": FAIR}, {"poor"})
    assert one == other
