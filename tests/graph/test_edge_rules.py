"""Attention rows to edges: every convention against the reference, pruning by flow, bad attention."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgraph import EdgeRules, FlowGraph, GraphError, InvalidInputError
from flowgraph.graph.edge_rules import EdgeRows
from flowgraph.propagation.row_sources import MatrixRows
from tests.fixtures.convert import random_attention
from tests.reference.edges import edges_from_attention
from tests.strategies import attention_matrices

RULES = [
    EdgeRules(*choice)
    for choice in itertools.product(
        ("emission", "emission_all", "literal"), ("drop", "renormalize"), ("exclude", "keep")
    )
]


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


def test_blocks_are_parts_of_the_matrix():
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


def broken(row: int, column: int, value: float) -> torch.Tensor:
    attention = random_attention(300)
    attention[row, column] = value
    return attention


@pytest.mark.unchecked
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


@pytest.mark.unchecked
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
