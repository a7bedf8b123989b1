"""The tables of an evaluation: one row per task, split, metric and method, computed from the records of the items.

A row compares a method with two references over the same items: the best trivial control of the metric, which reads
nothing of the model, and the control ``text_only``. Nothing here depends on the clock or on the order in which items
were computed, so the same records give the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowgraph.analysis.statistics import bootstrap_intervals, holm, sign_flip_p
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.registry import EvaluationMethod, EvaluationTask, Metric

MIN_ITEMS = 5
"""Fewer items than this have no interval and no p-value."""
TEXT_CONTROL = "text_only"
"""The control that reads the text without the model; every method is compared with it where it runs."""
_SIGNIFICANT = 0.05
_SHOWN_REASONS = 3
"""Different reasons for skipped items or methods that a note lists."""
_SHOWN_REASON = 160
"""Characters of a reason that a note shows."""

Record = Mapping[str, Any]
Row = dict[str, Any]

COLUMNS = {
    "task": "string",
    "split": "string",
    "items": "string",
    "metric": "string",
    "primary": "bool",
    "method": "string",
    "trivial": "bool",
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "n": "int64",
    "undefined": "int64",
    "skipped": "int64",
    "control": "string",
    "control_difference": "float64",
    "control_low": "float64",
    "control_high": "float64",
    "control_n": "int64",
    "control_p": "float64",
    "control_p_holm": "float64",
    "text_difference": "float64",
    "text_low": "float64",
    "text_high": "float64",
    "text_n": "int64",
    "text_p": "float64",
    "text_p_holm": "float64",
}
"""Type of each column of ``table.csv``; ``items`` is "all", or "right": those that the model answers rightly."""


@dataclass(frozen=True)
class TaskSummary:
    """What happened to the items of one task and split.

    Attributes:
        task: name of the task.
        split: ``"dev"`` or ``"test"``.
        summary: one line on the task.
        shows: what a high score shows.
        cannot_show: what it does not show.
        metric: name of the primary metric.
        metric_summary: one line on it: what is computed.
        higher_is_better: direction of the primary metric.
        num_items: items asked for.
        num_usable: items that decide something.
        unusable: number of items by the reason why they decide nothing.
        failed: number of items by the error that stopped them.
        num_right: usable items that the model answers rightly.
        num_wrong: usable items that the model answers wrongly; the others state no expected answer.
        num_compared: scores compared on this split in this folder, controls not counted.
        best_control: the trivial method with the best primary metric; None without one, and where the task compares
            with none.
        not_applicable: methods that do not give what the task reads.
        skipped: for each method, number of items by the reason why it has no score.
        unexpected: errors that are not the library's, as "method: error", with their number.
        notes: what a reader has to know, most important first.
    """

    task: str
    split: str
    summary: str
    shows: str
    cannot_show: str
    metric: str
    metric_summary: str
    higher_is_better: bool
    num_items: int
    num_usable: int
    unusable: Mapping[str, int]
    failed: Mapping[str, int]
    num_right: int
    num_wrong: int
    num_compared: int
    best_control: str | None
    not_applicable: Sequence[str]
    skipped: Mapping[str, Mapping[str, int]]
    unexpected: Mapping[str, int]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Column:
    """Values of one method for one metric, an entry per item; NaN where there is none."""

    method: EvaluationMethod
    values: NDArray[np.float64]
    num_skipped: int

    @property
    def defined(self) -> NDArray[np.float64]:
        """The values that exist."""
        return self.values[~np.isnan(self.values)]

    @property
    def mean(self) -> float:
        """Mean of the values that exist; NaN without any."""
        defined = self.defined
        if defined.size == 0:
            return math.nan
        return float(defined.mean())


def task_table(
    task: EvaluationTask,
    split: str,
    records: Sequence[Record],
    methods: Sequence[EvaluationMethod],
    seed: int,
) -> tuple[TaskSummary, list[Row]]:
    """Compute the summary and the rows of one task and split.

    Args:
        task: the task.
        split: the split.
        records: one per item.
        methods: those to compare; those that do not give what the task reads are left out.
        seed: of bootstrap and sign flips.

    Returns:
        The summary, and rows with the names of :data:`COLUMNS`: by metric as the task lists them, within a metric the
        best method first. A value that does not exist is None.

    Cost: for each row, up to three bootstraps of 10,000 draws and two sign-flip tests of as many flips.
    """
    # Items that decide nothing are counted, and are in no mean.
    applicable = [method for method in methods if task.reads in method.gives]
    usable = [record for record in records if record["error"] is None and record["unusable"] is None]
    right = [record for record in usable if record["model_right"] is True]
    num_wrong = sum(record["model_right"] is False for record in usable)

    rows: list[Row] = []
    for metric in task.metrics:
        is_primary = metric is task.metrics[0]
        rows += _metric_rows(task, split, "all", metric, usable, applicable, seed, is_primary)
        # Without a wrong answer, both groups of items are the same.
        if num_wrong:
            rows += _metric_rows(task, split, "right", metric, right, applicable, seed, is_primary)

    # The summary is about the primary metric over all items.
    primary = [row for row in rows if row["primary"] and row["items"] == "all"]
    best_control = next((row["control"] for row in primary if row["control"]), None)
    summary = TaskSummary(
        task=task.name,
        split=split,
        summary=task.summary,
        shows=task.shows,
        cannot_show=task.cannot_show,
        metric=task.metrics[0].name,
        metric_summary=task.metrics[0].summary,
        higher_is_better=task.metrics[0].higher_is_better,
        num_items=len(records),
        num_usable=len(usable),
        unusable=_counted(record["unusable"] for record in records if record["unusable"]),
        failed=_counted(record["error"]["message"] for record in records if record["error"]),
        num_right=len(right),
        num_wrong=num_wrong,
        num_compared=_num_compared(records, methods),
        best_control=best_control,
        not_applicable=[method.name for method in methods if task.reads not in method.gives],
        skipped=_skipped(usable, applicable),
        unexpected=_unexpected(records, applicable),
        notes=[],
    )
    notes = _notes(summary, task, primary)
    return TaskSummary(**{**vars(summary), "notes": notes}), rows


def _metric_rows(
    task: EvaluationTask,
    split: str,
    items: str,
    metric: Metric,
    records: Sequence[Record],
    methods: Sequence[EvaluationMethod],
    seed: int,
    is_primary: bool,
) -> list[Row]:
    """Compute the rows of one metric over some items, best method first."""
    # Best first, undefined last, and names decide between equal values, so that the order is fixed.
    columns = [_column(method, metric, records) for method in methods]
    sign = 1 if metric.higher_is_better else -1

    def from_best(column: _Column) -> tuple[bool, float, str]:
        mean = column.mean
        is_undefined = math.isnan(mean)
        descending = 0.0 if is_undefined else -sign * mean
        return is_undefined, descending, column.method.name

    columns.sort(key=from_best)
    # The references: the best control of this metric, and the text without the model. A task whose best value does not
    # show that a method is right has none.
    control: _Column | None = None
    text: _Column | None = None
    for column in columns:
        if not task.compares or column.defined.size == 0:
            continue
        if control is None and column.method.trivial:
            control = column
        if text is None and column.method.name == TEXT_CONTROL:
            text = column

    # A row for each method, and the samples whose intervals are computed below.
    rows = []
    samples: list[tuple[Row, str, NDArray[np.float64]]] = []
    for column in columns:
        defined = column.defined
        num_defined = int(defined.size)
        row: Row = {
            "task": task.name,
            "split": split,
            "items": items,
            "metric": metric.name,
            "primary": is_primary,
            "method": column.method.name,
            "trivial": column.method.trivial,
            "value": _rounded(column.mean),
            "low": None,
            "high": None,
            "n": num_defined,
            "undefined": len(records) - column.num_skipped - num_defined,
            "skipped": column.num_skipped,
            "control": None if control is None else control.method.name,
        }
        samples.append((row, "", defined))
        for name, reference in (("control", control), ("text", text)):
            differences = _differences(column, reference)
            row |= _difference(name, differences, column.method.trivial, seed)
            if differences is not None:
                samples.append((row, f"{name}_", differences))
        rows.append(row)

    # All intervals of a metric together: one product instead of hundreds.
    enough = [sample for sample in samples if sample[2].size >= MIN_ITEMS]
    intervals = bootstrap_intervals([values for _, _, values in enough], seed=seed)
    for (row, prefix, _), interval in zip(enough, intervals, strict=True):
        if interval is not None:
            low, high = interval
            row[f"{prefix}low"] = low
            row[f"{prefix}high"] = high

    # Controls are references, not findings: only the other methods are tested.
    for reference in ("control", "text"):
        _correct(rows, reference)
    return rows


def _column(method: EvaluationMethod, metric: Metric, records: Sequence[Record]) -> _Column:
    """Read the values of a method and a metric."""
    # A method without any score on an item was skipped; one with an undefined value was not.
    values = []
    num_skipped = 0
    for record in records:
        value: float | None = None
        scores = record["scores"].get(method.name)
        if scores is None:
            num_skipped += 1
        else:
            value = scores.get(metric.name)
        values.append(math.nan if value is None else value)
    return _Column(method, np.asarray(values, dtype=np.float64), num_skipped)


def _differences(column: _Column, reference: _Column | None) -> NDArray[np.float64] | None:
    """Subtract a reference over the items where both have a value; None without a reference of another name."""
    if reference is None or reference.method.name == column.method.name:
        return None
    differences = column.values - reference.values
    return differences[~np.isnan(differences)]


def _difference(name: str, differences: NDArray[np.float64] | None, is_trivial: bool, seed: int) -> Row:
    """Return the columns of a comparison with a reference, without its interval."""
    fields = ("difference", "low", "high", "n", "p", "p_holm")
    row: Row = {f"{name}_{field}": None for field in fields}
    if differences is None:
        return row
    row[f"{name}_n"] = int(differences.size)
    if differences.size:
        row[f"{name}_difference"] = _rounded(float(differences.mean()))
    if differences.size >= MIN_ITEMS and not is_trivial:
        row[f"{name}_p"] = sign_flip_p(differences, seed=seed)
    return row


def _correct(rows: Sequence[Row], reference: str) -> None:
    """Correct the p-values of the methods of one metric for their number, by Holm."""
    tested = [row for row in rows if row[f"{reference}_p"] is not None]
    adjusted = holm([row[f"{reference}_p"] for row in tested])
    for row, p in zip(tested, adjusted, strict=True):
        row[f"{reference}_p_holm"] = p


def _counted(reasons: Any) -> dict[str, int]:
    """Count equal reasons, most frequent first."""
    counts = Counter(reasons)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _num_compared(records: Sequence[Record], methods: Sequence[EvaluationMethod]) -> int:
    """Count the scores that were compared here, those of earlier runs in the same folder included."""
    is_control = {method.name: method.trivial for method in methods}
    names: set[str] = set()
    for record in records:
        names.update(record["scores"])
    return sum(not is_control.get(name, _is_control(name)) for name in names)


def _is_control(name: str) -> bool:
    """Tell whether a method is a trivial control; one that is not registered any more counts as a score."""
    try:
        return find_method(name).trivial
    except InvalidInputError:
        return False


def _skipped(records: Sequence[Record], methods: Sequence[EvaluationMethod]) -> dict[str, dict[str, int]]:
    """Count the reasons why a method has no score, for methods that miss some."""
    found = {}
    for method in methods:
        reasons = [record["skipped"][method.name] for record in records if method.name in record["skipped"]]
        if reasons:
            found[method.name] = _counted(reason["message"] for reason in reasons)
    return found


def _unexpected(records: Sequence[Record], methods: Sequence[EvaluationMethod]) -> dict[str, int]:
    """Count the errors that are not the library's own: faults of a method or a task."""
    names = [method.name for method in methods]
    found: list[str] = []
    for record in records:
        if record["error"] is not None and not record["error"]["expected"]:
            found.append(f"task {record['task']}: {record['error']['message']}")
        for name in names:
            reason = record["skipped"].get(name)
            if reason is not None and not reason["expected"]:
                found.append(f"method {name}: {reason['message']}")
    return _counted(found)


