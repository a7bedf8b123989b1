"""Take the graph to the tools people already use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx
from torch_geometric.utils import to_networkx as pyg_to_networkx

from flowgraph.flow import Flow
from flowgraph.graph import FlowGraph

if TYPE_CHECKING:
    import igraph


def to_networkx(graph: FlowGraph | Flow) -> nx.DiGraph:
    """A ``networkx.DiGraph``: nodes carry the three region masks, edges their ``capacity``.

    Given a :class:`Flow`, nodes carry ``throughput``, ``h`` and ``g`` too, and edges their ``flow``.
    """
    flow, whole = (graph, graph.graph) if isinstance(graph, Flow) else (None, graph)
    result = pyg_to_networkx(
        whole, node_attrs=["question_mask", "reasoning_mask", "answer_mask"], edge_attrs=["capacity"]
    )
    if flow:
        for name, values in (("throughput", flow.throughput), ("h", flow.h), ("g", flow.g)):
            nx.set_node_attributes(result, dict(enumerate(values.tolist())), name)
        pairs = zip(*whole.edge_index.tolist(), strict=True)
        nx.set_edge_attributes(result, dict(zip(pairs, flow.edge_flow().tolist(), strict=True)), "flow")
    return result


def to_igraph(graph: FlowGraph | Flow) -> igraph.Graph:
    """The same as :func:`to_networkx` as a directed ``igraph.Graph``."""
    import igraph

    return igraph.Graph.from_networkx(to_networkx(graph))
