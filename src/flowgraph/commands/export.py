"""``flowgraph export``: write a saved trace in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import TraceFile, check_outputs, console, stages

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
_DEFAULT_KEEP = 0.9
_MANY_EDGES = 50_000
"""Graph windows and XML readers are slow above this number of edges."""


def export(
    file: TraceFile,
    out: Annotated[Path, typer.Argument(help="Ends in .graphml, .gexf, .csv, .parquet or .json.")],
    keep: Annotated[
        float | None,
        typer.Option(help="Only the edges whose routes carry this share of the flow, e.g. 0.9. Default: all edges."),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="The table of the tokens, not of the edges.")] = False,
) -> None:
    """Write a saved trace for another tool; the suffix of OUT chooses the format."""
    suffix = out.suffix.lower()
    # The suffix and the options are checked before heavy modules are imported.
    if suffix not in _FORMATS:
        listed = "; ".join(f"{name} ({what})" for name, what in _FORMATS.items())
        raise typer.BadParameter(f"OUT must end in a suffix that names the format, got {out.name!r}; one of: {listed}")
    if tokens and (suffix not in _TABLES or keep is not None):
        raise typer.BadParameter("--tokens writes every token to a .csv or .parquet table; leave --keep out")
    from flowgraph.tracing.flow_trace import load_trace

    check_outputs(out)
    with stages() as progress:
        progress(f"reading {file}")
        trace = load_trace(file)
        progress(f"writing {out}")
        if tokens:
            contents = _write_tokens(trace, out)
            num_edges = 0
        else:
            num_edges = _write_edges(trace, out, suffix, keep)
            contents = f"{trace.num_tokens:,} tokens, {num_edges:,} of {trace.graph.num_edges:,} edges"
    size = f"{out.stat().st_size / 1000:,.0f} kB"
    console().print(f"wrote {out}: {contents}, {size}", highlight=False, markup=False)
    if suffix in (".graphml", ".gexf") and num_edges > _MANY_EDGES:
        console().print("Many edges for a graph window: --keep 0.9 writes those that carry 90 % of the flow.")


def _write_tokens(trace: FlowTrace, out: Path) -> str:
    """Write the table of tokens; return what the file holds."""
    from flowgraph.exchange.export import write_tokens

    write_tokens(trace, out)
    return f"{trace.num_tokens:,} tokens"


def _write_edges(trace: FlowTrace, out: Path, suffix: str, keep: float | None) -> int:
    """Write the edges in the format of the suffix; return their number."""
    from flowgraph.exchange.export import write_edges, write_gexf, write_graphml

    # The files hold all edges, or those of the backbone.
    if keep is None:
        num_edges = trace.graph.num_edges
    else:
        num_edges = trace.backbone(keep).num_edges
    if suffix == ".json":
        # The JSON lists edges with flow only, strongest first, and the backbone is made of the strongest.
        trace.to_json(out, keep=keep or _DEFAULT_KEEP, max_edges=num_edges)
        num_carrying = int((trace.flow.edge_flow > 0).sum())
        return min(num_edges, num_carrying)
    if suffix == ".graphml":
        write_graphml(trace, out, keep=keep)
    elif suffix == ".gexf":
        write_gexf(trace, out, keep=keep)
    else:
        write_edges(trace, out, keep=keep)
    return num_edges
