"""Graphs in other people's tools keep every number and every name."""

import pytest
import torch
from torch_geometric.data import Batch

from flowgraph.errors import InvalidInputError
from flowgraph.export import to_igraph, to_networkx
from flowgraph.flowtrace import FlowTrace
from flowgraph.graph import FlowGraph
from flowgraph.solving import solve

WEIGHTS = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])
GRAPH = FlowGraph.from_dense(WEIGHTS, question=[0], answer=[3])


def test_networkx_keeps_masks_capacities_and_flow():
    bare, flow = to_networkx(GRAPH), solve(GRAPH)
    assert bare.edges[0, 2] == {"capacity": 0.25}
    assert bare.nodes[3]["answer_mask"]
    full = to_networkx(flow)
    assert full.nodes[1]["throughput"] == pytest.approx(2 / 3)
    pairs = zip(*GRAPH.edge_index.tolist(), strict=True)
    assert [full.edges[pair]["flow"] for pair in pairs] == flow.edge_flow().tolist()


def test_a_trace_brings_its_tokens_and_igraph_the_same_numbers():
    spans = torch.tensor([[k, k + 1] for k in range(4)])
    trace = FlowTrace(tuple("abcd"), torch.arange(4), "abcd", spans, torch.ones(4).bool(), GRAPH, solve(GRAPH))
    exported = to_igraph(trace)
    assert exported.vs["token"] == list("abcd")
    assert "_nx_name" not in exported.vs.attributes()
    assert sum(exported.es["flow"]) == pytest.approx(2)
    assert exported.is_dag()


def test_a_batch_is_refused():
    batch = Batch.from_data_list([GRAPH, GRAPH])
    for graph in (batch, solve(batch)):
        with pytest.raises(InvalidInputError, match=r"graph: must be one FlowGraph, Flow or FlowTrace"):
            to_networkx(graph)
