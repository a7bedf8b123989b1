"""Relevance traces: signed scores that conserve, files, contrasts, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowgraph import (
    FlowGraph,
    GraphError,
    InvalidInputError,
    RelevanceTrace,
    TraceFileError,
    capture,
    certify,
    load_relevance,
    load_trace,
    max_flow,
    relevance_flow,
    solve,
    trace,
)
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")

LOGPROB = {"target": "logprob"}


def relevance(**options) -> RelevanceTrace:
    model, tokenizer = tiny()
    return trace(model, tokenizer, PROMPT, RESPONSE, capacity="relevance", capacity_options=LOGPROB, **options)


def test_the_scores_are_the_relevance_that_reaches_each_token():
    found = relevance()
    model, _ = tiny()
    rows = capture(
        model,
        found.token_ids,
        capacity="relevance",
        answer=found.answer,
        generated=found.generated,
        target="logprob",
        hops=6,
    )
    # Row t predicts token t + 1, so a token's share is that of its own row, with the demand moved to the answer.
    total = float(rows.demand.sum())
    at_row = rows.throughput[0].double() / total
    arcs = rows.demand[0].double() / total
    wanted = at_row.clone()
    wanted[1:] += arcs[:-1]
    assert torch.allclose(found.scores, wanted, atol=1e-6)
    assert found.residual == pytest.approx(rows.residual, abs=1e-5)
    assert sum(found.shares().values()) == pytest.approx(1, abs=1e-4)


def test_the_law_is_certified_and_a_broken_flow_is_found():
    found = relevance()
    certificate = found.certify()
    assert certificate.ok, str(certificate)
    assert {check.name for check in certificate.checks} == {"graph", "demand", "balance", "ends", "prefix cuts"}
    assert "not defined for signed weights" in certificate.notes[0]
    assert "no capacities to compare with" in str(certificate)

    # Any altered number fails the check that it belongs to.
    flow = found.flow
    absorbed = flow.absorbed.clone()
    absorbed[3] += 0.1
    assert {check.name for check in certify(replace(flow, absorbed=absorbed)).failed} == {
        "balance",
        "ends",
        "prefix cuts",
    }
    graph = flow.graph.clone()
    graph.weight = graph.weight.clone()
    graph.weight[5] += 0.1
    assert "balance" in {check.name for check in certify(replace(flow, graph=graph)).failed}
    graph.weight[5] = torch.nan
    assert {check.name for check in certify(replace(flow, graph=graph)).failed} == {"graph"}
    assert {check.name for check in certify(replace(flow, demand=2 * flow.demand)).failed} >= {"demand"}


def test_edges_left_out_are_recorded_so_that_the_law_holds():
    full = relevance()
    pruned = relevance(max_edges=20)
    assert pruned.graph.num_edges == 20
    assert pruned.certify().ok
    assert torch.allclose(pruned.scores, full.scores, atol=1e-9)
    smallest_kept = float(pruned.graph.weight.abs().min())
    assert int((full.graph.weight.abs() > smallest_kept).sum()) < 20
    steps = pruned.steps("sentences")
    leaving = steps.flow.sum(1) + steps.pruned_in + steps.absorbed + steps.bias
    assert torch.allclose(steps.throughput, leaving, atol=1e-5)
    assert float(full.steps("sentences").pruned_out.abs().max()) == 0


def test_positive_and_negative_parts_are_graphs():
    graph = relevance().graph
    positive = graph.positive()
    negative = graph.negative()
    assert isinstance(positive, FlowGraph)
    assert positive.num_edges + negative.num_edges == graph.num_edges
    assert float(positive.capacity.sum() - negative.capacity.sum()) == pytest.approx(float(graph.weight.sum()))
    assert solve(positive).throughput.shape == (graph.num_nodes,)


def test_a_file_gives_the_same_trace(tmp_path: Path):
    found = relevance()
    found.save(tmp_path / "r.safetensors")
    again = load_relevance(tmp_path / "r.safetensors")
    assert torch.equal(again.scores, found.scores)
    assert again.shares() == found.shares()
    assert again.tokens == found.tokens
    assert repr(again) == repr(found)
    assert again._repr_html_() == found._repr_html_()
    torch.save(found, tmp_path / "r.pt")
    assert torch.equal(torch.load(tmp_path / "r.pt", weights_only=True).scores, found.scores)
    found.to_json(tmp_path / "r.json")
    payload = json.loads((tmp_path / "r.json").read_text())
    assert payload["schema"] == "flowgraph-relevance/1"
    assert sum(payload["ends"].values()) == pytest.approx(1, abs=1e-4)
    assert [token["share"] for token in payload["tokens"]] == pytest.approx(found.scores.tolist())


def test_files_of_the_other_kind_are_named(tmp_path: Path):
    model, tokenizer = tiny()
    relevance().save(tmp_path / "r.safetensors")
    trace(model, tokenizer, PROMPT, RESPONSE).save(tmp_path / "t.safetensors")
    with pytest.raises(TraceFileError, match=r"must hold a flow trace, got one of kind 'relevance' .* load_relevance"):
        load_trace(tmp_path / "r.safetensors")
    with pytest.raises(TraceFileError, match=r"must hold a relevance trace, got a flow trace .* use load_trace"):
        load_relevance(tmp_path / "t.safetensors")


def test_a_contrast_explains_this_answer_instead_of_another():
    model, tokenizer = tiny()
    plain = trace(model, tokenizer, PROMPT, RESPONSE)
    answer = "".join(plain.tokens[token] for token in plain.answer.nonzero().flatten().tolist()).strip()
    found = plain.relevance(model, tokenizer, contrast="9")
    assert found.provenance["contrast"] == "9"
    assert found.flow.target == "contrast"
    assert found.certify().ok

    # The demand is the difference of the two logits, at the first token where the answers differ.
    place = int(found.flow.demand.argmax())
    assert found.tokens[place].strip()[0] == answer[0]
    with torch.no_grad():
        logits = model(found.token_ids[None]).logits[0, place - 1]
    other = tokenizer(PROMPT + RESPONSE[:-2] + "9.", add_special_tokens=False)["input_ids"][place]
    difference = float(logits[found.token_ids[place]] - logits[other])
    assert found.flow.total == pytest.approx(difference, rel=1e-3)

    with pytest.raises(InvalidInputError, match="contrast: must differ from the answer"):
        plain.relevance(model, tokenizer, contrast=answer)
    with pytest.raises(InvalidInputError, match="contrast: must come with a tokenizer, got none"):
        plain.relevance(model, contrast="9")


@pytest.mark.unchecked
def test_what_needs_weights_that_are_not_negative_says_what_to_use():
    model, _ = tiny()
    found = relevance()
    with pytest.raises(GraphError, match=r"for the conserved flow, got a SignedGraph; use graph\.positive\(\)"):
        solve(found.graph)
    with pytest.raises(GraphError, match=r"for a max flow, got a SignedGraph; use graph\.positive\(\)"):
        max_flow(found.graph)
    rows = capture(model, found.token_ids, capacity="relevance", answer=found.answer, target="logprob")
    with pytest.raises(GraphError, match=r"rows: must not be negative, got RelevanceRows.*relevance_flow"):
        FlowGraph.from_rows(rows, question=found.question, answer=found.answer)
    with pytest.raises(InvalidInputError, match=r"item: must lie in 0\.\.0, got 1"):
        relevance_flow(rows, question=found.question, answer=found.answer, item=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "all"}, "layers: does not apply to capacity='relevance', got 'all'"),
        ({"damping": 0.5}, "damping: does not apply to capacity='relevance', got 0.5"),
        ({"demand": torch.ones(3)}, "demand: does not apply to capacity='relevance'"),
        (
            {"capacity_options": {"power": 2}},
            r"options of capacity='relevance' \(contrast, hops, target\), got power=2",
        ),
        (
            {"capacity_options": {"keep_tape": True}},
            r"options of capacity='relevance' \(contrast, hops, target\), got keep_tape=True",
        ),
        ({"capacity_options": {"hops": -1}}, "hops: must be at least 0, got -1"),
        ({"capacity_options": {"target": "logit"}}, "target: must be 'margin', 'logprob' or token ids, got 'logit'"),
    ],
)
@pytest.mark.unchecked
def test_bad_input(options: dict, message: str):
    model, tokenizer = tiny()
    with pytest.raises(InvalidInputError, match=message):
        trace(model, tokenizer, PROMPT, RESPONSE, capacity="relevance", **options)


def test_blank_tokens_of_the_question_count_as_question():
    model, tokenizer = tiny()
    prompt = PROMPT.replace("apples. ", "apples.\n\n\n")
    found = trace(model, tokenizer, prompt, RESPONSE, capacity="relevance", capacity_options=LOGPROB)
    is_blank = torch.tensor([not text.strip() for text in found.tokens])
    in_prompt = is_blank & ~found.generated
    assert bool(in_prompt.any())
    assert found.question[in_prompt].all()
    by_region = {"question": 0.0}
    steps = found.steps()
    for step, absorbed in zip(steps.steps, steps.absorbed.tolist(), strict=True):
        by_region[step.region or "context"] = by_region.get(step.region or "context", 0.0) + absorbed
    assert found.shares()["question"] == pytest.approx(by_region["question"])
