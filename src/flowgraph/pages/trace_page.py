"""One self-contained HTML page of a trace: text by throughput, steps as a flow diagram, curves, routes and numbers.

The page makes no request of any kind and opens from disk; :mod:`flowgraph.pages.page` says why it is safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowgraph.display.signs import visible
from flowgraph.files import PathLike, write_text
from flowgraph.pages.evidence import colourings, edge_parts_data, relevance_data
from flowgraph.pages.page import asset, flattened, percent, render_page

_MAX_EDGES = 20_000
"""Most edges between tokens in the page, the strongest of the trace."""
_MAX_BANDS = 4_000
"""Most edges between steps in the page, the strongest."""
RELEVANCE_SCHEMA = "flowgraph-relevance/1"
"""Schema of a payload that holds a relevance and no flow."""
_DEMANDS = {
    "margin": "logit over the best other token",
    "logprob": "log-probability",
    "contrast": "logit over that of the other answer",
}
"""What the relevance is shares of, in words."""
STYLES = ("trace.css", "text.css", "steps.css", "evidence.css", "heads.css")
_VENDORED = ("d3-array", "d3-sankey")
SCRIPTS = (
    "tokens",
    "text",
    "curves",
    "backbone",
    "panel",
    "heads",
    "selection",
    "steps",
    "evidence",
    "river",
    "routes",
    "search",
    "page",
)
"""Scripts of the page, in the order in which they run."""


def render_html(payload: Mapping[str, Any]) -> str:
    """Render a trace as one HTML page.

    Args:
        payload: a trace in the schema ``flowgraph-trace/1``; see :mod:`flowgraph.tracing.payload`. Its ``steps`` may be
            absent or None: then the page has no step view.

    Returns:
        The page. It is at most a few hundred bytes per token and a few dozen per edge, 20,000 edges at most, and
        about a kilobyte for each of up to 400 edges whose layers and heads are listed.

    Cost: one pass over the tokens, the steps and the edges shown.
    """
    return render_page(
        asset("trace.html.jinja"),
        styles=[asset(name) for name in STYLES],
        scripts=[asset(f"scripts/{name}.js") for name in SCRIPTS],
        libraries=[_with_licence(name) for name in _VENDORED],
        data_id="trace",
        page_data=_page_data(payload),
        **_header(payload),
    )


def write_html(path: PathLike, payload: Mapping[str, Any]) -> Path:
    """Write :func:`render_html` to a file, atomically.

    Raises:
        OutputError: the path cannot be written.
    """
    return write_text(path, render_html(payload))


def _with_licence(name: str) -> str:
    """Join a vendored library and its licence, which every copy must contain."""
    return f"/* {name}\n{asset(f'vendor/{name}.LICENSE')}*/\n{asset(f'vendor/{name}.min.js')}"


def _header(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the template: everything on the page that holds no token text."""
    summary = payload["summary"]
    backbone = payload["backbone"]
    regions = [token["region"] for token in payload["tokens"]]
    made = payload["provenance"]
    return {
        "model": visible(payload["model"] or "a model"),
        "feasible": payload["feasible"],
        "has_steps": bool(payload.get("steps")),
        "num_tokens": summary["num_tokens"],
        "num_edges": summary["num_edges"],
        "num_flowing": len(payload["edges"]) + payload["edges_left_out"],
        "counts": [(name, regions.count(name)) for name in ("question", "reasoning", "answer")],
        "answer_by": visible(str(payload["provenance"].get("answer_by") or "")),
        "mean_hops": summary["mean_hops"],
        "alpha": summary["alpha"],
        "backbone_share": backbone and percent(backbone["share"]),
        "backbone_edges": backbone and len(backbone["edges"]),
        "pruned": _pruned(summary),
        "cut_off_by": visible(str(made.get("stop"))) if made.get("truncated") else None,
        "provenance": list(flattened(payload["provenance"])),
        "schema": payload["schema"],
        "specificity": payload.get("specificity"),
        "baselines": _baselines(payload.get("baselines")),
        "relevance": _relevance_header(payload.get("relevance")),
        "only_relevance": payload["schema"] == RELEVANCE_SCHEMA,
        "colourings": len(colourings(payload)),
    }


