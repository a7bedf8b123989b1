"""The index page of a corpus: every trace with its figures, sortable, and every line that could not be traced.

One self-contained page under the same policy as a trace's: no request but the links a reader follows, texts escaped,
one script and one style sheet named by their hashes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgraph.display.signs import visible
from flowgraph.files import PathLike, write_text
from flowgraph.pages.page import asset, flattened, percent, render_page

_TEXT_COLUMNS = [
    ("line", "line of the input file", "number"),
    ("trace", "its id; opens the page, or the trace file", "text"),
    ("answer", "the tokens that are explained", "text"),
    ("found by", "how the answer was found", "text"),
    ("tokens", "prompt and response", "number"),
    ("question", "tokens of the question", "number"),
    ("reasoning", "generated tokens before the answer", "number"),
]
_COLUMNS = [
    *_TEXT_COLUMNS,
    ("mean hops", "steps of a route, on average", "number"),
    ("alpha", "how much of the flow fits through the attention", "number"),
    ("backbone edges", "edges of the routes that carry most flow", "number"),
    ("backbone share", "share of the flow that they carry", "number"),
]
"""Name, explanation and sorting of each column."""
_RELEVANCE_COLUMNS = [
    *_TEXT_COLUMNS,
    ("demand", "of the answer, in the units of the target; negative: the model prefers another answer", "number"),
    ("question share", "share of the demand that ends at the question", "number"),
    ("context share", "share that ends at other prompt tokens", "number"),
    ("forced share", "share that ends at tokens the model did not choose", "number"),
    ("residual", "of the conservation law", "number"),
]
"""The same for a corpus of relevance traces."""
MAX_ROWS = 10_000
"""Most rows in the page: a browser sorts more of them slowly, and the table file is the better tool."""
_SHOWN = 160
"""Characters of a text that a row shows."""


def render_index(
    rows: Sequence[Mapping[str, Any]], pages: Mapping[int, str], facts: Mapping[str, Any], *, signed: bool = False
) -> str:
    """Render the traces of a corpus as one HTML page.

    Args:
        rows: one per line of the input, as in the table of traces; a row with an error holds only id and line besides.
        pages: path of a trace's own page, relative to this page, by line number.
        facts: provenance of the run, by name.
        signed: whether the traces are relevance traces.

    Returns:
        The page: a few hundred bytes a row, 10,000 traces and as many errors at most.
    """
    # The page lists a bounded number of lines; the counts and the summary are those of all lines.
    traces = []
    errors = []
    for row in rows:
        if row.get("error"):
            errors.append(row)
        else:
            traces.append(row)
    listed_traces = [_cells(row, pages.get(row["line"]), signed) for row in traces[:MAX_ROWS]]
    listed_errors = []
    for row in errors[:MAX_ROWS]:
        message = _shown(row["error"], 600)
        listed_errors.append((row["line"], _shown(row["id"]), message))
    return render_page(
        asset("corpus.html.jinja"),
        styles=[asset("corpus.css")],
        scripts=[asset("corpus.js")],
        columns=_RELEVANCE_COLUMNS if signed else _COLUMNS,
        traces=listed_traces,
        errors=listed_errors,
        num_traces=len(traces),
        num_errors=len(errors),
        summary=_summary(traces, signed),
        model=visible(str(facts.get("model", "a model"))),
        facts=list(flattened(facts)),
    )


def write_index(
    path: PathLike,
    rows: Sequence[Mapping[str, Any]],
    pages: Mapping[int, str],
    facts: Mapping[str, Any],
    *,
    signed: bool = False,
) -> Path:
    """Write :func:`render_index` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_index(rows, pages, facts, signed=signed))


def _cells(row: Mapping[str, Any], page: str | None, signed: bool) -> dict[str, Any]:
    """Return one row of the table: what is shown, what it is sorted by, and where its link leads."""
    # Each number as (text shown, value to sort by).
    numbers = [(f"{row[name]:,}", row[name]) for name in ("tokens", "question", "reasoning")]
    numbers += _relevance_numbers(row) if signed else _flow_numbers(row)

    # Sort keys are written exactly; a missing number has an empty one.
    sortable = []
    for text, value in numbers:
        sort_key = "" if value is None else repr(value)
        sortable.append((text, sort_key))
    return {
        "line": row["line"],
        "id": _shown(row["id"]),
        "link": page or row["file"],
        "answer": _shown(row["answer_text"]),
        "answer_by": _shown(row.get("answer_by") or ""),
        "numbers": sortable,
    }


def _relevance_numbers(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return the figures of a relevance trace, each as text and as number."""
    shares = [row[f"{name}_share"] for name in ("question", "context", "forced")]
    return [
        (f"{row['demand']:.3g}", row["demand"]),
        *[(f"{100 * share:.1f} %", share) for share in shares],
        (f"{row['residual']:.0e}", row["residual"]),
    ]


def _flow_numbers(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """Return the figures of a flow, each as text and as number."""
    # A trace without flow has neither hops nor a backbone.
    hops = "no flow"
    if row["mean_hops"] is not None:
        hops = f"{row['mean_hops']:.2f}"
    return [
        (hops, row["mean_hops"]),
        (_number(row["alpha"], ".2g"), row["alpha"]),
        (_number(row["backbone_edges"], ","), row["backbone_edges"]),
        ("" if row["backbone_share"] is None else percent(row["backbone_share"]), row["backbone_share"]),
    ]


def _number(value: float | None, style: str) -> str:
    """Format a number; the empty text if it is missing."""
    if value is None:
        return ""
    return format(value, style)


def _shown(text: str, limit: int = _SHOWN) -> str:
    """Write a text on one line of at most ``limit`` characters, without invisible characters."""
    text = visible(" ".join(text.split()))
    if len(text) <= limit:
        return text
    return f"{text[: limit - 1]}…"


def _summary(traces: Sequence[Mapping[str, Any]], signed: bool) -> list[tuple[str, str, str]]:
    """List name, figure and explanation of the facts at the top of the page."""
    num_tokens = sum(row["tokens"] for row in traces)
    facts = [
        ("traces", f"{len(traces):,}", "lines with a trace"),
        ("tokens", f"{num_tokens:,}", "in all traces"),
    ]

    # Signed traces conserve relevance, so their fact is the share of the question; others have a flow.
    if signed:
        if traces:
            middle = statistics.median(row["question_share"] for row in traces)
            facts.append(("question share", f"{100 * middle:.0f} %", "of the demand, median over the traces"))
        return facts
    feasible = [row for row in traces if row["feasible"]]
    if feasible:
        facts.append(("mean hops", _median(feasible, "mean_hops"), "median over the traces"))
        facts.append(("backbone edges", _median(feasible, "backbone_edges"), "median over the traces"))
    num_infeasible = len(traces) - len(feasible)
    if num_infeasible:
        facts.append(("without flow", f"{num_infeasible:,}", "no question token reaches the answer"))
    return facts


def _median(traces: Sequence[Mapping[str, Any]], name: str) -> str:
    """Format the median of a column with at most one decimal."""
    middle = statistics.median(row[name] for row in traces)
    return f"{middle:,.1f}".removesuffix(".0")
