"""Relevance between steps: exact sums of the token graph, conserved at every step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from flowgraph import InvalidInputError, RelevanceRows, SignedFlow, Step, capture, relevance_flow, step_relevance
from tests.fixtures.models import build, padded, sequences

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")

BOUNDS = [0, 3, 4, 9, 12, 15]


def steps_of(num_tokens: int) -> list[Step]:
    bounds = [bound for bound in BOUNDS if bound < num_tokens] + [num_tokens]
    return [
        Step(index, start, stop, f" part {index}\n", "question" if index == 0 else "reasoning")
        for index, (start, stop) in enumerate(pairwise(bounds))
    ]


def relevance(item: int, side: str) -> RelevanceRows:
    ids, mask = padded(side)
    last = (mask == 1) & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    generated = (mask.cumsum(-1) > 6) & (mask == 1)
    return capture(
        build("qwen2"), ids, mask, capacity="relevance", answer=last, generated=generated, target="logprob", hops=4
    )


def flow_of(rows: RelevanceRows, item: int = 0) -> SignedFlow:
    length = len(sequences()[item])
    return relevance_flow(rows, question=slice(0, 3), answer=[length - 1], item=item)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("item", [0, 1])
def test_steps_are_sums_of_tokens_and_conserve(item: int, side: str):
    rows = relevance(item, side)
    length = len(sequences()[item])
    steps = steps_of(length)
    found = step_relevance(flow_of(rows, item), steps)

    kept = rows.attention_mask[item].nonzero().flatten().tolist()
    total = float(rows.demand[item].sum())
    for target in steps:
        for source in steps[: target.index]:
            wanted = 0.0
            for t in range(target.start, target.stop):
                for s in range(source.start, source.stop):
                    wanted += float(rows.matrix[item, kept[t], kept[s]])
                    if s == t - 1:
                        wanted += float(rows.emitted[item, kept[t]]) + float(rows.demand[item, kept[s]])
            assert float(found.flow[target.index, source.index]) == pytest.approx(wanted / total, abs=1e-5)
    leaving = found.flow.sum(1) + found.absorbed + found.bias
    # What reaches a step leaves it; what passes inside it cancels.
    assert torch.allclose(found.throughput, leaving, atol=1e-4)
    assert float(found.demand.sum()) == pytest.approx(1)
    assert float((found.absorbed + found.bias).sum()) == pytest.approx(1, abs=1e-4)


def test_the_printed_chain_starts_at_the_answer():
    rows = relevance(0, "right")
    found = step_relevance(flow_of(rows), steps_of(len(sequences()[0])))
    head, answer, *_ = repr(found).splitlines()
    assert head.startswith("StepRelevance of 6 steps, demand")
    assert answer.strip() == "+100% 'part 5'"
    assert [row["index"] for row in found.table()] == list(range(6))


def test_bad_input():
    rows = relevance(0, "right")
    with pytest.raises(InvalidInputError, match="steps: must cover the 24 tokens of the sequence once each, in order"):
        step_relevance(flow_of(rows), steps_of(24)[:-1])
    with pytest.raises(InvalidInputError, match=r"step: must lie in 0\.\.5, got 9"):
        step_relevance(flow_of(rows), steps_of(24)).contributions(9)
