"""Export graphs, flows and traces: to networkx, igraph, PyG, GraphML, GEXF and tables.

Every format holds the graph, its regions and ``facts`` about it, which :mod:`flowgraph.exchange.from_objects` reads
back: a schema, the type of the capacities, the rules by which the graph was made, and what pruning lost.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
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
from flowgraph.display.palette import PALETTE, channels
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
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML 1.0 forbids, or rewrites (carriage return)."""
_FIRST_CONTROL_PICTURE = 0x2400
_BREAKS = str.maketrans("\t\n", "␉␊")
_COLOURS = {
    "question": PALETTE["question"].light,
    "reasoning": PALETTE["reasoning"].light,
    "answer": PALETTE["answer"].light,
    NO_REGION: PALETTE["context"].light,
}
"""Colours of GEXF nodes by region, those of the pages."""
_MIN_SIZE = 10
_SIZE_RANGE = 40
"""Sizes of GEXF nodes: the smallest, and how much throughput 1 adds."""

Exportable = FlowGraph | Flow | FlowTrace


def to_networkx(graph: Exportable, *, keep: float | None = None) -> nx.DiGraph:
    """Convert to a ``networkx.DiGraph``: nodes hold the three region masks, edges their ``capacity``.

    Given a :class:`Flow`, nodes also hold ``throughput``, ``h`` and ``g``, and edges their ``flow``; given a
    :class:`FlowTrace`, nodes also hold the ``token`` text and the ``score`` that ranks it, and the graph
    ``score_name``, ``capacity_name`` and, where there is one, ``composition``. :func:`flowgraph.from_networkx` reads it
    back.

    Args:
        graph: a graph, a solved flow or a trace.
        keep: export the backbone only: the fewest edges whose routes carry this share of the flow. All tokens stay,
            and throughput and flow stay those of the complete graph. Default: every edge.

    Raises:
        InvalidInputError: a batch; export its graphs one by one. Or ``keep`` without a flow, or outside (0, 1].
        InfeasibleFlowError: ``keep`` where there is no flow.

    Cost: linear in tokens and edges; with ``keep`` also a backbone.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
        >>> graph = FlowGraph.from_dense(weights, question=[0], answer=[2])
        >>> to_networkx(graph).edges[1, 2]
        {'capacity': 0.75}
    """
    part = _exported_part(graph, keep)
    result = pyg_to_networkx(part.graph, node_attrs=_MASKS, edge_attrs=["capacity"])
    result.graph.update(_facts(part))

    # PyG converts what the graph holds; the flow and the texts are added by token and by edge.
    for name, values in part.node_values().items():
        value_of_token = dict(enumerate(values.tolist()))
        nx.set_node_attributes(result, value_of_token, name)
    if part.edge_flow is not None:
        source, target = part.graph.edge_index.tolist()
        edges = zip(source, target, strict=True)
        flow_of_edge = dict(zip(edges, part.edge_flow.tolist(), strict=True))
        nx.set_edge_attributes(result, flow_of_edge, "flow")
    if part.trace is not None:
        nx.set_node_attributes(result, dict(enumerate(part.trace.tokens)), "token")
    return result


def to_igraph(graph: Exportable, *, keep: float | None = None) -> igraph.Graph:
    """Convert to a directed ``igraph.Graph`` whose vertex ids are the token indices; else as :func:`to_networkx`.

    Args:
        graph: see :func:`to_networkx`.
        keep: see :func:`to_networkx`.
    """
    import igraph

    result = igraph.Graph.from_networkx(to_networkx(graph, keep=keep))
    # igraph's copy of the node names, which are the vertex ids.
    del result.vs["_nx_name"]
    return result


def to_pyg(graph: Exportable, *, keep: float | None = None) -> Data:
    """Convert to a plain ``torch_geometric.data.Data``: ``edge_index``, ``capacity``, the three masks, and no ``x``.

    Given a :class:`Flow`, it also holds ``flow`` per edge and ``throughput``, ``h`` and ``g`` per token; given a
    :class:`FlowTrace`, also ``token_id``, ``score`` and the names of :func:`to_networkx`. All tensors are copies.

    Args:
        graph: see :func:`to_networkx`.
        keep: see :func:`to_networkx`.
    """
    part = _exported_part(graph, keep)

    # All tensors that the graph, the flow and the trace have, then a copy of each.
    tensors: dict[str, Tensor] = {}
    for name in ("edge_index", "capacity", *_MASKS, *LOSSES):
        tensors[name] = part.graph[name]
    if part.edge_flow is not None:
        tensors["flow"] = part.edge_flow
        tensors |= part.node_values()
    if part.trace is not None:
        tensors["token_id"] = part.trace.token_ids
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    facts: dict[str, Any] = {"rules": part.graph.rules, "schema": GRAPH_SCHEMA, **part.score_facts()}
    return Data(num_nodes=part.graph.num_nodes, **facts, **copies)


