"""Attention baselines against the eager attentions of the model, and the layered functions of the library."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import flowgraph as fg
from flowgraph.evaluation.methods import attention as module
from tests.fixtures.subjects import explained, subject
from tests.fixtures.tiny import tiny
from tests.reference import rl_credit as reference


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject(response="Step 1: 3 + 4 = 7. So the answer is 7 apples.", answer="7 apples")


@pytest.fixture(scope="module")
def eager(shared: fg.Subject) -> Tensor:
    """Mean over heads of each layer's attention, ``[3, T, T]``, by the model's own eager pass."""
    model = tiny()[0]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(input_ids=shared.token_ids[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return torch.stack(attentions)[:, 0].double().mean(1)


@pytest.mark.parametrize(("name", "layers"), [("late", [2]), ("middle", [1]), ("all", [0, 1, 2])])
def test_the_answers_rows_are_averaged(shared: fg.Subject, eager: Tensor, name: str, layers: list[int]):
    found = explained(f"attention_{name}", shared)
    matrix = eager[layers].mean(0)
    producing = [place - 1 for place in shared.positions(shared.answer)]
    torch.testing.assert_close(found.tokens, matrix[producing].mean(0), rtol=0, atol=1e-6)
    assert float(found.tokens.sum()) == pytest.approx(1, abs=1e-5)
    for source, target in [(3, 20), (10, 33), (32, 40), (39, 40)]:
        row, column = fg.attention_cell(shared.base, source, target)
        assert float(found.edges[target, source]) == pytest.approx(float(matrix[row, column]), abs=1e-6)


def test_rollout_is_that_of_the_layered_graph(shared: fg.Subject, eager: Tensor):
    producing = [place - 1 for place in shared.positions(shared.answer)]
    wanted = fg.attention_rollout(eager / eager.sum(-1, keepdim=True), targets=producing).mean(0)
    torch.testing.assert_close(explained("rollout", shared).tokens, wanted, rtol=1e-4, atol=1e-7)


def test_attention_flow_is_that_of_the_layered_graph(shared: fg.Subject, eager: Tensor):
    producing = [place - 1 for place in shared.positions(shared.answer)]
    sources = [0, 7, 21, 33]
    wanted = fg.attention_flow(eager / eager.sum(-1, keepdim=True), targets=producing, sources=sources).mean(0)
    found = explained("attention_flow", shared).tokens
    torch.testing.assert_close(found[sources], wanted, rtol=1e-4, atol=1e-6)
    last = shared.positions(shared.answer)[-1]
    assert not bool(found[last:].any())


def test_attention_flow_states_its_limit(shared: fg.Subject, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_FLOW_EDGES", 1000)
    message = r"methods: 'attention_flow' must read at most 1,000 edges in all its max flows, got [\d,]+ for \d+ tokens"
    with pytest.raises(fg.TooLargeError, match=message):
        explained("attention_flow", shared)


def test_fai_and_waad_are_the_formulas_of_the_credit_rules(shared: fg.Subject):
    model = tiny()[0]
    for name, keep in (("fai", "highest"), ("waad", "lowest")):
        heads = fg.HeadSelector("distance", keep, 0.3)
        rows = fg.capture(model, shared.token_ids, capacity="attention", layers="middle", heads=heads).dense()[0]
        wanted = getattr(reference, name)(rows.tolist(), 0)
        found = explained(name, shared).tokens.tolist()
        assert found == pytest.approx(wanted, abs=1e-6)
        # Of the response alone, the numbers are those of the credit rule.
        start = shared.prompt_length
        assert found[start:] == pytest.approx(getattr(reference, name)(rows.tolist(), start), abs=1e-6)


@pytest.mark.unchecked
def test_an_answer_that_nothing_precedes_is_refused():
    case = SimpleNamespace(answer=torch.tensor([True, False, False]))
    with pytest.raises(fg.InvalidInputError, match="answer: must have something before it, got an answer at token 0"):
        module.answer_rows(case)
