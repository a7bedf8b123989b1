"""Specificity: the distance between two entries, and the shares of reach, against sums worked out by hand."""

from __future__ import annotations

import pytest
import torch

from flowgraph import Flow, FlowGraph, InfeasibleFlowError, solve, specificity, trace
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny

GENERATED = [4, 5, 6]


def flow_of(weights: dict[tuple[int, int], float], question: list[int]) -> Flow:
    """Tokens 0 to 3 are the prompt, 4 and 5 the reasoning, 6 the answer; keys are (reader, source)."""
    matrix = torch.zeros(7, 7, dtype=torch.float64)
    for (reader, source), weight in weights.items():
        matrix[reader, source] = weight
    return solve(FlowGraph.from_dense(matrix, question=question, reasoning=[4, 5], answer=[6]))


def test_separate_routes_differ_completely():
    # The question reads through token 4, the text before it through token 5.
    flow = flow_of({(4, 2): 1.0, (5, 1): 1.0, (6, 4): 0.5, (6, 5): 0.5}, question=[2])
    found = specificity(flow, generated=GENERATED)
    assert found.total_variation == pytest.approx(1)
    assert found.compared_with == "text before the question"
    assert found.description == "question-specific"
    assert found.entry == pytest.approx({"question": 0.5, "before": 0.5, "after": 0.0})


def test_mixed_routes_do_not_differ():
    # Both tokens of the reasoning read both places alike.
    weights = {(4, 1): 0.5, (4, 2): 0.5, (5, 1): 0.5, (5, 2): 0.5, (6, 4): 0.7, (6, 5): 0.3}
    found = specificity(flow_of(weights, question=[2]), generated=GENERATED)
    assert found.total_variation == pytest.approx(0)
    assert found.description == "set by the answer, not by the question: read it as h"


def test_by_hand():
    # f over (4, 5): from token 2: N h = (.6 * .5, .2 * .5), from token 1: (.2 * .5, .4 * .5).
    weights = {(4, 2): 0.6, (5, 2): 0.2, (4, 1): 0.2, (5, 1): 0.4, (6, 4): 0.5, (6, 5): 0.5, (6, 3): 0.25}
    found = specificity(flow_of(weights, question=[2]), generated=GENERATED)
    assert found.total_variation == pytest.approx(abs(0.75 - 1 / 3))
    reach = {"question": 0.4, "before": 0.3, "after": 0.25}
    total = sum(reach.values())
    assert found.entry == pytest.approx({name: share / total for name, share in reach.items()})
    assert found.to_dict()["description"] == "question-specific"
    assert "against text before the question" in str(found)


def test_without_text_before_the_question_its_halves_are_compared():
    flow = flow_of({(4, 1): 1.0, (5, 2): 1.0, (6, 4): 0.5, (6, 5): 0.5}, question=[1, 2])
    found = specificity(flow, generated=GENERATED)
    assert found.compared_with == "halves of the question"
    assert found.total_variation == pytest.approx(1)


def test_the_first_token_is_a_sink_and_no_text_before_the_question():
    flow = flow_of({(4, 0): 0.9, (4, 1): 0.1, (5, 2): 1.0, (6, 4): 0.5, (6, 5): 0.5}, question=[1, 2])
    assert specificity(flow, generated=GENERATED).compared_with == "halves of the question"


def test_one_place_of_entry_has_no_distance():
    found = specificity(flow_of({(4, 2): 1.0, (6, 4): 1.0}, question=[2]), generated=GENERATED)
    assert found.total_variation is None
    assert found.description == "not defined"
    assert str(found) == "reach enters at: question 100%, before 0%, after 0%"


def test_a_flow_that_does_not_exist_is_refused():
    with pytest.raises(InfeasibleFlowError, match="flow"):
        specificity(flow_of({(6, 4): 1.0}, question=[2]), generated=GENERATED)


def test_tiny_potentials_do_not_vanish():
    weights = {(4, 2): 1e-200, (5, 4): 1e-200, (6, 5): 1e-100, (4, 1): 3e-200}
    found = specificity(flow_of(weights, question=[2]), generated=GENERATED)
    assert found.entry == pytest.approx({"question": 0.25, "before": 0.75, "after": 0.0})


def test_a_trace_has_it():
    model, tokenizer = tiny()
    found = trace(model, tokenizer, chat(), RESPONSE).specificity()
    assert found.total_variation is not None
    assert 0 <= found.total_variation <= 1
    assert sum(found.entry.values()) == pytest.approx(1)
    assert trace(model, tokenizer, PROMPT, RESPONSE).specificity().compared_with == "halves of the question"
