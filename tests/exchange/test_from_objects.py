"""What leaves for networkx, igraph and PyG comes back bit for bit; what others made is checked, value by value."""

from fractions import Fraction

import igraph
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from flowgraph import (
    FlowGraph,
    GraphError,
    InvalidInputError,
    RegionError,
    from_igraph,
    from_networkx,
    from_pyg,
    solve,
    to_igraph,
    to_networkx,
    to_pyg,
)
from tests.fixtures.convert import to_graph
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

TRIPS = {
    "networkx": lambda graph: from_networkx(to_networkx(graph)),
    "igraph": lambda graph: from_igraph(to_igraph(graph)),
    "pyg": lambda graph: from_pyg(to_pyg(graph)),
}
FACTS = ("kept_attention", "kept_flow", "throughput_error")


def assert_same(one: FlowGraph, other: FlowGraph):
    """To the last bit, and so is the flow."""
    for name in ("edge_index", "capacity", "question_mask", "reasoning_mask", "answer_mask", *FACTS):
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    assert (one.num_nodes, one.rules) == (other.num_nodes, other.rules)
    first, second = solve(one), solve(other)
    assert torch.equal(first.throughput, second.throughput)
    assert torch.equal(first.edge_flow, second.edge_flow)


@pytest.mark.parametrize("trip", TRIPS)
@given(case=flow_graphs(min_nodes=2), dtype=st.sampled_from([torch.float32, torch.float64]), pruned=st.booleans())
@settings(max_examples=25)
def test_round_trips(trip: str, case: Case, dtype: torch.dtype, pruned: bool):
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer, dtype)
    graph.capacity = graph.capacity / 3  # as many bits as the type has
    graph.rules = "rows=emission"
    if pruned:
        graph.kept_flow, graph.throughput_error = graph.kept_flow / 3, graph.throughput_error + 0.1
    assert_same(TRIPS[trip](graph), graph)
    flow = solve(graph)
    assert_same(TRIPS[trip](flow), graph)


@pytest.mark.parametrize("trip", TRIPS)
def test_capacities_of_every_size_and_type(trip: str):
    edges = torch.tensor([[0, 1, 2, 0], [1, 2, 3, 3]])
    for capacity in (
        torch.tensor([5e-324, 1e300, 0.1, 1.0], dtype=torch.float64),
        torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float16),
        torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.bfloat16),
    ):
        graph = FlowGraph.from_edges(edges, capacity, num_nodes=4, question=[0], answer=[3], reasoning=[2])
        back = TRIPS[trip](graph)
        assert back.capacity.dtype == capacity.dtype
        assert torch.equal(back.capacity, graph.capacity)
        assert back.reasoning_mask.tolist() == [False, False, True, False]


def test_a_type_that_would_round_the_capacities_is_not_applied():
    made = plain()
    made.graph.update(schema="flowgraph-graph/1", capacity_dtype="float16")
    made.edges[0, 1]["capacity"] = 0.1
    assert from_networkx(made).capacity.tolist() == [0.1, 0.5]


# Graphs that others made --------------------------------------------------------------------------------


def plain(kind=nx.DiGraph):
    """0 -> 1 -> 2, each 0.5, with regions."""
    graph = kind()
    for node, region in enumerate(("question", "reasoning", "answer")):
        graph.add_node(node, region=region)
    graph.add_edge(0, 1, capacity=0.5)
    graph.add_edge(1, 2, capacity=0.5)
    return graph


def bare() -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_weighted_edges_from([(0, 1, 0.25), (1, 3, 1), (0, 3, Fraction(1, 2)), (2, 3, np.float32(0.5))])
    return graph


def test_regions_and_the_name_of_the_capacity_may_be_given():
    graph = from_networkx(bare(), capacity="weight", question=[0], answer=slice(3, 4))
    assert graph.edge_index.tolist() == [[0, 0, 1, 2], [1, 3, 3, 3]]
    assert graph.capacity.tolist() == [0.25, 0.5, 1.0, 0.5]
    assert graph.reasoning_mask.tolist() == [False, True, True, False]
    assert graph.kept_flow.item() == 1


def test_regions_given_come_before_those_marked():
    graph = from_networkx(plain(), question=[0, 1], reasoning=[])
    assert graph.question_mask.tolist() == [True, True, False]
    assert graph.answer_mask.tolist() == [False, False, True]
    assert not graph.reasoning_mask.any()


