"""``flowgraph export``: a saved trace for another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import console, stages

if TYPE_CHECKING:
    from flowgraph.tracing.flow_trace import FlowTrace

_FORMATS = {
    ".graphml": "GraphML, for Cytoscape, igraph, yEd",
    ".gexf": "GEXF, for Gephi",
    ".csv": "a table of the edges",
    ".parquet": "the same as Parquet",
    ".json": "the trace as JSON",
}
_TABLES = (".csv", ".parquet")
_MANY_EDGES = 50_000
"""Beyond this, graph windows and XML readers get slow."""


def export(
    file: Annotated[Path, typer.Argument(help="A trace written by `flowgraph trace` or FlowTrace.save.")],
    out: Annotated[Path, typer.Argument(help="Ends in .graphml, .gexf, .csv, .parquet or .json.")],
    keep: Annotated[
        float | None,
        typer.Option(help="Only the edges whose routes carry this share of the flow, e.g. 0.9. Default: all edges."),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="The table of the tokens, not of the edges.")] = False,
) -> None:
    """Write a saved trace for another tool; the suffix says which."""
    suffix = out.suffix.lower()
    if suffix not in _FORMATS:
        listed = "; ".join(f"{name} ({what})" for name, what in _FORMATS.items())
        raise typer.BadParameter(f"OUT must end in a suffix that says the format, got {out.name!r}; one of: {listed}")
    if tokens and (suffix not in _TABLES or keep is not None):
        raise typer.BadParameter("--tokens writes every token to a .csv or .parquet table; leave --keep out")
    from flowgraph.files import check_writable
    from flowgraph.tracing.flow_trace import load_trace

    check_writable(out)
    with stages() as progress:
        progress(f"reading {file}")
        trace = load_trace(file)
        progress(f"writing {out}")
        num_edges = _write(trace, out, suffix, keep, tokens)
    size = f"{out.stat().st_size / 1000:,.0f} kB"
    held = "" if tokens else f", {num_edges:,} of {trace.graph.num_edges:,} edges"
    console().print(f"wrote {out}: {trace.num_tokens:,} tokens{held}, {size}", highlight=False, markup=False)
    if suffix in (".graphml", ".gexf") and num_edges > _MANY_EDGES:
        console().print("Many edges for a graph window: --keep 0.9 writes those that carry 90 % of the flow.")


def _write(trace: FlowTrace, out: Path, suffix: str, keep: float | None, tokens: bool) -> int:
    """Write the file; how many edges are in it."""
    import flowgraph.exchange.export as exports

    num_edges = trace.graph.num_edges if keep is None else trace.backbone(keep).num_edges
    if tokens:
        exports.write_tokens(trace, out)
    elif suffix == ".json":
        trace.to_json(out, keep=keep or 0.9, max_edges=num_edges)  # the backbone is the edges with most flow
        return min(num_edges, int((trace.flow.edge_flow > 0).sum()))
    else:
        write = {".graphml": exports.write_graphml, ".gexf": exports.write_gexf}.get(suffix, exports.write_edges)
        write(trace, out, keep=keep)
    return num_edges
