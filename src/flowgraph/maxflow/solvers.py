"""Max-flow solvers: igraph, and networkx as a cross-check, behind one function type.

A solver sees the tokens 0..T-1, a virtual source T and a virtual sink T + 1. Its arcs are the edges of the graph, then
one arc from the virtual source to each token, then one arc from each token to the virtual sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import igraph
import numpy as np
from numpy.typing import NDArray

from flowgraph.maxflow.capacity_arrays import CapacityArrays

Solver = Callable[[NDArray, NDArray, NDArray], tuple[NDArray, NDArray]]
"""Called with the capacity of each arc ``[E + 2 T]`` and the masks of source and sink tokens ``[T]``.

Returns the flow on each edge ``[E]`` and the source side of a min cut ``[T]``.
"""

_INTEGER_BITS = 900
"""Bits of the largest capacity as an integer, so that capacities 2**900 apart stay positive."""


def igraph_solver(arrays: CapacityArrays) -> Solver:
    """Build the graph once; solve by igraph's push-relabel for any capacities and terminals."""
    num_tokens = arrays.num_tokens
    num_edges = arrays.capacity.size
    virtual_source = num_tokens
    virtual_sink = num_tokens + 1

    # One arc from the virtual source to every token and from every token to the virtual sink: capacities of 0 close
    # those that a call does not use, so the graph is built once.
    tokens = np.arange(num_tokens)
    tails = np.concatenate([arrays.tail, np.full(num_tokens, virtual_source), tokens])
    heads = np.concatenate([arrays.head, tokens, np.full(num_tokens, virtual_sink)])
    arcs_of_graph = np.column_stack([tails, heads])
    graph = igraph.Graph(n=num_tokens + 2, edges=arcs_of_graph, directed=True)

    def solver(arcs: NDArray, sources: NDArray, sinks: NDArray) -> tuple[NDArray, NDArray]:
        solution = graph.maxflow(virtual_source, virtual_sink, capacity=arcs.tolist())
        flow = np.array(solution.flow[:num_edges], dtype=np.float64)
        # The first part of the cut is the side of the virtual source.
        source_side = np.zeros(num_tokens + 2, dtype=bool)
        source_side[solution.partition[0]] = True
        return flow, source_side[:num_tokens]

    return solver


def networkx_solver(arrays: CapacityArrays) -> Solver:
    """Solve by networkx's push-relabel on integers: on floats it can lose track of which edges are full."""
    import networkx as nx
    from networkx.algorithms.flow import preflow_push

    num_tokens = arrays.num_tokens
    virtual_source = num_tokens
    virtual_sink = num_tokens + 1
    # The edges of the graph, then one arc per token from the virtual source, then one to the virtual sink.
    edges = list(zip(arrays.tail.tolist(), arrays.head.tolist(), strict=True))
    source_arcs = [(virtual_source, v) for v in range(num_tokens)]
    sink_arcs = [(v, virtual_sink) for v in range(num_tokens)]
    ends = edges + source_arcs + sink_arcs

    def solver(arcs: NDArray, sources: NDArray, sinks: NDArray) -> tuple[NDArray, NDArray]:
        # Integers of 900 bits: one power of two for all capacities, so nothing is rounded.
        largest_exponent = math.frexp(arcs.max(initial=0.0))[1]
        shift = _INTEGER_BITS - largest_exponent
        integer_arcs = np.ldexp(arcs, shift)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(num_tokens + 2))
        for (s, t), arc in zip(ends, integer_arcs, strict=True):
            capacity = int(arc)
            if capacity > 0:
                graph.add_edge(s, t, capacity=capacity)
        residual = preflow_push(graph, virtual_source, virtual_sink)

        # Back to the units of the capacities, in the order of the edges.
        flow = np.zeros(len(edges), dtype=np.float64)
        for position, (s, t) in enumerate(edges):
            if residual.has_edge(s, t):
                flow[position] = math.ldexp(residual[s][t]["flow"], -shift)

        # The sink side of a min cut: the tokens that reach the sink over residual edges that are not full.
        full = []
        for s, t, arc in residual.edges(data=True):
            if arc["flow"] == arc["capacity"]:
                full.append((s, t))
        residual.remove_edges_from(full)
        source_side = np.ones(num_tokens + 2, dtype=bool)
        source_side[virtual_sink] = False
        source_side[list(nx.ancestors(residual, virtual_sink))] = False
        return flow, source_side[:num_tokens]

    return solver
