"""FlowGraph: construction, invariants, and PyG's own tools on it."""

import pytest
import torch
from hypothesis import given, settings
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader
from torch_geometric.utils import to_networkx

from flowgraph import FlowGraph, GraphError, RegionError
from tests.fixtures.convert import to_graph
from tests.strategies import FlowGraph as Case
from tests.strategies import flow_graphs

DIAMOND = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 0.5, 0.5, 0]])


def diamond() -> FlowGraph:
    return FlowGraph.from_dense(DIAMOND, question=[0], answer=[3])


@given(case=flow_graphs(max_nodes=12, min_nodes=2))
@settings(max_examples=50, deadline=None)
def test_any_edge_order_gives_the_same_graph(case: Case):
    graph = to_graph(case.num_nodes, case.edges, case.question, case.answer)
    shuffled = to_graph(case.num_nodes, case.edges[::-1], case.question, case.answer)
    assert torch.equal(graph.edge_index, shuffled.edge_index)
    assert torch.equal(graph.capacity, shuffled.capacity)
    assert graph.is_sorted(sort_by_row=False)
    dense = torch.zeros(case.num_nodes, case.num_nodes, dtype=torch.float64)
    for s, t, w in case.edges:
        dense[t, s] = float(w)
    again = FlowGraph.from_dense(dense, question=case.question, answer=case.answer)
    assert torch.equal(again.edge_index, graph.edge_index)
    assert torch.equal(again.capacity, graph.capacity)


def test_the_diagonal_is_ignored_and_the_default_reasoning_is_between():
    graph = FlowGraph.from_dense(DIAMOND + torch.eye(4), question=[0], answer=slice(3, 4))
    assert torch.equal(graph.edge_index, diamond().edge_index)
    assert graph.reasoning_mask.tolist() == [False, True, True, False]


def test_batches_loaders_devices_and_networkx():
    graph = diamond()
    batch = Batch.from_data_list([graph, graph])
    assert batch.edge_index[:, 4:].tolist() == (graph.edge_index + 4).tolist()
    assert batch.kept_flow.shape == (2,)
    restored = batch.to_data_list()[1]
    assert isinstance(restored, FlowGraph)
    restored.validate()
    assert torch.equal(restored.edge_index, graph.edge_index)
    assert next(iter(DataLoader([graph] * 4, batch_size=4))).num_graphs == 4
    assert graph.to("cpu").validate()
    assert graph.is_sorted(sort_by_row=False)
    exported = to_networkx(graph, edge_attrs=["capacity"], node_attrs=["answer_mask"])
    assert exported.edges[0, 1]["capacity"] == 0.5
    assert exported.nodes[3]["answer_mask"]
    assert graph.clone().validate()
    assert graph.num_nodes == 4


def test_isolated_tokens_count():
    graph = FlowGraph.from_edges(torch.tensor([[0], [1]]), torch.ones(1), num_nodes=5, question=[0], answer=[1])
    assert graph.num_nodes == 5
    assert Batch.from_data_list([graph, graph]).num_nodes == 10


def test_zero_capacities_are_no_edges():
    graph = FlowGraph.from_edges(
        torch.tensor([[0, 0], [1, 2]]), torch.tensor([0.0, 1.0]), num_nodes=3, question=[0], answer=[2]
    )
    assert graph.edge_index.tolist() == [[0], [2]]


def edges(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs).T.contiguous()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("pairs", "weights", "message"),
    [
        (edges((1, 0)), [1.0], r"edge_index: an edge must run from an earlier to a later token, got 1 -> 0"),
        (edges((1, 1)), [1.0], r"edge_index: an edge must run from an earlier to a later token, got 1 -> 1"),
        (edges((0, 1), (0, 1)), [1.0, 1.0], r"edge_index: an edge may appear once, got 0 -> 1 twice"),
        (edges((0, 3)), [1.0], r"edge_index: must lie in 0..2, got 0..3"),
        (edges((0, 1)), [float("nan")], r"capacity: must be finite and non-negative, got nan on the edge 0 -> 1"),
        (edges((0, 1)), [float("inf")], r"capacity: must be finite and non-negative, got inf"),
        (edges((0, 1)), [-1.0], r"capacity: must be finite and non-negative, got -1.0 on the edge 0 -> 1"),
        (edges((0, 1)), [1.0, 1.0], r"capacity: must be one floating point number per edge \(1\)"),
        (edges((0, 1)).int(), [1.0], r"edge_index: must be int64 of shape \[2, edges\], got torch.int32"),
        (edges((0, 1)).T.reshape(-1), [1.0], r"edge_index: must be int64 of shape \[2, edges\]"),
    ],
)
def test_bad_edges(pairs: torch.Tensor, weights: list[float], message: str):
    with pytest.raises(GraphError, match=message):
        FlowGraph.from_edges(pairs, torch.tensor(weights), num_nodes=3, question=[0], answer=[2])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("question", "answer", "reasoning", "message"),
    [
        ([], [2], None, r"question: must hold at least one token, got none"),
        ([0], [], None, r"answer: must hold at least one token, got none"),
        ([0, 1], [1], None, r"question, answer: regions must be disjoint, got token 1 in both"),
        ([0], [2], [2], r"reasoning, answer: regions must be disjoint, got token 2 in both"),
        ([0], [3], None, r"answer: token indices must lie in 0..2, got 3"),
        ([-1], [2], None, r"question: token indices must lie in 0..2, got -1"),
        ([True, False], [2], None, r"question: a mask must have one entry per token \(3\), got 2"),
        (torch.tensor([0.5]), [2], None, r"question: must be a bool mask or integer indices, got torch.float32"),
        (torch.ones(1, 3).bool(), [2], None, r"question: must be one-dimensional, got shape \(1, 3\)"),
    ],
)
def test_bad_regions(question, answer, reasoning, message: str):
    with pytest.raises(RegionError, match=message):
        FlowGraph.from_edges(
            edges((0, 1)), torch.ones(1), num_nodes=3, question=question, answer=answer, reasoning=reasoning
        )


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3), r"capacity: must be a square matrix \[tokens, tokens\], got shape \(3,\)"),
        (torch.ones(2, 3, 3), r"capacity: must be a square matrix"),
        (torch.ones(3, 3), r"capacity: must be causal \(zero above the diagonal\), got 1 at \[0, 1\]"),
        (torch.ones(3, 3).long(), r"capacity: must be floating point, got torch.int64"),
        (torch.full((3, 3), torch.nan).tril(), r"capacity: must be finite and non-negative, got nan"),
    ],
)
def test_bad_matrices(matrix: torch.Tensor, message: str):
    with pytest.raises(GraphError, match=message):
        FlowGraph.from_dense(matrix, question=[0], answer=[2])


def test_validate_finds_what_was_changed_after_construction():
    graph = diamond()
    graph.edge_index = graph.edge_index.flip(1)
    graph.capacity = graph.capacity.flip(0)
    assert not graph.validate(raise_on_error=False)
    with pytest.raises(GraphError, match="must be sorted by"):
        graph.validate()
    graph = diamond()
    graph.question_mask = graph.question_mask[:-1]
    with pytest.raises(RegionError, match="question: must be a bool mask over 4 tokens"):
        graph.validate()