def test_nodes_by_position_or_by_name():
    renamed = nx.relabel_nodes(plain(), {0: "c", 1: "a", 2: "b"})
    nx.set_node_attributes(renamed, {"c": 0, "a": 1.0, "b": 2}, "position")
    by_name = nx.relabel_nodes(plain(), {2: "n2", 0: "n0", 1: "n1"})
    for graph in (renamed, by_name, nx.relabel_nodes(plain(), str)):
        assert_same(from_networkx(graph), from_networkx(plain()))


def test_igraph_and_pyg_of_ones_own():
    made = igraph.Graph([(0, 1), (1, 2)], directed=True, edge_attrs={"capacity": [0.5, 0.5]})
    expected = from_networkx(plain())
    assert_same(from_igraph(made, question=[0], answer=[2]), expected)
    data = Data(edge_index=torch.tensor([[1, 0], [2, 1]]), edge_weight=torch.full((2,), 0.5).double(), num_nodes=3)
    assert_same(from_pyg(data, capacity="edge_weight", question=[0], answer=[2]), expected)
    data = Data(x=torch.ones(3, 1), edge_index=data.edge_index, capacity=data.edge_weight)
    assert_same(from_pyg(data, question=[0], answer=[2]), expected)


def edit(change):
    graph = plain()
    change(graph)
    return graph


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (plain(nx.Graph), r"graph: must be a directed networkx graph, got Graph; make a nx.DiGraph"),
        ("text", r"graph: must be a directed networkx graph, got str"),
        (edit(lambda g: g.add_edge(2, 0, capacity=1)), r"edge_index: an edge must run from an earlier .* got 2 -> 0"),
        (edit(lambda g: g.add_edge(1, 1, capacity=1)), r"edge_index: an edge must run from an earlier .* got 1 -> 1"),
        (edit(lambda g: g.add_edge(0, 2)), r"capacity of the edge 0 -> 2: must be a number, got None; convert or add"),
        (edit(lambda g: g.add_edge(0, 2, capacity="0.5")), r"capacity of the edge 0 -> 2: must be a number, got '0.5'"),
        (edit(lambda g: g.add_edge(0, 2, capacity=True)), r"must be a number, got True"),
        (edit(lambda g: g.add_edge(0, 2, capacity=1j)), r"must be a number, got 1j"),
        (edit(lambda g: g.add_edge(0, 2, capacity=float("nan"))), r"capacity: must be finite .* got nan"),
        (edit(lambda g: g.add_edge(0, 2, capacity=-1)), r"capacity: must be finite and non-negative, got -1"),
        (edit(lambda g: g.add_edge(0, 2, capacity=10**400)), r"capacity: must be finite and non-negative, got inf"),
        (edit(lambda g: g.add_node("end")), r"graph: nodes must be the tokens 0..3, got 'end'; rename them"),
        (edit(lambda g: g.add_node(7)), r"graph: nodes must be the tokens 0..3, got 7"),
        (edit(lambda g: g.add_node("n1")), r"graph: nodes must be the tokens 0..3"),
        (edit(lambda g: g.nodes[0].update(position=0)), r"position: must be on every node or none, got 1 of 3"),
        (
            edit(lambda g: nx.set_node_attributes(g, 1.5, "position")),
            r"position of node 0: must be a non-negative integer, got 1.5",
        ),
        (edit(lambda g: nx.set_node_attributes(g, 1, "position")), r"graph: nodes must be the tokens 0..2, got"),
    ],
)
def test_what_is_no_flow_graph_is_refused(graph, message: str):
    with pytest.raises(GraphError, match=message):
        from_networkx(graph)


