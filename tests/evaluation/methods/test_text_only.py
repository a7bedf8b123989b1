"""The graph of the text against its definition in loops, and its compositions against the public functions."""

from __future__ import annotations

import math
import re

import pytest
import torch

import flowgraph as fg
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.methods.text_only import MAX_SUFFIX, NEARNESS, text_weights
from tests.fixtures.subjects import explained, subject


def weights_by_loops(ids: list[int]) -> list[list[float]]:
    rows = []
    for t in range(len(ids)):
        row = [0.0] * len(ids)
        for s in range(t):
            suffix = 0
            while suffix < min(s, MAX_SUFFIX) and ids[s - 1 - suffix] == ids[t - 1 - suffix]:
                suffix += 1
            row[s] = suffix + float(ids[s] == ids[t]) + math.exp(-(t - s) / NEARNESS)
        total = sum(row)
        rows.append([weight / total if total else 0.0 for weight in row])
    return rows


@pytest.mark.parametrize(
    "ids",
    [
        [5],
        [5, 6],
        [1, 2, 3, 9, 1, 2, 3, 9, 4],
        [7] * 12,
        torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(0)).tolist(),
    ],
)
def test_weights_are_suffix_identity_and_nearness(ids: list[int]):
    found = text_weights(torch.tensor(ids))
    torch.testing.assert_close(found, torch.tensor(weights_by_loops(ids), dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_a_copied_line_is_continued():
    """After "1 2 3" the second time, what stood after it the first time has the largest weight."""
    row = text_weights(torch.tensor([1, 2, 3, 9, 8, 7, 6, 1, 2, 3, 5]))[10]
    assert int(row[:9].argmax()) == 3


@pytest.mark.parametrize("score", ["f", "h", "cage", "flowtracer", "one_hop", "katz", "hops", "vtrace", "rollout"])
def test_compositions_are_those_of_the_library(score: str):
    case = subject()
    graph = fg.FlowGraph.from_dense(
        torch.tensor(weights_by_loops(case.token_ids.tolist()), dtype=torch.float64),
        question=case.question,
        answer=case.answer,
        reasoning=case.reasoning,
    )
    flow = fg.solve(graph)
    own = {"f": flow.throughput, "h": flow.potentials[0]}
    wanted = own[score] if score in own else fg.compose(graph, score, generated=case.base.generated)
    found = explained(f"text_only:{score}", case)
    torch.testing.assert_close(found.tokens, wanted, rtol=1e-9, atol=1e-15)
    if score == "h":
        assert torch.equal(explained("text_only", case).tokens, found.tokens)


def test_the_model_is_never_run():
    case = subject()
    passes = []
    hook = case.model.register_forward_hook(lambda *_: passes.append(1))
    for name in ("text_only", "text_only:cage"):
        assert find_method(name).trivial
        explained(name, case)
    hook.remove()
    assert passes == []


def test_an_unknown_composition_is_refused():
    message = "methods: 'text_only' must be followed by one of f, h, cage, .*, got 'text_only:cagee'; leave 'cagee' out"
    with pytest.raises(fg.InvalidInputError, match=re.compile(message)):
        find_method("text_only:cagee")
