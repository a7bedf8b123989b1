"""The layers and heads of a relevance edge: with the arc, their parts sum to its share of the demand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph import InvalidInputError, RelevanceEdge, RelevanceTrace, capture, load_relevance, trace
from tests.fixtures.models import build, sequences
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")


def relevance(**options: Any) -> RelevanceTrace:
    chosen = {"capacity_options": {"target": "logprob"}, **options}
    return trace(*tiny(), PROMPT, RESPONSE, capacity="relevance", **chosen)


def strongest(found: RelevanceTrace, count: int = 5) -> list[tuple[int, int]]:
    order = found.graph.weight.abs().argsort(descending=True)[:count].tolist()
    return [(int(found.graph.edge_index[0, at]), int(found.graph.edge_index[1, at])) for at in order]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_edges": 40},
        {"capacity_options": {"target": "logprob", "hops": 0}},
        {"capacity_options": {"target": "margin"}},
        {"capacity_options": {"contrast": "9"}},
        {"answer": "3 + 4"},
    ],
    ids=str,
)
def test_parts_and_the_arc_sum_to_the_share(options: dict):
    found = relevance(**options)
    scale = float(found.graph.weight.abs().max())
    last = int(found.answer.nonzero()[-1])
    edges = [*strongest(found), (last - 1, last)]
    for source, target in edges:
        edge = found.edge(source, target)
        parts = edge.by_head(tiny_model())
        assert parts.values.shape == (3, 4)
        assert parts.total == pytest.approx(edge.share, abs=1e-5 * scale)
        assert parts.capacity == edge.share
        layers = edge.by_layer(tiny_model())
        assert layers.total == pytest.approx(edge.share, abs=1e-5 * scale)
        assert torch.equal(layers.by_layer, parts.by_layer)
        if source != target - 1:
            assert parts.arc == 0
    # The demand of the answer lies on the edge into its token.
    answer_edge = found.edge(last - 1, last).by_head(tiny_model())
    if float(found.flow.demand[last]):
        assert answer_edge.arc != 0
        assert "arc to the token before" in repr(answer_edge)


def test_parts_are_the_products_of_single_heads():
    found = relevance(capacity_options={"target": "logprob", "hops": 0})
    rows = capture(
        tiny_model(), found.token_ids, capacity="relevance", answer=found.answer, target="logprob", keep_tape=True
    )
    source, target = next(edge for edge in strongest(found, 40) if edge[0] != edge[1] - 1)
    parts = found.edge(source, target).by_head(tiny_model())
    expected = rows.by_head(target, source).double() / float(rows.demand.sum())
    assert torch.allclose(parts.values, expected, rtol=1e-5, atol=1e-9)


def test_a_loaded_trace_is_captured_again(tmp_path: Path):
    model, tokenizer = tiny()
    for found in (
        relevance(),
        relevance(capacity_options={"contrast": "9"}),
        trace(model, tokenizer, PROMPT, RESPONSE, capacity="sharp").relevance(model, target="logprob"),
    ):
        source, target = strongest(found)[0]
        parts = found.edge(source, target).by_head(model)
        found.save(tmp_path / "r.safetensors")
        again = load_relevance(tmp_path / "r.safetensors").edge(source, target).by_head(model)
        assert torch.equal(again.values, parts.values)
        assert json.loads(json.dumps(again.to_dict()))["arc"] == parts.arc


def test_ids_to_contrast_with_are_recorded():
    model = build("gpt2")
    text = sequences()[0]
    other = text.flip(0)
    found = trace(model, input_ids=text, question=[1, 2, 3], answer=[20, 21]).relevance(model, target=other)
    source, target = strongest(found)[0]
    edge = found.edge(source, target)
    assert edge.by_head(model).total == pytest.approx(edge.share, rel=1e-4)
    assert found.provenance["captured_with"]["contrast_ids"] == other[[20, 21]].tolist()


def test_half_precision():
    half = build("llama", dtype=torch.bfloat16)
    found = trace(half, input_ids=sequences()[0], question=[1, 2, 3], answer=[20, 21]).relevance(half, target="logprob")
    source, target = strongest(found)[0]
    edge = found.edge(source, target)
    assert edge.by_head(half).total == pytest.approx(edge.share, rel=5e-2)


@pytest.mark.unchecked
def test_another_model_and_bad_tokens_are_refused():
    found = relevance(max_edges=30)
    source, target = strongest(found)[0]
    edge = found.edge(source, target)
    assert isinstance(edge, RelevanceEdge)
    assert edge.texts == (found.tokens[source], found.tokens[target])
    assert "trace=" not in repr(edge)
    torch.manual_seed(1)
    other = type(tiny_model())(tiny_model().config).eval()
    with pytest.raises(InvalidInputError, match="model: must be the model of the trace, got one whose relevance diff"):
        edge.by_head(other)
    present = set(map(tuple, found.graph.edge_index.T.tolist()))
    missing = next((s, t) for t in range(1, found.num_tokens) for s in range(t) if (s, t) not in present)
    for bad, message in [
        ((target, source), "source, target: must satisfy 0 <= source < target < "),
        ((3, 10**6), "source, target: must satisfy 0 <= source < target < "),
        (("Tom", 3), "source, target: must be integers, got 'Tom' and 3"),
        (missing, "source, target: must be the ends of an edge, got .* without one; the share is 0, or max_edges"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            found.edge(*bad)  # type: ignore[arg-type]
    unknown = replace(found, provenance={"model": "a model"})
    with pytest.raises(InvalidInputError, match="trace: must say how its edges were captured, got a provenance"):
        unknown.edge(source, target).by_head(tiny_model())