def test_duplicate_edges_are_refused():
    twice = plain(nx.MultiDiGraph)
    twice.add_edge(0, 1, capacity=0.1)
    with pytest.raises(GraphError, match=r"edge_index: an edge may appear once, got 0 -> 1 twice"):
        from_networkx(twice)
    made = igraph.Graph([(0, 1), (0, 1)], directed=True, edge_attrs={"capacity": [0.5, 0.5]})
    with pytest.raises(GraphError, match=r"edge_index: an edge may appear once, got 0 -> 1 twice"):
        from_igraph(made, question=[0], answer=[1])


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (nx.DiGraph(), r"question: must be given or marked on the nodes, got neither; pass question= as mask"),
        (
            edit(lambda g: g.nodes[1].update(region="Answer")),
            r"region: must be one of question, .*got 'Answer' on node 1",
        ),
        (edit(lambda g: g.nodes[0].update(region="other")), r"question: must hold at least one token, got none"),
        (
            edit(lambda g: nx.set_node_attributes(g, "yes", "answer_mask")),
            r"answer_mask: must be true or false on every node, got 'yes' on node 0",
        ),
        (
            edit(lambda g: g.nodes[2].update(answer_mask=True)),
            r"answer_mask: must be true or false on every node, got None on node 0",
        ),
    ],
)
def test_regions_are_checked(graph: nx.DiGraph, message: str):
    with pytest.raises(RegionError, match=message):
        from_networkx(graph)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"schema": "flowgraph-graph/2"}, r"schema: must be 'flowgraph-graph/1', got 'flowgraph-graph/2'; update"),
        ({"schema": 1}, r"schema: must be 'flowgraph-graph/1', got 1"),
        ({"schema": "flowgraph-graph/1", "capacity_dtype": "int8"}, r"capacity_dtype, rules: must be a float type"),
        ({"schema": "flowgraph-graph/1", "capacity_dtype": []}, r"capacity_dtype, rules: must be a float type"),
        ({"schema": "flowgraph-graph/1", "rules": 3}, r"capacity_dtype, rules: must be a float type and a line"),
        ({"schema": "flowgraph-graph/1", "kept_flow": 1.5}, r"kept_flow: must be a share, got 1.5"),
        ({"schema": "flowgraph-graph/1", "throughput_error": float("inf")}, r"throughput_error: must be a share"),
        ({"schema": "flowgraph-graph/1", "kept_flow": "all"}, r"kept_flow: must be a number, got 'all'"),
    ],
)
def test_what_is_said_about_the_graph_is_checked(facts: dict, message: str):
    graph = plain()
    graph.graph.update(facts)
    with pytest.raises(InvalidInputError, match=message):
        from_networkx(graph)


def test_a_loss_that_nobody_recorded_is_not_known():
    graph = plain()
    graph.graph.update(schema="flowgraph-graph/1", kept_flow=0.5)
    back = from_networkx(graph)
    assert back.kept_flow.item() == 0.5
    assert back.kept_attention.isnan()
    assert "kept_attention" not in to_networkx(back).graph


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": None}, r"data: must hold the tensor capacity, got"),
        ({"edge_index": [[0], [1]]}, r"data: must hold the tensor edge_index"),
        ({"edge_index": torch.zeros(2, 2)}, r"edge_index: must be int64 of shape \[2, edges\], got torch.float32"),
        ({"edge_index": torch.tensor([[0, 1], [1, 5]])}, r"edge_index: must lie in 0..2, got 0..5"),
        ({"edge_index": torch.tensor([[0, 0], [1, 1]])}, r"edge_index: an edge may appear once, got 0 -> 1 twice"),
        ({"capacity": torch.ones(2).long()}, r"capacity: must be one floating point number per edge"),
        ({"capacity": torch.ones(2, 1)}, r"capacity: must be one floating point number per edge"),
        ({"capacity": torch.tensor([1.0, float("nan")])}, r"capacity: must be finite"),
        ({"question_mask": torch.tensor([1, 0, 0])}, r"question_mask: must be a bool tensor over the tokens"),
        ({"question_mask": torch.tensor([True])}, r"question: a mask must have one entry per token \(3\), got 1"),
        ({"schema": "other"}, r"schema: must be 'flowgraph-graph/1', got 'other'"),
    ],
)
def test_pyg_data_is_checked(changes: dict, message: str):
    data = to_pyg(from_networkx(plain()))
    for name, value in changes.items():
        data[name] = value
    with pytest.raises(InvalidInputError, match=message):
        from_pyg(data)


def test_other_objects_are_refused():
    data = to_pyg(from_networkx(plain()))
    with pytest.raises(GraphError, match=r"data: must be one torch_geometric.data.Data, got DataBatch"):
        from_pyg(Batch.from_data_list([data, data]))
    with pytest.raises(GraphError, match=r"graph: must be an igraph.Graph, got DiGraph"):
        from_igraph(plain())
    with pytest.raises(GraphError, match=r"data: must tell how many tokens there are"):
        from_pyg(Data(edge_index=data.edge_index, capacity=data.capacity), question=[0], answer=[2])
