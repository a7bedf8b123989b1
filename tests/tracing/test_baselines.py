"""Rankings without a flow beside that of a trace: gradient x input, one hop, recency, digits, random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flowgraph import Baselines, FlowTrace, InvalidInputError, RelevanceTrace, compose, trace
from flowgraph.analysis.statistics import spearman
from flowgraph.capacities.gradient import capture_input_gradient
from flowgraph.commands.terminal import baselines_line, baselines_table
from tests.fixtures.models import build, sequences
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")

NAMES = ["gradient x input", "one hop", "recency", "digits", "random"]


def traced(**options) -> FlowTrace:
    return trace(*tiny(), PROMPT, RESPONSE, **options)


def test_gradient_times_input_is_the_derivative_along_each_embedding():
    model = build("llama", dtype=torch.float64)
    ids = sequences()[0]
    answer = torch.arange(len(ids)) == len(ids) - 1
    found = capture_input_gradient(model, ids, answer).product

    # L(x0 + e x0[t]) - L(x0 - e x0[t]), by the model's own embeddings.
    embedded = model.get_input_embeddings()(ids[None]).detach()

    def logprob(scale: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model(inputs_embeds=embedded * scale[None, :, None]).logits[0, -2]
        return float(logits.log_softmax(-1)[ids[-1]])

    # The norms of the model compute in float32, so a smaller step would be lost in rounding.
    step = 1e-3
    for token in (0, 4, 11):
        change = torch.zeros(len(ids), dtype=torch.float64)
        change[token] = step
        derivative = (logprob(1 + change) - logprob(1 - change)) / (2 * step)
        assert float(found[token]) == pytest.approx(derivative, rel=0.02, abs=1e-4)
    with torch.inference_mode():
        assert torch.equal(capture_input_gradient(model, ids, answer).product, found)


@pytest.mark.parametrize("region", ["reasoning", "question", "all"])
def test_baselines_of_a_trace(region: str):
    found = traced(capacity="sharp")
    compared = found.baselines(tiny_model(), region=region, top=5)
    assert isinstance(compared, Baselines)
    assert [each.name for each in compared.baselines] == NAMES
    assert compared.score == "potential on sharp" == found.score_name
    masks = {
        "reasoning": found.reasoning,
        "question": found.question,
        "all": torch.arange(found.num_tokens) < int(found.answer.nonzero().min()),
    }
    counted = masks[region]
    assert compared.num_tokens == int(counted.sum())
    by_name = {each.name: each for each in compared.baselines}
    one_hop = compose(found.graph, "one_hop")
    assert torch.equal(by_name["one hop"].scores, one_hop)
    assert by_name["one hop"].spearman == pytest.approx(
        spearman(found.scores[counted].numpy(), one_hop[counted].numpy())
    )
    best = set(found.scores[counted].topk(compared.num_top).indices.tolist())
    late = set(torch.arange(int(counted.sum()))[-compared.num_top :].tolist())
    assert by_name["recency"].overlap == pytest.approx(len(best & late) / compared.num_top)
    assert by_name["digits"].scores.tolist() == [float(any(c.isdigit() for c in token)) for token in found.tokens]
    assert by_name["random"].spearman == 0
    assert by_name["random"].overlap == compared.num_top / compared.num_tokens
    assert sorted(by_name["random"].scores.tolist()) == list(range(found.num_tokens))


def test_baselines_of_a_relevance_and_of_a_composition():
    relevance = traced().relevance(tiny_model(), target="logprob")
    assert isinstance(relevance, RelevanceTrace)
    compared = relevance.baselines(tiny_model(), region="all")
    assert compared.score == "share of the relevance (logprob)"
    assert all(each.spearman is not None for each in compared.baselines)
    (one_hop,) = [each for each in compared.baselines if each.name == "one hop"]
    assert bool((one_hop.scores < 0).any())
    # The row that predicted the answer is that of the token before it.
    (answer,) = relevance.answer.nonzero().flatten().tolist()
    into = relevance.graph.edge_index[1] == answer - 1
    wanted = torch.zeros(relevance.num_tokens, dtype=torch.float64)
    wanted[relevance.graph.edge_index[0][into]] = relevance.graph.weight[into]
    assert torch.allclose(one_hop.scores, wanted)
    composed = traced(capacity="sharp_max", composition="one_hop")
    assert composed.score_name == "one_hop on sharp_max"
    (own, *_) = [each for each in composed.baselines().baselines if each.name == "one hop"]
    assert own.spearman == pytest.approx(1)
    assert own.overlap == 1
    assert traced(edge_weight="value_norm").score_name == "throughput on attention x value_norm"


def test_without_the_model_gradient_x_input_is_named_as_missing(tmp_path: Path):
    compared = traced().baselines()
    first = compared.baselines[0]
    assert first.name == "gradient x input"
    assert first.spearman is None
    assert first.reason == "needs the model: one backward pass"
    compared.to_json(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["schema"] == "flowgraph-baselines/1"
    assert len(repr(compared).splitlines()) == 7
    assert [row["baseline"] for row in compared.table()] == NAMES


def test_pages_and_terminal_show_a_ranking_with_its_baselines(tmp_path: Path):
    found = traced()
    payload = json.loads(json.dumps(found.to_dict()))
    assert [row["baseline"] for row in payload["baselines"]["baselines"]] == NAMES
    with_gradient = found.baselines(tiny_model())
    found.to_html(tmp_path / "t.html", baselines=with_gradient)
    html = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "How this ranking compares" in html
    assert f"{with_gradient.baselines[0].spearman:+.2f}" in html
    relevance = found.relevance(tiny_model(), target="logprob")
    relevance.to_html(tmp_path / "r.html")
    assert "share of the relevance (logprob)" in (tmp_path / "r.html").read_text(encoding="utf-8")

    console = Console(width=200)
    with console.capture() as capture:
        console.print(baselines_line(with_gradient))
        console.print(baselines_table(with_gradient))
    printed = capture.get()
    assert printed.startswith(f"Spearman/top {with_gradient.num_top} beside: gradient x input ")
    for name in NAMES:
        assert printed.count(name) >= 2


@pytest.mark.unchecked
def test_bad_input():
    found = traced()
    with pytest.raises(InvalidInputError, match="region: must be one of reasoning, question, all, got 'answer'"):
        found.baselines(region="answer")
    with pytest.raises(InvalidInputError, match="top: must be a positive integer, got 0; 10 is the default"):
        found.baselines(top=0)
    other = trace(*tiny(), PROMPT, "So 3 + 4 is 7.")
    with pytest.raises(InvalidInputError, match=r"baselines: must be of this trace, got those of \d+ tokens beside"):
        found.to_dict(baselines=other.baselines())