def _notes(summary: TaskSummary, task: EvaluationTask, primary: Sequence[Row]) -> list[str]:
    """Write what a reader has to know before the table, most important first."""
    notes = []
    if summary.num_usable == 0:
        notes.append("no usable item: this task decides nothing here")
    else:
        notes += _outcome_notes(summary, task, primary)
    if 0 < summary.num_usable < MIN_ITEMS:
        notes.append(f"{_items(summary.num_usable)}: too few for intervals, which need {MIN_ITEMS}")

    # How far the best score can be trusted.
    if summary.split == "dev":
        notes.append("dev: for choosing; read test once for what was chosen")
    elif summary.num_compared > 1 and task.compares:
        notes.append(
            f"{summary.num_compared} scores compared on test: the best of them is partly luck; p-values are corrected "
            "for their number, intervals are not"
        )

    # What was left out.
    for reasons, outcome in ((summary.unusable, "unusable"), (summary.failed, "failed")):
        if reasons:
            notes.append(f"{sum(reasons.values())} of {summary.num_items} items {outcome}: {_reasons(reasons)}")
    if summary.num_wrong:
        known = summary.num_right + summary.num_wrong
        notes.append(f"the model answers {summary.num_wrong} of {known} items wrongly; the others are also shown alone")
    for method, reasons in summary.skipped.items():
        notes.append(f"{method} skipped on {_items(sum(reasons.values()))}: {_reasons(reasons)}")
    undefined = [f"{row['method']} {row['undefined']}" for row in primary if row["undefined"]]
    if undefined:
        notes.append(f"undefined on some items, left out pairwise: {', '.join(undefined)}")
    if summary.not_applicable:
        notes.append(f"not applicable, as they give no {task.reads}: {', '.join(summary.not_applicable)}")
    return notes