def _relevance_header(relevance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the numbers above the tree of the relevance; None without one."""
    if not relevance:
        return None
    summary = relevance["summary"]
    return {**summary, "what": _DEMANDS.get(summary["target"], summary["target"])}


def _baselines(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the table of baselines as text; None without one."""
    if not found:
        return None

    # Values that are undefined are shown as a dash.
    rows = []
    for row in found["baselines"]:
        correlation = "-" if row["spearman"] is None else f"{row['spearman']:+.2f}"
        overlap = "-" if row["overlap"] is None else f"{100 * row['overlap']:.0f} %"
        note = row["description"]
        if row["reason"]:
            note = f"{row['description']} ({row['reason']})"
        rows.append((row["baseline"], correlation, overlap, visible(note)))
    return {**found, "score": visible(found["score"]), "rows": rows}


def _pruned(summary: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return what pruning kept of flow and attention, and its throughput error; None for a complete graph."""
    kept_flow = summary["kept_flow"]
    kept_attention = summary["kept_attention"]
    if min(kept_flow, kept_attention) >= 1:
        return None
    return percent(kept_flow), percent(kept_attention), f"{summary['throughput_error']:.1g}"


def _page_data(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the script draws, with bounded lists and numbers as short as they are shown."""
    backbone = payload["backbone"]
    drawn_backbone = backbone and {"share": _short(backbone["share"]), "num_edges": len(backbone["edges"])}

    # Edges are sorted by flow, so the strongest are drawn; the page states how many are not.
    edges = payload["edges"][:_MAX_EDGES]
    drawn_edges = [[source, target, _short(flow)] for source, target, _, flow in edges]
    num_left_out = payload["edges_left_out"] + len(payload["edges"]) - len(edges)
    routes = [[route["tokens"], _short(route["flow"])] for route in payload["routes"]]
    return {
        "tokens": list(_tokens(payload["tokens"])),
        "edges": drawn_edges,
        "edges_left_out": num_left_out,
        "entering": _positive(token["source"] for token in payload["tokens"]),
        "leaving": _positive(token["absorbed"] for token in payload["tokens"]),
        "backbone": drawn_backbone,
        "routes": routes,
        "hubs": _roles(payload["hubs"]),
        "checkpoints": _roles(payload["checkpoints"]),
        "steps": _steps(payload.get("steps")),
        "colourings": colourings(payload),
        "relevance": relevance_data(payload.get("relevance")),
        "edge_parts": edge_parts_data(payload.get("edge_parts", [])),
    }


def _tokens(tokens: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """Yield [text, region, generated, h, g, throughput, shares its characters with the token before]."""
    previous_span = None
    for token in tokens:
        # Tokens that split one character have the same span, which the page then shows once.
        span = (token["start"], token["end"])
        shares_characters = span == previous_span and span[0] < span[1]
        yield [
            token["text"],
            token["region"],
            int(token["generated"]),
            _short(token["h"]),
            _short(token["g"]),
            _short(token["throughput"]),
            int(shares_characters),
        ]
        previous_span = span


def _positive(values: Iterable[float]) -> list[list[float | None]]:
    """List [token, share] of the tokens with a positive share."""
    return [[token, _short(value)] for token, value in enumerate(values) if value > 0]


def _steps(steps: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return steps as [start, stop, region, throughput, source, absorbed]; their text is that of their tokens."""
    if not steps:
        return None
    nodes = []
    for node in steps["nodes"]:
        numbers = [_short(node[name]) for name in ("throughput", "source", "absorbed")]
        nodes.append([node["start"], node["stop"], node["region"], *numbers])

    # A route enters a step once, from an earlier step or at its start. So the flow of all edges is
    # sum(throughput - source), which includes the edges left out.
    edges = sorted(steps["edges"], key=lambda edge: -edge[2])
    edge_flow = math.fsum(node["throughput"] - node["source"] for node in steps["nodes"])
    return {
        "by": steps["by"],
        "nodes": nodes,
        "edges": [[source, target, _short(flow)] for source, target, flow in edges[:_MAX_BANDS]],
        "num_edges": len(edges) + steps.get("edges_left_out", 0),
        "edge_flow": _short(edge_flow),
    }


def _roles(roles: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """List hubs or checkpoints as [token, throughput, number of inflows, number of outflows]."""
    listed = []
    for role in roles:
        numbers = [_short(role[name]) for name in ("throughput", "inflows", "outflows")]
        listed.append([role["token"], *numbers])
    return listed


def _short(value: float | None) -> float | None:
    """Round to six significant digits, twice what is shown; None for a missing, infinite or undefined number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
