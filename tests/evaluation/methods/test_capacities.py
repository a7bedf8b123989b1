"""Capacities and compositions as methods give what a trace gives, from one capture."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import flowgraph as fg
from flowgraph.evaluation.catalogue import find_method
from tests.fixtures.subjects import explained, subject
from tests.fixtures.tiny import tiny

NON_NEGATIVE = [name for name in fg.capacity_names() if name not in ("relevance", "gradient")]
COMPOSITIONS = ("flowtracer", "cage", "vtrace", "hops", "one_hop", "katz", "rollout")


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject()


def traced(case: fg.Subject, capacity: str, **options: Any) -> Any:
    """Trace the same tokens through the public function alone."""
    return fg.trace(
        *tiny(),
        input_ids=case.token_ids[None],
        prompt_length=case.prompt_length,
        question=case.question,
        answer=case.answer,
        reasoning=case.reasoning,
        capacity=capacity,
        max_edges="all",
        **options,
    )


def matrix_of(graph: fg.FlowGraph, values: torch.Tensor) -> torch.Tensor:
    matrix = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    for edge, (source, target) in enumerate(graph.edge_index.T.tolist()):
        matrix[target, source] = values[edge]
    return matrix


@pytest.mark.parametrize("capacity", NON_NEGATIVE)
def test_a_capacity_has_the_scores_of_its_trace_and_the_flow_of_its_edges(shared: fg.Subject, capacity: str):
    found = explained(capacity, shared)
    made = traced(shared, capacity)
    torch.testing.assert_close(found.tokens, made.scores, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.edges, matrix_of(made.graph, made.flow.edge_flow), rtol=1e-12, atol=0)


@pytest.mark.parametrize("capacity", ["vtrace_share", "attention"])
def test_f_and_h_are_sums_of_their_edges(shared: fg.Subject, capacity: str):
    made = traced(shared, capacity)
    inner = ~shared.answer
    for score, wanted in (("f", made.throughput), ("h", made.potential)):
        found = explained(f"{capacity}:{score}", shared)
        assert torch.equal(found.tokens, wanted)
        # What a token passes on is all that it has, except at the answer, which absorbs.
        torch.testing.assert_close(found.edges.sum(0)[inner], wanted[inner], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("capacity", ["sharp", "attention"])
def test_a_composition_has_the_scores_of_its_trace(shared: fg.Subject, capacity: str, composition: str):
    found = explained(f"{capacity}:{composition}", shared)
    wanted = traced(shared, capacity, composition=composition)
    torch.testing.assert_close(found.tokens, wanted.scores, rtol=1e-12, atol=0)
    assert bool(found.edges.numel()) == (composition in ("flowtracer", "cage", "vtrace"))


def test_scores_of_one_capacity_share_its_capture():
    case = subject()
    passes = []
    with_hook = case.model.register_forward_hook(lambda *_: passes.append(1))
    for name in ("sharp", "sharp:f", "sharp:h", "sharp:cage", "sharp:vtrace", "sharp:hops", "sharp:katz"):
        explained(name, case)
    with_hook.remove()
    assert len(passes) == 1


@pytest.mark.parametrize("chain", [False, True])
def test_relevance_is_that_of_a_trace_in_units_of_the_target(shared: fg.Subject, chain: bool):
    with pytest.warns(UserWarning, match="should be what the model prefers"):
        wanted = traced(shared, "relevance", capacity_options={"hops": 6 if chain else 0})
    total = wanted.flow.total
    assert total < 0  # a share would have the opposite sign
    name = "relevance:chain" if chain else "relevance"
    found = explained(name, shared)
    scale = float(found.tokens.abs().max())
    torch.testing.assert_close(found.tokens, wanted.scores * total, rtol=1e-5, atol=1e-5 * scale)
    absorbed = explained(f"{name}:absorbed", shared)
    torch.testing.assert_close(absorbed.tokens, wanted.flow.absorbed * total, rtol=1e-5, atol=1e-5 * scale)


def test_edges_of_relevance_stand_where_an_intervention_cuts_them(shared: fg.Subject):
    model = tiny()[0]
    rows = fg.capture(model, shared.token_ids, capacity="relevance", answer=shared.answer, target="margin")
    edges = explained("relevance", shared).edges
    for source, target in [(5, 20), (10, 33), (31, 40), (40, 43)]:
        row, column = fg.attention_cell(shared.base, source, target)
        assert edges[target, source] == pytest.approx(float(rows.dense()[0, row, column]), rel=1e-6)


def test_the_gradient_predicts_weak_cuts_of_all_edges_out_of_a_token(shared: fg.Subject):
    model = tiny()[0]
    found = explained("gradient", shared)
    rows = fg.capture(model, shared.token_ids, capacity="gradient", answer=shared.answer, target="logprob")
    matrix = rows.dense()[0].double()
    torch.testing.assert_close(found.tokens, matrix.sum(0), rtol=1e-6, atol=1e-9)
    for source, target in [(5, 20), (10, 33), (31, 40), (40, 43)]:
        row, column = fg.attention_cell(shared.base, source, target)
        assert found.edges[target, source] == pytest.approx(float(matrix[row, column]), rel=1e-6)
    assert bool((found.tokens < 0).any())


def test_the_target_is_part_of_the_name(shared: fg.Subject):
    margin = explained("gradient:margin", shared)
    logprob = explained("gradient:logprob", shared)
    default = explained("gradient", shared)
    assert torch.equal(default.tokens, logprob.tokens)
    assert not torch.allclose(margin.tokens, logprob.tokens)
    wanted = traced(shared, "gradient_positive", capacity_options={"target": "logprob"})
    assert torch.equal(explained("gradient_positive:logprob", shared).tokens, wanted.scores)


def test_one_hop_of_a_signed_capacity(shared: fg.Subject):
    rows = fg.capture(tiny()[0], shared.token_ids, capacity="gradient", answer=shared.answer, target="logprob")
    wanted = fg.compose(
        rows, "one_hop", question=shared.question, answer=shared.answer, generated=shared.base.generated
    )
    assert torch.equal(explained("gradient:one_hop", shared).tokens, wanted)


@pytest.mark.parametrize("name", [*NON_NEGATIVE, "relevance", "gradient"])
def test_a_method_says_whether_it_needs_a_backward_pass(name: str):
    assert find_method(name).gradient == (name in ("relevance", "gradient", "gradient_positive"))
    assert find_method(name).gives == ("tokens", "edges")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharp:cagee", "methods: 'sharp' must be followed by one of f, h, cage, .*, got 'sharp:cagee'; leave 'cagee'"),
        ("sharp:f:h", "methods: must name one score, got 'sharp:f:h'; keep one of f, h"),
        ("sharp:margin", "methods: 'margin' must follow a capacity with a target, got 'sharp:margin'; leave it out"),
        ("relevance:cage", "methods: 'relevance' must be followed by absorbed, chain, margin or logprob, got"),
        ("gradient:cage", "methods: 'gradient' must be followed by one of one_hop, got 'gradient:cage'; leave 'cage'"),
        ("gradient:margin:logprob", "methods: must name one target, got 'gradient:margin:logprob'; keep 'margin' or"),
        ("sharp:", "methods: 'sharp' must be followed by one of f, h, .*, got 'sharp:'; leave '' out"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(name: str, message: str):
    with pytest.raises(fg.InvalidInputError, match=re.compile(message)):
        find_method(name)
