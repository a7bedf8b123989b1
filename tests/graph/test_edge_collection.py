"""Rows to edges: everything, or the strongest by flow with what that loses; rows that are remembered."""

import pytest
import torch

from flowgraph import EdgeRules, FlowGraph, GraphError, InvalidInputError, MemoryLimitError, solve
from flowgraph.analysis.backbone import kept_share
from flowgraph.graph.edge_collection import collect_edges, edges_kept
from flowgraph.propagation.row_sources import KeptRows, MatrixRows
from tests.fixtures.convert import random_attention


def test_keeping_edges_by_flow_records_what_it_lost():
    attention = random_attention(200, sharpness=4)
    whole = FlowGraph.from_rows(attention, question=range(1, 40), answer=[199])
    flow = solve(whole)
    limited = FlowGraph.from_rows(attention, question=range(1, 40), answer=[199], max_edges=2000)
    assert limited.num_edges == 2000
    strongest = torch.topk(flow.edge_flow, 2000).indices.sort().values
    assert torch.equal(limited.edge_index, whole.edge_index[:, strongest])
    assert torch.equal(limited.capacity, whole.capacity[strongest])
    assert limited.kept_flow.item() == pytest.approx(kept_share(flow, strongest), rel=1e-12)
    assert limited.kept_attention.item() == pytest.approx(
        (limited.capacity.sum() / whole.capacity.sum()).item(), rel=1e-5
    )
    assert 0 < limited.kept_flow.item() < 1
    change = (solve(limited).throughput - flow.throughput).abs().max()
    assert limited.throughput_error.item() == pytest.approx(change.item(), rel=1e-9)
    assert 0 < change < 0.2
    assert whole.throughput_error.item() == 0
    assert whole.kept_flow.item() == whole.kept_attention.item() == 1


def test_a_limit_on_a_graph_without_flow_keeps_nothing():
    attention = torch.eye(6)
    graph = FlowGraph.from_rows(attention, question=[1], answer=[5], rules=EdgeRules(rows="literal"), max_edges=3)
    assert graph.num_edges == 0
    assert not bool(solve(graph).feasible)


@pytest.mark.unchecked
def test_rows_of_several_sequences_are_no_graph():
    with pytest.raises(GraphError, match=r"rows: must be those of one sequence, got a batch of 2; .* solve_rows"):
        FlowGraph.from_rows(random_attention(5).expand(2, 5, 5), question=[1], answer=[4])


@pytest.mark.unchecked
def test_limits():
    assert edges_kept("all", 100) == edges_kept("auto", 100) == 4950
    assert edges_kept("auto", 4096) == 64 * 4096
    assert edges_kept(10**9, 100) == 4950
    for value in (0, -3, True, "some", 2.5):
        with pytest.raises(InvalidInputError, match="max_edges: must be 'auto', 'all' or a positive number, got"):
            edges_kept(value, 10)  # type: ignore[arg-type]


def test_memory_is_estimated_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device: 1000)
    with pytest.raises(
        MemoryLimitError, match=r"edges of 50 tokens: would need about .* GiB, got .* free on cpu; pass max_edges="
    ):
        FlowGraph.from_rows(random_attention(50), question=[1], answer=[49])


def test_rows_below_one_are_attention_too():
    """Learned sinks take mass that no token holds: excluding sinks gives it back, keeping them does not."""
    attention = 0.5 * random_attention(5)
    masks = {"generated": torch.zeros(5).bool(), "question": torch.arange(5) == 1, "answer": torch.arange(5) == 4}
    kept = collect_edges(attention, EdgeRules("literal", "renormalize", "keep"), **masks)
    assert kept.capacity[kept.edge_index[1] == 4].sum().item() == pytest.approx(0.5)
    excluded = collect_edges(attention, EdgeRules("literal", "renormalize", "exclude"), **masks)
    assert excluded.capacity[excluded.edge_index[1] == 4].sum().item() == pytest.approx(1)


def test_pruning_where_the_potential_leaves_float64():
    """A chain of links of 1e-7 beside the first token: the strongest edges are chosen in balanced units."""
    size = 70
    attention = torch.zeros(size, size, dtype=torch.float64)
    attention[:, 0], attention[0, 0] = 1 - 1e-7, 1.0
    attention[1:].diagonal().fill_(1e-7)
    attention[1, 0] = 1.0
    rules = EdgeRules("literal", "drop", "keep")
    options = {"question": [1, 2], "answer": [size - 1], "rules": rules}
    whole = FlowGraph.from_rows(attention, **options)
    pruned = FlowGraph.from_rows(attention, max_edges=size, **options)
    flow = solve(whole)
    assert flow.exponent.any()
    strongest = (flow.edge_flow > 0).nonzero().flatten()
    assert torch.equal(pruned.edge_index, whole.edge_index[:, strongest])
    assert torch.equal(pruned.capacity, whole.capacity[strongest])
    assert pruned.kept_flow.item() == pytest.approx(1, rel=1e-12)
    assert pruned.throughput_error.item() < 1e-12


class CountedRows(MatrixRows):
    """A matrix that counts how often each of its blocks is read."""

    def block(self, start: int, stop: int) -> torch.Tensor:
        reads[start] = reads.get(start, 0) + 1
        return super().block(start, stop)


reads: dict[int, int] = {}


def test_rows_are_remembered_as_long_as_they_fit():
    reads.clear()
    rows = KeptRows(CountedRows(random_attention(512)[None]), budget=4 * 256 * 257 // 2)
    for start in (0, 128, 256, 384) * 3:
        stop = start + 128
        assert torch.equal(rows.block(start, stop)[0], random_attention(512)[start:stop, :stop])
    assert reads == {0: 1, 128: 1, 256: 3, 384: 3}


def test_pruned_rows_are_read_twice_and_short_ones_once(monkeypatch: pytest.MonkeyPatch):
    attention, masks = random_attention(300), {"question": [1, 2, 3], "answer": [299]}
    for budget, wanted in ((2**28, 1), (0, 2)):
        reads.clear()
        monkeypatch.setattr(
            "flowgraph.graph.edge_collection.KeptRows", lambda rows, budget=budget: KeptRows(rows, budget)
        )
        FlowGraph.from_rows(CountedRows(attention[None]), max_edges=500, **masks)
        reads.pop(0)  # also read to see whether it is one sequence
        assert set(reads.values()) == {wanted}
