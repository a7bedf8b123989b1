"""Traces with other capacities than attention, and the relevance of a trace's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flowgraph import InvalidInputError, RelevanceTrace, StepRelevance, capture, load_relevance, load_trace, trace
from flowgraph.cli import app
from tests.fixtures.tiny import PROMPT, RESPONSE, tiny

pytestmark = pytest.mark.filterwarnings("ignore:answer. should be what the model prefers")

FORWARD = ["sharpened", "sharp", "sharp_max", "centred", "vtrace", "vtrace_share", "value_norm"]


@pytest.mark.parametrize("capacity", FORWARD)
def test_a_trace_with_another_capacity_is_certified_and_says_so(capacity: str, tmp_path: Path):
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE, capacity=capacity)
    assert found.provenance["capacity"] == capacity
    assert found.certify().ok
    leaks = found.provenance["normalization"] == "leak"
    assert torch.equal(found.scores, found.potential if leaks else found.throughput)

    # Rows of the graph are the captured rows after the rules: no edge leaves the first token.
    rows = capture(model, found.token_ids, capacity=capacity).dense()[0]
    assert found.graph.num_edges <= int((rows.tril() > 0).sum())
    found.save(tmp_path / "t.safetensors")
    again = load_trace(tmp_path / "t.safetensors")
    assert torch.equal(again.scores, found.scores)
    assert again.graph.rules == found.graph.rules


def test_attention_stays_the_default_bit_for_bit():
    model, tokenizer = tiny()
    default = trace(model, tokenizer, PROMPT, RESPONSE)
    named = trace(model, tokenizer, PROMPT, RESPONSE, capacity="attention", layers="middle", heads="mean")
    assert torch.equal(default.throughput, named.throughput)
    assert torch.equal(default.scores, default.throughput)
    assert default.provenance["normalization"] == "attention"


def test_relevance_between_the_steps_of_a_trace():
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE)
    relevance = found.relevance(model, target="logprob").steps("sentences")
    assert isinstance(relevance, StepRelevance)
    assert relevance.residual < 1e-4
    leaving = relevance.flow.sum(1) + relevance.absorbed + relevance.bias
    assert torch.allclose(relevance.throughput, leaving, atol=1e-4)
    assert any(step.region == "answer" for step in relevance.steps)


def test_other_capacities_refuse_what_they_do_not_have():
    model, tokenizer = tiny()
    with pytest.raises(InvalidInputError, match=r"capacity: must be one of attention, .*, got 'sharpest'"):
        trace(model, tokenizer, PROMPT, RESPONSE, capacity="sharpest")
    with pytest.raises(InvalidInputError, match="heads: does not apply to capacity='vtrace'"):
        trace(model, tokenizer, PROMPT, RESPONSE, capacity="vtrace", heads="max")
    with pytest.raises(InvalidInputError, match=r"capacity_options: must be options of .*'sharpened' \(place, power\)"):
        trace(model, tokenizer, PROMPT, RESPONSE, capacity="sharpened", capacity_options={"strength": 2})


def test_options_of_a_capacity_reach_it():
    model, tokenizer = tiny()
    options = {"power": 3.0, "place": "post"}
    found = trace(model, tokenizer, PROMPT, RESPONSE, capacity="sharpened", capacity_options=options)
    plain = trace(model, tokenizer, PROMPT, RESPONSE, capacity="sharpened")
    assert not torch.equal(found.scores, plain.scores)
    assert found.provenance["capacity_options"] == options


def test_the_command_line_prints_the_relevance(tmp_path: Path):
    model, tokenizer = tiny()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["trace", PROMPT, "--response", RESPONSE, "--model", str(folder), "--plain"]
    result = CliRunner().invoke(app, [*command, "--capacity", "sharp", "--relevance"])
    assert result.exit_code == 0, result.output
    assert "where the answer came from: its relevance, by steps" in result.output
    assert "ends in: " in result.output


def test_the_command_line_traces_relevance_alone_or_beside(tmp_path: Path):
    model, tokenizer = tiny()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["trace", PROMPT, "--response", RESPONSE, "--model", str(folder), "--plain"]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [*command, "--capacity", "relevance", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "where the answer came from: its relevance, by steps" in result.output
    assert load_relevance(out / "trace.safetensors").certify().ok
    assert "Where the answer came from" in (out / "trace.html").read_text()

    out = tmp_path / "beside"
    options = ["--relevance", "--beside", "sharp", "--beside", "vtrace", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    payload = json.loads((out / "trace.json").read_text())
    assert [score["capacity"] for score in payload["scores"]] == ["sharp", "vtrace"]
    assert payload["relevance"]["schema"] == "flowgraph-relevance/1"


# Presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "capacity"), [("evidence", "relevance"), ("steps", "vtrace_share")])
def test_a_preset_is_its_capacity(preset: str, capacity: str):
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE, preset=preset)
    wanted = trace(model, tokenizer, PROMPT, RESPONSE, capacity=capacity)
    assert torch.equal(found.scores, wanted.scores)
    assert found.provenance["capacity"] == capacity
    assert isinstance(found, RelevanceTrace) == (capacity == "relevance")


def test_a_named_capacity_overrides_the_preset():
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE, preset="steps", capacity="attention")
    assert torch.equal(found.scores, trace(model, tokenizer, PROMPT, RESPONSE).scores)
    # The choices of the paper are edge rules, which every capacity but relevance has.
    sharp = trace(model, tokenizer, PROMPT, RESPONSE, preset="paper", capacity="sharp")
    assert sharp.provenance["rows"] == "literal"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "evidense"}, r"preset: must be one of 'default', 'paper', 'evidence', 'steps', .*got 'evidense'"),
        (
            {"preset": "paper", "capacity": "relevance"},
            r"preset: does not apply to capacity='relevance', got 'paper'; ",
        ),
        ({"preset": "evidence", "layers": "middle"}, r"layers: does not apply to capacity='relevance'"),
    ],
)
def test_presets_that_are_refused(options: dict[str, Any], message: str):
    model, tokenizer = tiny()
    with pytest.raises(InvalidInputError, match=message):
        trace(model, tokenizer, PROMPT, RESPONSE, **options)
