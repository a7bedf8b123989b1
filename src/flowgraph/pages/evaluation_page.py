"""The page of an evaluation: tables of every task, and every item with its tokens coloured beside the truth.

One self-contained page under the same policy as a trace's: no request, texts as data, one script and one style sheet
named by their hashes. The tables are there without scripts; the items are drawn by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgraph.display.signs import visible
from flowgraph.files import PathLike, write_text
from flowgraph.pages.page import asset, flattened, render_page

NONE = "\u2013"
"""What stands for a value that does not exist."""


def render_evaluation(payload: Mapping[str, Any]) -> str:
    """Render an evaluation as one HTML page.

    Args:
        payload: in the schema of ``flowgraph.evaluation.page_items``.

    Returns:
        The page: about a byte for each token and method of an item, and the texts.
    """
    # The script draws the items; the tables are part of the page and can be read without it.
    drawn_tasks = []
    for task in payload["tasks"]:
        drawn_tasks.append({"task": task["task"], "metric": task["metric"], "items": task["items"]})
    page_data = {
        "levels": payload["levels"],
        "texts": payload["texts"],
        "tasks": drawn_tasks,
    }
    return render_page(
        asset("evaluation.html.jinja"),
        styles=[asset("evaluation.css")],
        scripts=[asset("evaluation.js")],
        data_id="evaluation",
        page_data=page_data,
        model=visible(payload["model"]),
        num_methods=len(payload["methods"]),
        methods=[(visible(name), visible(summary)) for name, summary in payload["summaries"].items()],
        tasks=[_section(number, task) for number, task in enumerate(payload["tasks"])],
        facts=list(flattened(payload["facts"])),
    )


def write_evaluation_page(path: PathLike, payload: Mapping[str, Any]) -> Path:
    """Write :func:`render_evaluation` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_evaluation(payload))


def figure(value: float | None, *, signed: bool = False) -> str:
    """Write a value with two decimals, or three significant digits where it is 10 or more.

    Example:
        >>> figure(0.4149), figure(-0.05, signed=True), figure(123.4), figure(None)
        ('.41', '-.05', '123', '\\u2013')
    """
    if value is None:
        return NONE
    # Two decimals resolve what intervals over some dozens of items can tell apart.
    size = abs(value)
    text = f"{size:.2f}" if size < 10 else f"{size:.3g}"
    text = text.removeprefix("0") if text.startswith("0.") else text
    # A value that is written as zero has no sign.
    is_zero = not text.strip("0.")
    if value < 0 and not is_zero:
        return f"-{text}"
    if signed and not is_zero:
        return f"+{text}"
    return text


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Write an interval; the empty text without one."""
    if low is None or high is None:
        return ""
    return f"[{figure(low, signed=signed)}, {figure(high, signed=signed)}]"


def p_value(p: float | None) -> str:
    """Write a p-value; one below .001 as such."""
    if p is None:
        return ""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _section(number: int, task: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows of one task."""
    # The items that are answered rightly are one more column of the main table.
    right = {
        row["method"]: row for row in task["other_rows"] if row["metric"] == task["metric"] and row["items"] == "right"
    }
    # The other metrics have a table of their own, a column each.
    others: dict[str, list[Mapping[str, Any]]] = {}
    for row in task["other_rows"]:
        if row["metric"] != task["metric"] and row["items"] == "all":
            others.setdefault(row["metric"], []).append(row)
    return {
        "number": number,
        "name": visible(task["task"]),
        "split": task["split"],
        "summary": visible(task["summary"]),
        "shows": visible(task["shows"]),
        "cannot_show": visible(task["cannot_show"]),
        "metric": visible(task["metric"]),
        "metric_summary": visible(task["metric_summary"]),
        "direction": "higher is better" if task["higher_is_better"] else "lower is better",
        "num_usable": task["num_usable"],
        "num_items": task["num_items"],
        "notes": [visible(note) for note in task["notes"]],
        "control": None if task["best_control"] is None else visible(task["best_control"]),
        "rows": [_cells(row, right) for row in task["rows"]],
        # Where text_only is the best control, both differences are the same.
        "has_text": any(row["text_difference"] is not None and row["control"] != "text_only" for row in task["rows"]),
        "has_right": bool(right),
        "others": _other_columns(task["rows"], others),
        "other_names": [visible(name) for name in others],
        "num_shown": len(task["items"]),
        "left_out": task["left_out"],
    }


def _cells(row: Mapping[str, Any], right: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cells of one row of the main table."""
    alone = right.get(row["method"])
    return {
        "method": visible(row["method"]),
        "trivial": row["trivial"],
        "is_control": row["method"] == row["control"],
        "value": figure(row["value"]),
        "interval": interval(row["low"], row["high"]),
        "n": row["n"],
        "control": figure(row["control_difference"], signed=True),
        "control_interval": interval(row["control_low"], row["control_high"], signed=True),
        "p": p_value(row["control_p_holm"]),
        "text": figure(row["text_difference"], signed=True),
        "text_interval": interval(row["text_low"], row["text_high"], signed=True),
        "right": NONE if alone is None else figure(alone["value"]),
        "right_n": 0 if alone is None else alone["n"],
    }


def _other_columns(
    rows: Sequence[Mapping[str, Any]], others: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return, for each method in the order of the main table, its values of the other metrics."""
    if not others:
        return []
    values: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name, metric_rows in others.items():
        for row in metric_rows:
            values[name, row["method"]] = row

    # A method without a value of a metric has an empty cell.
    table = []
    for row in rows:
        cells = []
        for name in others:
            own = values.get((name, row["method"]))
            if own is None:
                cells.append(("", ""))
            else:
                cells.append((figure(own["value"]), interval(own["low"], own["high"])))
        table.append({"method": visible(row["method"]), "trivial": row["trivial"], "cells": cells})
    return table
