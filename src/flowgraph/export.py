"""Take the graph to the tools people already use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx
from torch_geometric.data import Batch
from torch_geometric.utils import to_networkx as pyg_to_networkx

from flowgraph.errors import InvalidInputError
from flowgraph.flow import Flow
from flowgraph.flowtrace import FlowTrace
from flowgraph.graph import FlowGraph

if TYPE_CHECKING:
    import igraph


def to_networkx(graph: FlowGraph | Flow | FlowTrace) -> nx.DiGraph:
    """A ``networkx.DiGraph``: nodes carry the three region masks, edges their ``capacity``.

    Given a :class:`Flow`, nodes carry ``throughput``, ``h`` and ``g`` too, and edges their ``flow``; given a
    :class:`FlowTrace`, nodes carry the ``token`` text as well.

    Raises:
        InvalidInputError: a batch; export its graphs one by one.
    """
    trace = graph if isinstance(graph, FlowTrace) else None
    flow = trace.flow if trace else graph if isinstance(graph, Flow) else None
    whole = flow.graph if flow else graph
    if not isinstance(whole, FlowGraph) or isinstance(whole, Batch):
        raise InvalidInputError(
            f"graph: must be one FlowGraph, Flow or FlowTrace, got {type(whole).__name__}; "
            "export the graphs of a batch one by one (batch.to_data_list())"
        )
    result = pyg_to_networkx(
        whole, node_attrs=["question_mask", "reasoning_mask", "answer_mask"], edge_attrs=["capacity"]
    )
    if flow:
        h, g = flow.potentials()
        for name, values in (("throughput", flow.throughput), ("h", h), ("g", g)):
            nx.set_node_attributes(result, dict(enumerate(values.tolist())), name)
        if trace:
            nx.set_node_attributes(result, dict(enumerate(trace.tokens)), "token")
        pairs = zip(*whole.edge_index.tolist(), strict=True)
        nx.set_edge_attributes(result, dict(zip(pairs, flow.edge_flow().tolist(), strict=True)), "flow")
    return result


def to_igraph(graph: FlowGraph | Flow | FlowTrace) -> igraph.Graph:
    """The same as :func:`to_networkx` as a directed ``igraph.Graph``."""
    import igraph

    result = igraph.Graph.from_networkx(to_networkx(graph))
    del result.vs["_nx_name"]  # igraph's own bookkeeping; vertex ids are token indices already
    return result
