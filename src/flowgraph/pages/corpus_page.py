"""The index page of a corpus: every trace with its figures, sortable, and every line that could not be traced.

One self-contained page under the same policy as a trace's: no request but the links a reader follows, texts escaped,
one script and one style sheet named by their hashes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgraph.files import PathLike, write_text
from flowgraph.pages.page import asset, flattened, percent, render_page
from flowgraph.pages.signs import visible

MAX_ROWS = 10_000
"""Rows that the page shows: beyond this a browser sorts slowly, and the table file is the better tool."""
_SHOWN = 160
"""Characters of a text that a row shows."""


def render_index(rows: Sequence[Mapping[str, Any]], pages: Mapping[int, str], facts: Mapping[str, Any]) -> str:
    """The traces of a corpus as one HTML page.

    Args:
        rows: one a line, as in the table of traces; those with an error hold nothing else but id and line.
        pages: where a trace has a page of its own, by line number; relative to this page.
        facts: what is said about the run, by name.

    Returns:
        The page: a few hundred bytes a row, 10,000 traces and as many errors at most.
    """
    traces = [row for row in rows if not row.get("error")]
    errors = [row for row in rows if row.get("error")]
    return render_page(
        asset("corpus.html.jinja"),
        styles=[asset("corpus.css")],
        scripts=[asset("corpus.js")],
        columns=_COLUMNS,
        traces=[_cells(row, pages.get(row["line"])) for row in traces[:MAX_ROWS]],
        errors=[(row["line"], _shown(row["id"]), _shown(row["error"], 600)) for row in errors[:MAX_ROWS]],
        num_traces=len(traces),
        num_errors=len(errors),
        summary=_summary(traces),
        model=visible(str(facts.get("model", "a model"))),
        facts=list(flattened(facts)),
    )


def write_index(
    path: PathLike, rows: Sequence[Mapping[str, Any]], pages: Mapping[int, str], facts: Mapping[str, Any]
) -> Path:
    """Write :func:`render_index` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_index(rows, pages, facts))


_COLUMNS = [
    ("line", "line of the input file", "number"),
    ("trace", "its id; opens the page, or the trace file", "text"),
    ("answer", "the tokens where flow leaves", "text"),
    ("tokens", "prompt and response", "number"),
    ("question", "tokens where flow enters", "number"),
    ("reasoning", "generated tokens before the answer", "number"),
    ("mean hops", "steps of a route, on average", "number"),
    ("alpha", "how much of the flow fits through the attention", "number"),
    ("backbone edges", "edges of the routes that carry most flow", "number"),
    ("backbone share", "share of the flow that they carry", "number"),
]


def _cells(row: Mapping[str, Any], page: str | None) -> dict[str, Any]:
    """One row: what is shown, what it is sorted by, and where it leads."""
    hops, alpha, share = row["mean_hops"], row["alpha"], row["backbone_share"]
    numbers = [(f"{row[name]:,}", row[name]) for name in ("tokens", "question", "reasoning")]
    numbers += [
        ("no flow" if hops is None else f"{hops:.2f}", hops),
        ("" if alpha is None else f"{alpha:.2g}", alpha),
        ("" if row["backbone_edges"] is None else f"{row['backbone_edges']:,}", row["backbone_edges"]),
        ("" if share is None else percent(share), share),
    ]
    return {
        "line": row["line"],
        "id": _shown(row["id"]),
        "link": page or row["file"],
        "answer": _shown(row["answer_text"]),
        "numbers": [(text, "" if value is None else repr(value)) for text, value in numbers],
    }


def _shown(text: str, limit: int = _SHOWN) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _summary(traces: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, figure and explanation of what stands at the top."""
    tokens = sum(row["tokens"] for row in traces)
    flowing = [row for row in traces if row["feasible"]]
    facts = [("traces", f"{len(traces):,}", "lines with a trace"), ("tokens", f"{tokens:,}", "in all traces")]
    if flowing:
        for name, label, note in (
            ("mean_hops", "mean hops", "median over the traces"),
            ("backbone_edges", "backbone edges", "median over the traces"),
        ):
            middle = statistics.median(row[name] for row in flowing)
            facts.append((label, f"{middle:,.1f}".removesuffix(".0"), note))
    if len(flowing) < len(traces):
        facts.append(("without flow", f"{len(traces) - len(flowing):,}", "no question token reaches the answer"))
    return facts
