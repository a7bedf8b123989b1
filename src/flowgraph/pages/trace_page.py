"""One self-contained HTML page of a trace: the text by throughput, its steps as a river, curves, routes, numbers.

The page makes no request of any kind and opens from disk; :mod:`flowgraph.pages.page` says why it is safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgraph.files import PathLike, write_text
from flowgraph.pages.page import asset, flattened, percent, render_page
from flowgraph.pages.pagedata import page_data
from flowgraph.pages.signs import visible

STYLES = ("trace.css", "text.css", "steps.css")
_VENDORED = ("d3-array", "d3-sankey")
SCRIPTS = (
    "tokens",
    "text",
    "curves",
    "backbone",
    "panel",
    "selection",
    "steps",
    "river",
    "routes",
    "search",
    "page",
)
"""Scripts of the page, in the order in which they run."""


def render_html(payload: Mapping[str, Any]) -> str:
    """A trace as one HTML page.

    Args:
        payload: a trace in the schema ``flowgraph-trace/1``; see :mod:`flowgraph.tracing.payload`. Its ``steps`` may be
            absent or None: then the page has no step view.

    Returns:
        The page. It is at most a few hundred bytes per token and a few dozen per edge, 20,000 edges at most.

    Cost: one pass over the tokens, the steps and the edges shown.
    """
    return render_page(
        asset("trace.html.jinja"),
        styles=list(map(asset, STYLES)),
        scripts=[asset(f"scripts/{name}.js") for name in SCRIPTS],
        libraries=[_with_licence(name) for name in _VENDORED],
        data_id="trace",
        page_data=page_data(payload),
        **_header(payload),
    )


def write_html(path: PathLike, payload: Mapping[str, Any]) -> Path:
    """Write :func:`render_html` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_html(payload))


def _with_licence(name: str) -> str:
    """A vendored library with its licence, which has to travel with it."""
    return f"/* {name}\n{asset(f'vendor/{name}.LICENSE')}*/\n{asset(f'vendor/{name}.min.js')}"


def _header(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the template itself writes: everything that holds no token text."""
    summary, backbone = payload["summary"], payload["backbone"]
    regions = [token["region"] for token in payload["tokens"]]
    kept_flow, kept_attention = summary["kept_flow"], summary["kept_attention"]
    lost = (percent(kept_flow), percent(kept_attention), f"{summary['throughput_error']:.1g}")
    return {
        "model": visible(payload["model"] or "a model"),
        "feasible": payload["feasible"],
        "has_steps": bool(payload.get("steps")),
        "num_tokens": summary["num_tokens"],
        "num_edges": summary["num_edges"],
        "counts": [(name, regions.count(name)) for name in ("question", "reasoning", "answer")],
        "mean_hops": summary["mean_hops"],
        "alpha": summary["alpha"],
        "backbone_share": backbone and percent(backbone["share"]),
        "backbone_edges": backbone and len(backbone["edges"]),
        "pruned": lost if min(kept_flow, kept_attention) < 1 else None,
        "provenance": list(flattened(payload["provenance"])),
        "schema": payload["schema"],
    }
