"""The layers and heads of an edge: their parts sum to its capacity, for every capacity that sums over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgraph import (
    Edge,
    EdgeParts,
    FlowTrace,
    HeadSelector,
    InvalidInputError,
    capture,
    load_trace,
    trace,
    trace_corpus,
)
from tests.fixtures.models import build, sequences
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny, tiny_model

SUMMED = [
    {"capacity": "attention"},
    {"capacity": "attention", "layers": "all", "heads": [0, 3]},
    {"capacity": "attention", "heads": "receiver"},
    {"capacity": "attention", "heads": HeadSelector("distance", "lowest", 0.5)},
    {"capacity": "attention", "edge_weight": "value_norm"},
    {"capacity": "attention", "preset": "paper"},
    {"capacity": "attention", "preset": "paper", "self_attention": "renormalize"},
    {"capacity": "attention", "rows": "emission_all"},
    {"capacity": "value_norm", "layers": "all"},
    {"capacity": "sharp"},
    {"capacity": "centred", "layers": "all"},
    {"capacity": "vtrace"},
    {"capacity": "gradient_positive"},
]


def traced(**options: Any) -> FlowTrace:
    return trace(*tiny(), chat(), RESPONSE, **options)


def strongest(found: FlowTrace, count: int = 4) -> list[tuple[int, int]]:
    """Some of the strongest edges, and the last one."""
    order = found.graph.capacity.argsort(descending=True)
    chosen = [*order[: count - 1].tolist(), found.graph.num_edges - 1]
    return [(int(found.graph.edge_index[0, at]), int(found.graph.edge_index[1, at])) for at in chosen]


@pytest.mark.parametrize("options", SUMMED, ids=str)
def test_parts_of_layers_and_heads_sum_to_the_edge(options: dict):
    found = traced(**options)
    for source, target in strongest(found):
        edge = found.edge(source, target)
        parts = edge.by_head(tiny_model())
        assert parts.values.shape == (len(found.provenance["layers"]), 4)
        assert parts.total == pytest.approx(edge.capacity, rel=1e-4)
        layers = edge.by_layer(tiny_model())
        assert layers.total == pytest.approx(edge.capacity, rel=1e-4)
        assert torch.allclose(layers.by_layer, parts.by_layer, rtol=1e-3, atol=1e-5 * edge.capacity)
        assert parts.layers == tuple(found.provenance["layers"])


@pytest.mark.parametrize("capacity", ["vtrace_share", "sharpened"])
def test_heads_joined_before_a_power_can_be_split_by_layer_only(capacity: str):
    found = traced(capacity=capacity)
    source, target = strongest(found)[0]
    edge = found.edge(source, target)
    assert edge.by_layer(tiny_model()).total == pytest.approx(edge.capacity, rel=1e-4)
    if capacity == "vtrace_share":
        with pytest.raises(InvalidInputError, match="heads: must be summed to be told apart, got shares to the power"):
            edge.by_head(tiny_model())


def test_a_maximum_has_no_parts():
    found = traced(capacity="sharp_max")
    edge = found.edge(*strongest(found)[0])
    for split in (edge.by_head, edge.by_layer):
        with pytest.raises(InvalidInputError, match="layers: must be summed to be told apart, got their maximum"):
            split(tiny_model())
    by_heads = traced(heads="max")
    with pytest.raises(InvalidInputError, match="heads: must be summed to be told apart, got their maximum"):
        by_heads.edge(*strongest(by_heads)[0]).by_head(tiny_model())


def test_parts_are_the_attention_of_single_heads():
    model = tiny_model()
    found = traced(layers="all", preset="paper")
    source, target = strongest(found)[1]
    parts = found.edge(source, target).by_head(model)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        weights = torch.stack(model(found.token_ids[None], output_attentions=True).attentions)[:, 0]
        model.set_attn_implementation("sdpa")
    assert torch.allclose(parts.values.float(), weights[:, :, target, source] / 12, rtol=1e-4, atol=1e-8)


def test_what_a_record_holds(tmp_path: Path):
    found = traced(layers="all")
    source, target = strongest(found)[0]
    edge = found.edge(source, target)
    assert isinstance(edge, Edge)
    assert edge.texts == (found.tokens[source], found.tokens[target])
    assert edge.flow == pytest.approx(float(found.flow.edge_flow[found.graph.capacity.argmax()]))
    assert "trace=" not in repr(edge)
    parts = edge.by_head(tiny_model())
    assert isinstance(parts, EdgeParts)
    assert "layer" in repr(parts)
    assert len(repr(parts).splitlines()) == 9
    layer, head, value = parts.top(1)[0]
    assert float(parts.values[parts.layers.index(layer), head]) == value == float(parts.values.abs().max())
    assert json.loads(json.dumps(parts.to_dict()))["capacity"] == edge.capacity
    assert edge.by_layer(tiny_model()).top(1)[0][1] == -1
    # A loaded trace knows how it was captured.
    found.save(tmp_path / "t.safetensors")
    again = load_trace(tmp_path / "t.safetensors").edge(source, target).by_head(tiny_model())
    assert torch.equal(again.values, parts.values)


@pytest.mark.unchecked
def test_another_model_and_bad_tokens_are_refused():
    found = traced()
    source, target = strongest(found)[0]
    torch.manual_seed(1)
    other = type(tiny_model())(tiny_model().config).eval()
    with pytest.raises(InvalidInputError, match="model: must be the model of the trace, got one whose weights into"):
        found.edge(source, target).by_head(other)
    for bad, message in [
        ((target, source), "source, target: must satisfy 0 <= source < target < "),
        ((-1, 3), "source, target: must satisfy 0 <= source < target < "),
        ((3, 10**6), "source, target: must satisfy 0 <= source < target < "),
        (("Tom", 3), "source, target: must be integers, got 'Tom' and 3"),
        ((1.0, 3), "source, target: must be integers, got 1.0 and 3"),
        ((0, 5), "source, target: must be the ends of an edge, got 0 and 5 without one; the capacity is 0, or the"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            found.edge(*bad)  # type: ignore[arg-type]
    unknown = FlowTrace(
        tokens=found.tokens,
        token_ids=found.token_ids,
        text=found.text,
        spans=found.spans,
        generated=found.generated,
        graph=found.graph,
        flow=found.flow,
        provenance={"model": "a model"},
    )
    with pytest.raises(InvalidInputError, match="trace: must say how its edges were captured, got a provenance"):
        unknown.edge(source, target).by_head(tiny_model())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("capacity", ["relevance", "gradient", "gradient_positive"])
def test_signed_rows_are_split_too(name: str, capacity: str):
    text = sequences()[0]
    answer = torch.arange(len(text)) == len(text) - 1
    options = {"keep_tape": True} if capacity == "relevance" else {}
    rows = capture(build(name), text, capacity=capacity, answer=answer, target="logprob", **options)
    matrix = rows.dense()[0]
    for cell in matrix.abs().flatten().argsort(descending=True)[:4].tolist():
        row, column = divmod(cell, len(text))
        parts = rows.by_head(row, column) if capacity == "relevance" else rows.sequence(0).by_head(row, column)
        assert parts.shape == (3, 4)
        assert float(parts.sum()) == pytest.approx(float(matrix[row, column]), rel=1e-4)


def test_relevance_without_its_tape():
    text = sequences()[0]
    answer = torch.arange(len(text)) == len(text) - 1
    rows = capture(build("llama"), text, capacity="relevance", answer=answer)
    with pytest.raises(InvalidInputError, match="keep_tape: must be True to tell heads apart, got rows without their"):
        rows.by_head(5, 2)
    kept = capture(build("llama"), text, capacity="relevance", answer=answer, keep_tape=True)
    with pytest.raises(InvalidInputError, match="row, column: must satisfy 0 <= column < row < 24, got 2 and 5"):
        kept.by_head(2, 5)
    with pytest.raises(InvalidInputError, match="keep_tape: must be True or False, got 1"):
        capture(build("llama"), text, capacity="relevance", answer=answer, keep_tape=1)


def test_parts_of_a_trace_from_ids():
    model = build("gpt2")
    text = sequences()[0]
    found = trace(model, input_ids=text, question=[1, 2, 3], answer=[20, 21], capacity="sharp")
    source, target = strongest(found)[0]
    parts = found.edge(source, target).by_head(model)
    assert parts.total == pytest.approx(parts.capacity, rel=1e-4)
    assert PROMPT not in found.text


def test_parts_in_half_precision_and_of_a_trace_from_a_batch(tmp_path: Path):
    half = build("llama", dtype=torch.bfloat16)
    found = trace(half, input_ids=sequences()[0], question=[1, 2, 3], answer=[20, 21], capacity="vtrace")
    edge = found.edge(*strongest(found)[1])
    assert edge.by_head(half).total == pytest.approx(edge.capacity, rel=1e-2)

    # In a batch the text is padded, and its rows are rounded differently.
    lines = [{"prompt": PROMPT, "response": RESPONSE}, {"prompt": PROMPT * 2, "response": RESPONSE}]
    corpus = tmp_path / "lines.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    trace_corpus(*tiny(), corpus, tmp_path / "run", capacity="gradient_positive", plain=True, format="csv")
    (path, *_) = sorted((tmp_path / "run" / "traces").glob("*.safetensors"))
    batched = load_trace(path)
    edge = batched.edge(*strongest(batched)[1])
    assert edge.by_head(tiny_model()).total == pytest.approx(edge.capacity, rel=1e-3)
    alone = trace(*tiny(), PROMPT, RESPONSE, capacity="gradient_positive")
    assert torch.allclose(batched.throughput, alone.throughput, rtol=1e-3, atol=1e-6)