def write_graphml(graph: Exportable, path: PathLike, *, keep: float | None = None) -> None:
    """Write GraphML, atomically; :func:`flowgraph.read_graphml` reads it back.

    Nodes hold ``label``, ``position`` (the token's index), ``region`` (``other`` for none), ``token``,
    ``score``, ``throughput``, ``h`` and ``g``; edges ``weight`` (the flow; the capacity of a graph without one) and
    ``capacity``. The graph of a trace names its score, as in :func:`to_networkx`.
    What XML cannot hold is replaced visibly: control characters by their pictures (␀ to ␟), lone surrogates by
    U+FFFD. A number too large for float64 is left out.

    Args:
        graph: see :func:`to_networkx`, also for errors.
        path: where to write.
        keep: see :func:`to_networkx`.

    Raises:
        OutputError: the path cannot be written.

    Cost: the document is built in memory, about 3 kB per edge; ``keep=0.9`` writes a small share of the edges.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        nx.write_graphml_xml(_document(_exported_part(graph, keep)), file)


def write_gexf(graph: Exportable, path: PathLike, *, keep: float | None = None) -> None:
    """Write GEXF 1.2 for Gephi, atomically: as :func:`write_graphml`, tokens coloured by region, sized by throughput.

    The file's description holds the facts that :func:`flowgraph.read_gexf` needs besides nodes and edges.

    Args:
        graph: see :func:`to_networkx`, also for errors.
        path: where to write.
        keep: see :func:`to_networkx`.

    Raises:
        OutputError: the path cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        document = _document(_exported_part(graph, keep))
        for _, node in document.nodes(data=True):
            node["viz"] = _appearance(node)

        writer = GEXFWriter()
        writer.add_graph(document)
        # GEXF has no attributes of the complete graph, so the facts go into its description.
        description = SubElement(next(writer.xml.iter("meta")), "description")
        description.text = json.dumps(document.graph)
        writer.write(file)


