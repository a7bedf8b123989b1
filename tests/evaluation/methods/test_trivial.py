"""Controls that read nothing of the model have the values that their one line says."""

from __future__ import annotations

import pytest
import torch

import flowgraph as fg
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.methods.trivial import steps_of
from tests.fixtures.subjects import explained, subject

TRIVIAL = ("random", "recency", "position", "length", "digits", "shared_tokens", "previous_step")


@pytest.fixture(scope="module")
def shared() -> fg.Subject:
    return subject(response="Step 1: 3 + 4 = 7.\nStep 2: check 7 - 4 = 3.\nSo the answer is 7.")


def scores(case: fg.Subject, name: str) -> list[float]:
    return explained(name, case).tokens.tolist()


def test_random_is_fixed_by_the_items_name():
    one = explained("random", subject("a"))
    again = explained("random", subject("a"))
    other = explained("random", subject("b"))
    assert torch.equal(one.tokens, again.tokens)
    assert torch.equal(one.edges, again.edges)
    assert not torch.equal(one.tokens, other.tokens)
    assert bool(((one.tokens >= 0) & (one.tokens < 1)).all())


def test_recency_and_position_run_opposite_ways(shared: fg.Subject):
    number = shared.num_tokens
    assert scores(shared, "recency") == pytest.approx([(s + 1) / number for s in range(number)])
    assert scores(shared, "position") == pytest.approx([(number - s) / number for s in range(number)])
    edges = explained("recency", shared).edges
    assert float(edges[9, 5]) == 0.25
    assert float(edges[5, 9]) == 0


def test_length_digits_and_shared_tokens_read_the_text(shared: fg.Subject):
    texts = [token.strip().lower() for token in shared.base.tokens]
    assert scores(shared, "length") == [len(text) for text in texts]
    assert scores(shared, "digits") == [float(any(c.isdigit() for c in text)) for text in texts]
    assert shared.base.text_of(shared.answer) == "7"
    assert scores(shared, "shared_tokens") == [float(text == "7") for text in texts]
    assert sum(scores(shared, "shared_tokens")) > 1
    edges = explained("shared_tokens", shared).edges
    for target, reader in enumerate(texts):
        for source, read in enumerate(texts):
            assert float(edges[target, source]) == float(source < target and reader == read != "")


def test_previous_step_is_the_step_before_the_answers(shared: fg.Subject):
    steps = steps_of(shared)
    first = shared.positions(shared.answer)[0]
    own = next(step for step in steps if step.start <= first < step.stop)
    before = steps[own.index - 1]
    wanted = [float(before.start <= token < before.stop) for token in range(shared.num_tokens)]
    assert scores(shared, "previous_step") == wanted
    edges = explained("previous_step", shared).edges
    of_token = {token: step.index for step in steps for token in range(step.start, step.stop)}
    for target, source in [(first, before.start), (first, 0), (before.start, before.start - 1), (4, 3)]:
        assert float(edges[target, source]) == float(of_token[target] == of_token[source] + 1)


@pytest.mark.parametrize("name", TRIVIAL)
def test_edges_run_backwards_in_time_only(shared: fg.Subject, name: str):
    method = find_method(name)
    edges = explained(name, shared).edges
    assert not bool(edges.triu().any())
    assert method.trivial
    assert method.gives == ("tokens", "edges")


@pytest.mark.parametrize("name", TRIVIAL)
def test_controls_never_run_the_model(name: str):
    case = subject()
    passes = []
    hook = case.model.register_forward_hook(lambda *_: passes.append(1))
    explained(name, case)
    hook.remove()
    assert passes == []
