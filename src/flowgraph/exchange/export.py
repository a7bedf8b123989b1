"""Take the graph to the tools people already use: networkx, igraph, PyG, Gephi, Cytoscape, tables.

What :mod:`flowgraph.exchange.from_objects` reads back is one graph with its regions and ``facts`` about it: a schema, the
type of its capacities, the rules it was made by, and what pruning lost.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import SubElement

import networkx as nx
from networkx.readwrite.gexf import GEXFWriter
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_networkx as pyg_to_networkx

from flowgraph.analysis.backbone import backbone
from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.files import PathLike, atomic_write
from flowgraph.flow.flow import Flow
from flowgraph.graph.flow_graph import REGIONS, FlowGraph
from flowgraph.tracing.flow_trace import FlowTrace

if TYPE_CHECKING:
    import igraph

GRAPH_SCHEMA = "flowgraph-graph/1"
LOSSES = ("kept_attention", "kept_flow", "throughput_error")
NO_REGION = "other"
"""The region of a token that is in none of the three: empty text is lost by some readers."""

_MASKS = [f"{name}_mask" for name in REGIONS]
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]")  # XML 1.0 forbids, or rewrites (\r)
_BREAKS = str.maketrans("\t\n", "␉␊")
_COLORS = {"question": (31, 119, 180), "reasoning": (255, 127, 14), "answer": (44, 160, 44), NO_REGION: (127, 127, 127)}

Exportable = FlowGraph | Flow | FlowTrace


def to_networkx(graph: Exportable, *, keep: float | None = None) -> nx.DiGraph:
    """A ``networkx.DiGraph``: nodes carry the three region masks, edges their ``capacity``.

    Given a :class:`Flow`, nodes carry ``throughput``, ``h`` and ``g`` too, and edges their ``flow``; given a
    :class:`FlowTrace`, nodes carry the ``token`` text as well. :func:`flowgraph.from_networkx` reads it back.

    Args:
        graph: a graph, a solved flow or a trace.
        keep: export the backbone only: the fewest edges whose routes carry this share of the flow. Tokens all stay,
            and throughput and flow stay those of the whole. Default: every edge.

    Raises:
        InvalidInputError: a batch; export its graphs one by one. Or ``keep`` without a flow, or outside (0, 1].
        InfeasibleFlowError: ``keep`` where there is no flow.
    """
    part = _part(graph, keep)
    result = pyg_to_networkx(part.graph, node_attrs=_MASKS, edge_attrs=["capacity"])
    result.graph.update(_facts(part.graph))
    if part.flow and part.edge_flow is not None:
        h, g = part.flow.potentials
        for name, values in (("throughput", part.flow.throughput), ("h", h), ("g", g)):
            nx.set_node_attributes(result, dict(enumerate(values.tolist())), name)
        pairs = zip(*part.graph.edge_index.tolist(), strict=True)
        nx.set_edge_attributes(result, dict(zip(pairs, part.edge_flow.tolist(), strict=True)), "flow")
    if part.trace:
        nx.set_node_attributes(result, dict(enumerate(part.trace.tokens)), "token")
    return result


def to_igraph(graph: Exportable, *, keep: float | None = None) -> igraph.Graph:
    """The same as :func:`to_networkx` as a directed ``igraph.Graph``."""
    import igraph

    result = igraph.Graph.from_networkx(to_networkx(graph, keep=keep))
    del result.vs["_nx_name"]  # igraph's own bookkeeping; vertex ids are token indices already
    return result


def to_pyg(graph: Exportable, *, keep: float | None = None) -> Data:
    """A plain ``torch_geometric.data.Data``: ``edge_index``, ``capacity``, the three masks, and no ``x``.

    Given a :class:`Flow`, also ``flow`` per edge and ``throughput``, ``h`` and ``g`` per token; given a
    :class:`FlowTrace`, also ``token_id``. All tensors are copies. Arguments and errors as :func:`to_networkx`.
    """
    part = _part(graph, keep)
    values: dict[str, Tensor] = {name: part.graph[name] for name in ("edge_index", "capacity", *_MASKS, *LOSSES)}
    if part.flow and part.edge_flow is not None:
        h, g = part.flow.potentials
        values |= {"flow": part.edge_flow, "throughput": part.flow.throughput, "h": h, "g": g}
    if part.trace:
        values["token_id"] = part.trace.token_ids
    copies = {name: value.clone() for name, value in values.items()}
    return Data(num_nodes=part.graph.num_nodes, rules=part.graph.rules, schema=GRAPH_SCHEMA, **copies)


def write_graphml(graph: Exportable, path: PathLike, *, keep: float | None = None) -> None:
    """Write GraphML, atomically; :func:`flowgraph.read_graphml` reads it back.

    Nodes carry ``label``, ``position`` (the token's index), ``region`` (``other`` for none), ``token``,
    ``throughput``, ``h`` and ``g``; edges ``weight`` (the flow; the capacity of a graph without one) and ``capacity``.
    What XML cannot hold is replaced visibly: control characters by their pictures (␀ to ␟), lone surrogates by
    U+FFFD. A number too large for float64 is left out. Arguments and errors as :func:`to_networkx`.

    Raises:
        OutputError: the path cannot be written.

    Cost: the document is built in memory, about 3 kB per edge; ``keep=0.9`` writes a small share of the edges.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        nx.write_graphml_xml(_document(_part(graph, keep)), file)


def write_gexf(graph: Exportable, path: PathLike, *, keep: float | None = None) -> None:
    """Write GEXF 1.2 for Gephi, atomically: as :func:`write_graphml`, tokens coloured by region, sized by throughput.

    The file's description holds what :func:`flowgraph.read_gexf` needs beside nodes and edges.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        part = _part(graph, keep)
        document = _document(part)
        for _, node in document.nodes(data=True):
            red, green, blue = _COLORS[node["region"]]
            node["viz"] = {"color": {"r": red, "g": green, "b": blue}, "size": 10 + 40 * node.get("throughput", 0.0)}
        writer = GEXFWriter()
        writer.add_graph(document)
        # GEXF has no attributes of the whole graph; networkx writes none of them either.
        SubElement(next(writer.xml.iter("meta")), "description").text = json.dumps(document.graph)
        writer.write(file)


def write_edges(graph: Exportable, path: PathLike, *, keep: float | None = None) -> None:
    """Write the edges as a table, atomically: ``source``, ``target``, ``capacity`` and, given a flow, ``flow``.

    CSV, or Parquet where the name ends in ``.parquet``. Arguments as :func:`to_networkx`; :func:`flowgraph.read_edges`
    reads it back together with the table of :func:`write_tokens`.

    Raises:
        OutputError: the path cannot be written.
        MissingExtraError: Parquet without pyarrow.
    """
    with atomic_write(path) as temporary:
        part = _part(graph, keep)
        _write_table(temporary, Path(path).suffix, _edge_columns(part), _facts(part.graph))


def write_tokens(graph: Exportable, path: PathLike) -> None:
    """Write the tokens as a table, atomically.

    Columns ``position``, ``region`` and what is known of ``token``, ``throughput``, ``h`` and ``g``. Formats and errors
    as :func:`write_edges`; token text is cleaned as in :func:`write_graphml`.
    """
    with atomic_write(path) as temporary:
        part = _part(graph, None)
        _write_table(temporary, Path(path).suffix, _token_columns(part), _facts(part.graph))


@dataclass(frozen=True)
class _Part:
    """What is exported: a graph or a part of its edges, with the flow of the whole and the trace where there is one."""

    graph: FlowGraph
    flow: Flow | None
    edge_flow: Tensor | None
    trace: FlowTrace | None


def _part(graph: Exportable, keep: float | None) -> _Part:
    trace = graph if isinstance(graph, FlowTrace) else None
    flow = trace.flow if trace else graph if isinstance(graph, Flow) else None
    whole = flow.graph if flow else graph
    if not isinstance(whole, FlowGraph) or isinstance(whole, Batch):
        raise InvalidInputError(
            f"graph: must be one FlowGraph, Flow or FlowTrace, got {type(whole).__name__}; "
            "export the graphs of a batch one by one (batch.to_data_list())"
        )
    if keep is None:
        return _Part(whole, flow, flow.edge_flow if flow else None, trace)
    if flow is None:
        raise InvalidInputError(
            f"keep: needs a flow to choose edges by, got {keep!r} with a graph alone; pass solve(graph) or the trace"
        )
    bone = backbone(flow, keep)
    return _Part(bone.subgraph(), flow, flow.edge_flow[bone.edge_mask], trace)


def _facts(graph: FlowGraph) -> dict[str, Any]:
    """What is true of the whole graph; a loss that is not known (NaN) is left out."""
    facts: dict[str, Any] = {"schema": GRAPH_SCHEMA, "capacity_dtype": str(graph.capacity.dtype).removeprefix("torch.")}
    facts |= {"rules": graph.rules} if graph.rules else {}
    losses = {name: float(graph[name]) for name in LOSSES}
    return facts | {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def _token_columns(part: _Part) -> dict[str, list]:
    """One value per token; None where a number is too large for float64."""
    graph = part.graph
    masks = [(name, mask.tolist()) for name, mask in zip(REGIONS, (graph[mask] for mask in _MASKS), strict=True)]
    region = [next((name for name, mask in masks if mask[k]), NO_REGION) for k in range(int(graph.num_nodes or 0))]
    columns: dict[str, list] = {"position": list(range(len(region))), "region": region}
    if part.trace:
        columns["token"] = [_visible(token) for token in part.trace.tokens]
    if part.flow:
        h, g = part.flow.potentials
        for name, values in (("throughput", part.flow.throughput), ("h", h), ("g", g)):
            columns[name] = [value if math.isfinite(value) else None for value in values.tolist()]
    return columns


def _edge_columns(part: _Part) -> dict[str, list]:
    source, target = part.graph.edge_index.tolist()
    columns = {"source": source, "target": target, "capacity": part.graph.capacity.tolist()}
    return columns if part.edge_flow is None else columns | {"flow": part.edge_flow.tolist()}


def _visible(text: str) -> str:
    """Text as XML and UTF-8 can hold it, with a mark wherever something was replaced."""
    return _UNPRINTABLE.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd", text)


def _rows(columns: dict[str, list]) -> Iterator[dict[str, Any]]:
    """Row by row, without what is missing (an empty text reads back as the word None)."""
    for values in zip(*columns.values(), strict=True):
        yield {name: value for name, value in zip(columns, values, strict=True) if value is not None and value != ""}


def _document(part: _Part) -> nx.DiGraph:
    """The graph with the attribute names and values that graph tools understand."""
    document = nx.DiGraph()
    facts = _facts(part.graph)
    document.graph.update({name: _visible(fact) if isinstance(fact, str) else fact for name, fact in facts.items()})
    for row in _rows(_token_columns(part)):
        label = row.get("token", str(row["position"])).translate(_BREAKS)
        document.add_node(row["position"], label=label, **row)
    for row in _rows(_edge_columns(part)):
        weight = row.get("flow", row["capacity"])
        document.add_edge(row["source"], row["target"], weight=weight, capacity=row["capacity"])
    return document


def _write_table(path: Path, suffix: str, columns: dict[str, list], facts: dict[str, Any]) -> None:
    if suffix.lower() == ".parquet":
        arrow, parquet = arrow_modules()
        table = arrow.table(columns).replace_schema_metadata({"flowgraph": json.dumps(facts)})
        parquet.write_table(table, path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def arrow_modules() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        MissingExtraError: not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            "path: a name that ends in .parquet needs pyarrow, got none installed; run pip install pyarrow, or end "
            "the name in .csv"
        ) from error
    return pyarrow, pyarrow.parquet