def _outcome_notes(summary: TaskSummary, task: EvaluationTask, primary: Sequence[Row]) -> list[str]:
    """Write whether any method is better than the best trivial control."""
    methods = [row for row in primary if not row["trivial"] and row["value"] is not None]
    if not task.compares:
        return [
            "compared with no control: scores that have nothing to do with the model can pass here, so a good value is "
            "no merit and only a poor one counts"
        ]
    if summary.best_control is None:
        return ["no trivial control was run: no score here can be told from one that reads nothing of the model"]
    if not methods:
        return []
    # A control that is as good as the best method leaves nothing to explain.
    control = next(row for row in primary if row["method"] == summary.best_control)
    sign = 1 if task.metrics[0].higher_is_better else -1
    name = f"the control {summary.best_control} ({control['value']:.3g})"
    best = max(methods, key=lambda row: sign * row["value"])
    if sign * control["value"] >= sign * best["value"]:
        relation = "equals" if control["value"] == best["value"] else "beats"
        return [
            f"{name}, which reads nothing of the model, {relation} the best method, {best['method']} "
            f"({best['value']:.3g}): nothing here shows that a method reads more of the model than this control"
        ]

    # Compared over the same items, with their number corrected for.
    tested = [row for row in methods if row["control_p_holm"] is not None]
    num_better = 0
    for row in tested:
        is_significant = row["control_p_holm"] < _SIGNIFICANT
        if is_significant and sign * row["control_difference"] > 0:
            num_better += 1
    if tested and num_better == 0:
        return [f"no method is clearly better than {name}: corrected p of every difference is at least {_SIGNIFICANT}"]
    return []


def _items(number: int) -> str:
    """Write a number of items."""
    return "1 item" if number == 1 else f"{number} items"


def _reasons(reasons: Mapping[str, int]) -> str:
    """List the most frequent reasons with their numbers."""
    listed = []
    for reason, number in list(reasons.items())[:_SHOWN_REASONS]:
        text = reason if len(reason) <= _SHOWN_REASON else f"{reason[: _SHOWN_REASON - 1]}…"
        listed.append(text if len(reasons) == 1 else f"{text} ({number})")
    more = len(reasons) - len(listed)
    if more:
        listed.append(f"{more} other reasons")
    return "; ".join(listed)


def _rounded(value: float) -> float | None:
    """Round to 10 significant digits, so that the order of additions does not show; None for NaN."""
    if math.isnan(value):
        return None
    return float(f"{value:.10g}")
