"""Attention rows to edges: every convention against the reference, pruning by flow, bad attention."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgraph.collecting import collect_edges, edges_kept
from flowgraph.edges import EdgeRows, EdgeRules, MatrixRows
from flowgraph.errors import GraphError, InvalidInputError, MemoryLimitError
from flowgraph.graph import FlowGraph
from flowgraph.routes import kept_share
from flowgraph.solving import solve
from tests.reference.edges import edges_from_attention
from tests.strategies import attention_matrices

RULES = [
    EdgeRules(*choice)
    for choice in itertools.product(
        ("emission", "emission_all", "literal"), ("drop", "renormalize"), ("exclude", "keep")
    )
]


def random_attention(tokens: int, sharpness: float = 2.0, seed: int = 0) -> torch.Tensor:
    logits = sharpness * torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf), -1)


@pytest.mark.parametrize("rules", RULES, ids=str)
@given(matrix=attention_matrices(max_tokens=8, min_tokens=2), data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_convention_against_the_reference(rules: EdgeRules, matrix: list, data: st.DataObject):
    size = len(matrix)
    generated = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    slow = edges_from_attention(matrix, generated, rules.rows, rules.self_attention, rules.first_token)
    dense = torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64)
    rows = EdgeRows(MatrixRows(dense[None]), rules, torch.tensor([generated]), torch.zeros(1).long())
    for start, stop in {(0, size), (0, 1), (1, size), (size // 2, size)}:
        block = rows.block(start, stop)[0]
        exact = [[float(slow.get((s, t), 0)) for s in range(stop)] for t in range(start, stop)]
        assert torch.allclose(block, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)


def test_blocks_are_parts_of_the_whole():
    attention, generated = random_attention(300), torch.arange(300) > 40
    rows = EdgeRows(MatrixRows(attention[None]), EdgeRules(), generated[None], torch.zeros(1).long())
    whole = rows.block(0, 300)
    for start, stop in ((0, 128), (127, 129), (128, 256), (299, 300)):
        torch.testing.assert_close(rows.block(start, stop), whole[:, start:stop, :stop], rtol=1e-6, atol=0)


def test_emission_gives_a_generated_token_the_row_that_produced_it():
    attention = random_attention(6)
    graph = FlowGraph.from_rows(
        attention, question=[0, 1], answer=[5], rules=EdgeRules(first_token="keep"), generated=slice(3, 6)
    )
    into = {t: graph.capacity[graph.edge_index[1] == t] for t in range(6)}
    assert torch.allclose(into[4], attention[3, :4])
    assert into[4].sum().item() == pytest.approx(1)
    assert torch.allclose(into[2], attention[2, :2])


def test_presets_and_the_line_of_provenance():
    assert EdgeRules.preset("paper") == EdgeRules("literal", "drop", "keep")
    assert EdgeRules.preset("paper", rows="emission", first_token=None) == EdgeRules("emission", "drop", "keep")
    graph = FlowGraph.from_rows(random_attention(5), question=[1], answer=[4], preset="paper")
    assert graph.rules == "rows=literal, self_attention=drop, first_token=keep"


def test_keeping_edges_by_flow_records_what_it_lost():
    attention = random_attention(200, sharpness=4)
    whole = FlowGraph.from_rows(attention, question=range(1, 40), answer=[199])
    flow = solve(whole)
    limited = FlowGraph.from_rows(attention, question=range(1, 40), answer=[199], max_edges=2000)
    assert limited.num_edges == 2000
    strongest = torch.topk(flow.edge_flow(), 2000).indices.sort().values
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


def test_rows_of_several_sequences_are_no_graph():
    with pytest.raises(GraphError, match=r"rows: must be those of one sequence, got a batch of 2; .* solve_rows"):
        FlowGraph.from_rows(random_attention(5).expand(2, 5, 5), question=[1], answer=[4])


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


def broken(row: int, column: int, value: float) -> torch.Tensor:
    attention = random_attention(300)
    attention[row, column] = value
    return attention


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (broken(200, 3, torch.nan), r"attention: must be finite, got NaN or infinity in row 200"),
        (broken(200, 3, -0.5), r"attention: must be non-negative, got -0.5 at \[200, 3\]"),
        (broken(200, 250, 0.1), r"attention: must be causal \(zero above the diagonal\), got 0.1 at \[200, 250\]"),
        (broken(200, 3, 5.0), r"attention: a row must sum to at most 1, got [56].* in row 200"),
        (torch.ones(3, 4), r"rows: must be a square matrix \[tokens, tokens\] or a batch of them, got shape \(3, 4\)"),
        (torch.ones(3, 3).long(), r"rows: must be floating point, got torch.int64"),
    ],
)
@pytest.mark.parametrize("max_edges", ["all", 500])
def test_bad_attention(attention: torch.Tensor, message: str, max_edges: int | str):
    with pytest.raises(GraphError, match=message):
        FlowGraph.from_rows(attention, question=[1], answer=[2], max_edges=max_edges)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EdgeRules(rows="mixed"), r"rows: must be one of 'emission', 'emission_all', 'literal', got 'mixed'"),  # type: ignore[arg-type]
        (lambda: EdgeRules(self_attention="keep"), r"self_attention: must be one of 'drop', 'renormalize', got 'keep'"),  # type: ignore[arg-type]
        (lambda: EdgeRules.preset("mine"), r"preset: must be one of 'default', 'paper', got 'mine'"),
    ],
)
def test_bad_rules(make, message: str):
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_rows_below_one_are_attention_too():
    """Learned sinks take mass that no token holds: excluding sinks gives it back, keeping them does not."""
    attention = 0.5 * random_attention(5)
    masks = {"generated": torch.zeros(5).bool(), "question": torch.arange(5) == 1, "answer": torch.arange(5) == 4}
    kept = collect_edges(attention, EdgeRules("literal", "renormalize", "keep"), **masks)
    assert kept.capacity[kept.edge_index[1] == 4].sum().item() == pytest.approx(0.5)
    excluded = collect_edges(attention, EdgeRules("literal", "renormalize", "exclude"), **masks)
    assert excluded.capacity[excluded.edge_index[1] == 4].sum().item() == pytest.approx(1)