def _appearance(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return colour and size of a node in Gephi; networkx writes what a node has under "viz"."""
    red, green, blue = channels(_COLOURS[node["region"]])
    throughput = node.get("throughput", 0.0)
    return {
        "color": {"r": red, "g": green, "b": blue},
        "size": _MIN_SIZE + _SIZE_RANGE * throughput,
    }


def write_edges(graph: Exportable, path: PathLike, *, keep: float | None = None) -> None:
    """Write the edges as a table, atomically: ``source``, ``target``, ``capacity`` and, given a flow, ``flow``.

    :func:`flowgraph.read_edges` reads it back together with the table of :func:`write_tokens`.

    Args:
        graph: see :func:`to_networkx`, also for errors.
        path: where to write: CSV, or Parquet where the name ends in ``.parquet``.
        keep: see :func:`to_networkx`.

    Raises:
        OutputError: the path cannot be written.
        MissingExtraError: Parquet without pyarrow.
    """
    with atomic_write(path) as temporary:
        part = _exported_part(graph, keep)
        _write_table(temporary, Path(path).suffix, _edge_columns(part), _facts(part))


def write_tokens(graph: Exportable, path: PathLike) -> None:
    """Write the tokens as a table, atomically.

    The columns are ``position`` and ``region``; of a trace also ``token``, with the replacements of
    :func:`write_graphml`, ``score`` and ``score_name``, what the score is and on which capacity; of a flow or trace
    also ``throughput``, ``h`` and ``g``.

    Args:
        graph: see :func:`to_networkx`, also for errors.
        path: where to write: CSV, or Parquet where the name ends in ``.parquet``.

    Raises:
        OutputError: the path cannot be written.
        MissingExtraError: Parquet without pyarrow.
    """
    with atomic_write(path) as temporary:
        part = _exported_part(graph, None)
        _write_table(temporary, Path(path).suffix, _token_columns(part), _facts(part))


@dataclass(frozen=True)
class _ExportedPart:
    """The exported edges, with the flow of the complete graph and the trace, where there is one.

    Attributes:
        graph: all tokens, and all edges or those of the backbone.
        flow: the flow on the complete graph, or None.
        edge_flow: ``[E]`` flow on the edges of ``graph``, or None.
        trace: the trace, or None.
    """

    graph: FlowGraph
    flow: Flow | None
    edge_flow: Tensor | None
    trace: FlowTrace | None

    def node_values(self) -> dict[str, Tensor]:
        """Return throughput, h and g of each token by name, and the score of a trace; nothing without a flow."""
        if self.flow is None:
            return {}
        h, g = self.flow.potentials
        values = {"throughput": self.flow.throughput, "h": h, "g": g}
        if self.trace is not None:
            values["score"] = self.trace.scores.detach()
        return values

    def score_facts(self) -> dict[str, str]:
        """Return what the score of a trace is, its capacity and its composition, by name; nothing without a trace."""
        if self.trace is None:
            return {}
        facts = {
            "score_name": self.trace.score_name,
            "capacity_name": str(self.trace.provenance.get("capacity", "unknown")),
        }
        composition = self.trace.provenance.get("composition")
        if self.trace.composed is not None and isinstance(composition, Mapping):
            facts["composition"] = str(composition.get("name"))
        return facts


def _exported_part(graph: Exportable, keep: float | None) -> _ExportedPart:
    """Check what is given, and select its backbone where ``keep`` is given."""
    trace = None
    flow = None
    complete: object = graph
    if isinstance(graph, FlowTrace):
        trace = graph
        flow = graph.flow
        complete = graph.graph
    elif isinstance(graph, Flow):
        flow = graph
        complete = graph.graph
    if not isinstance(complete, FlowGraph) or isinstance(complete, Batch):
        raise InvalidInputError(
            f"graph: must be one FlowGraph, Flow or FlowTrace, got {type(complete).__name__}; "
            "export the graphs of a batch one by one (batch.to_data_list())"
        )

    complete.validate()

    # All edges, or those of the backbone with their flow in the complete graph.
    if keep is None:
        edge_flow = None if flow is None else flow.edge_flow
        return _ExportedPart(complete, flow, edge_flow, trace)
    if flow is None:
        raise InvalidInputError(
            f"keep: needs a flow to choose edges by, got {keep!r} with a graph alone; pass solve(graph) or the trace"
        )
    strongest = backbone(flow, keep)
    return _ExportedPart(strongest.subgraph(), flow, flow.edge_flow[strongest.edge_mask], trace)


def _facts(part: _ExportedPart) -> dict[str, Any]:
    """Return the facts about a graph and the score of its tokens as plain values; an unknown loss (NaN) is left out."""
    graph = part.graph
    facts: dict[str, Any] = {
        "schema": GRAPH_SCHEMA,
        "capacity_dtype": str(graph.capacity.dtype).removeprefix("torch."),
    }
    if graph.rules:
        facts["rules"] = graph.rules
    # Attributes of a graph cannot be null in GraphML.
    for name in LOSSES:
        loss = float(graph[name])
        if math.isfinite(loss):
            facts[name] = loss
    return facts | part.score_facts()


def _token_columns(part: _ExportedPart) -> dict[str, list]:
    """Return one value per token for each column; None where a number is too large for float64."""
    # The regions are disjoint.
    num_nodes = int(part.graph.num_nodes or 0)
    regions = [NO_REGION] * num_nodes
    for name in REGIONS:
        mask = part.graph[f"{name}_mask"]
        for token in mask.nonzero().flatten().tolist():
            regions[token] = name

    columns: dict[str, list] = {"position": list(range(num_nodes)), "region": regions}
    if part.trace is not None:
        columns["token"] = [_printable(token) for token in part.trace.tokens]
    for name, values in part.node_values().items():
        columns[name] = [_finite_or_none(value) for value in values.tolist()]
    # A CSV file has no place for facts, so each row names its score.
    if part.trace is not None:
        columns["score_name"] = [_printable(part.trace.score_name)] * num_nodes
    return columns


def _finite_or_none(value: float) -> float | None:
    """Replace infinity, the value of a potential beyond float64, by a missing value."""
    if math.isfinite(value):
        return value
    return None


def _edge_columns(part: _ExportedPart) -> dict[str, list]:
    """Return one value per edge for each column."""
    source, target = part.graph.edge_index.tolist()
    columns = {"source": source, "target": target, "capacity": part.graph.capacity.tolist()}
    if part.edge_flow is not None:
        columns["flow"] = part.edge_flow.tolist()
    return columns


def _printable(text: str) -> str:
    """Replace the characters that XML or UTF-8 cannot hold by visible ones."""
    return _UNPRINTABLE.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    """Return the picture of a control character, or the replacement character."""
    character = match[0]
    if character < " ":
        return chr(_FIRST_CONTROL_PICTURE + ord(character))
    return "\ufffd"


def _rows(columns: dict[str, list]) -> Iterator[dict[str, Any]]:
    """Yield row by row, without missing values and empty texts, which would read back as the word None."""
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        yield {name: value for name, value in row.items() if value is not None and value != ""}


def _document(part: _ExportedPart) -> nx.DiGraph:
    """Build the graph with the attribute names and values that graph tools understand."""
    document = nx.DiGraph()
    for name, fact in _facts(part).items():
        document.graph[name] = _printable(fact) if isinstance(fact, str) else fact
    columns = _token_columns(part)
    # The graph's own attributes name the score once.
    columns.pop("score_name", None)
    for row in _rows(columns):
        position = row["position"]
        # Graph tools show the label in one line.
        label = row.get("token", str(position))
        document.add_node(position, label=label.translate(_BREAKS), **row)
    for row in _rows(_edge_columns(part)):
        weight = row.get("flow", row["capacity"])
        document.add_edge(row["source"], row["target"], weight=weight, capacity=row["capacity"])
    return document


def _write_table(path: Path, suffix: str, columns: dict[str, list], facts: dict[str, Any]) -> None:
    """Write columns as Parquet, with the facts in its metadata, or as CSV, which has no place for them."""
    if suffix.lower() == ".parquet":
        arrow, parquet = arrow_modules()
        table = arrow.table(columns)
        metadata = {"flowgraph": json.dumps(facts)}
        parquet.write_table(table.replace_schema_metadata(metadata), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def arrow_modules() -> tuple[Any, Any]:
    """Import ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        MissingExtraError: pyarrow is not installed.
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
