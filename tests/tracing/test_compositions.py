"""Traces whose scores come from a composition: recorded, saved, printed and written to tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flowgraph import InvalidInputError, TraceFileError, capture, compose, load_trace, trace, trace_corpus
from flowgraph.cli import app
from tests.fixtures.tiny import PROMPT, RESPONSE, save_tiny, tiny

NAMES = ["cage", "flowtracer", "hops", "katz", "one_hop", "rollout", "vtrace"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capacity", ["attention", "vtrace_share"])
def test_scores_follow_the_composition(name: str, capacity: str, tmp_path: Path):
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE, capacity=capacity, composition=name)
    record = found.provenance["composition"]
    assert record["name"] == name
    assert record["residual"] is None or record["residual"] < 1e-12
    assert f"scores composed by {name}" in repr(found)
    if name == "rollout":
        rows = capture(model, found.token_ids, capacity=capacity)
        masks = {"question": found.question, "answer": found.answer, "generated": found.generated}
        wanted = compose(rows, name, reasoning=found.reasoning, **masks)
    else:
        wanted = compose(found.graph, name, generated=found.generated)
    assert torch.allclose(found.scores, wanted, rtol=1e-6)

    # The flow is that of the trace, whatever ranks its tokens.
    assert torch.equal(found.throughput, trace(model, tokenizer, PROMPT, RESPONSE, capacity=capacity).throughput)
    found.save(tmp_path / "t.safetensors")
    again = load_trace(tmp_path / "t.safetensors")
    assert torch.equal(again.scores, found.scores)
    assert again.provenance["composition"] == record
    assert [token["score"] for token in again.to_dict()["tokens"]] == found.scores.tolist()


def test_options_are_recorded_and_checked_before_the_model_runs():
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE, composition="hops", composition_options={"k": 1})
    assert found.provenance["composition"]["options"] == {"k": 1, "demand": None, "normalize": True}
    assert torch.equal(found.scores, compose(found.graph, "hops", k=1))
    # A model that cannot run: bad options are refused first.
    lines: list[str] = []
    for options, message in [
        ({"composition": "cages"}, "composition: must be one of .*, got 'cages'"),
        ({"composition": "hops", "composition_options": {"k": 0}}, "k: must be an integer of at least 1, got 0"),
        ({"composition": "cage", "composition_options": {"k": 2}}, "k: does not apply to composition 'cage', got 2"),
        ({"composition_options": {"k": 2}}, "composition_options: must come with a composition, got {'k': 2} alone"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            trace(model, tokenizer, PROMPT, RESPONSE, progress=lines.append, **options)  # type: ignore[arg-type]
    assert lines == []


def test_a_trace_without_a_composition_is_as_before(tmp_path: Path):
    model, tokenizer = tiny()
    found = trace(model, tokenizer, PROMPT, RESPONSE)
    assert found.composed is None
    assert "composition" not in found.provenance
    assert "score" not in found.to_dict()["tokens"][0]
    found.save(tmp_path / "t.safetensors")
    assert load_trace(tmp_path / "t.safetensors").composed is None


def test_a_file_with_scores_that_do_not_fit_is_refused(tmp_path: Path):
    from safetensors import safe_open

    model, tokenizer = tiny()
    path = tmp_path / "t.safetensors"
    trace(model, tokenizer, PROMPT, RESPONSE, composition="cage").save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for scores, message in [
        (tensors["composed"][1:].contiguous(), "path: every token vector must have"),
        (torch.full_like(tensors["composed"], torch.nan), "path: composed must be finite, got NaN"),
        (tensors["composed"].float(), "path: tensor 'composed' must be torch.float64"),
    ]:
        save_file({**tensors, "composed": scores}, path, metadata)
        with pytest.raises(TraceFileError, match=message):
            load_trace(path)


def test_the_command_line_and_a_corpus(tmp_path: Path):
    model, tokenizer = tiny()
    folder = save_tiny(tmp_path / "model")
    command = [
        "trace",
        PROMPT,
        "--response",
        RESPONSE,
        "--model",
        str(folder),
        "--plain",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*command, "--composition", "hops:k=1,normalize=false"])
    assert result.exit_code == 0, result.output
    written = load_trace(tmp_path / "out" / "trace.safetensors")
    assert written.provenance["composition"]["options"]["k"] == 1
    wanted = trace(model, tokenizer, PROMPT, RESPONSE)
    assert torch.allclose(written.scores, compose(wanted.graph, "hops", k=1, normalize=False), rtol=1e-6)
    refused = CliRunner().invoke(app, [*command, "--composition", "hops:k"])
    assert refused.exit_code == 2
    assert "--composition must be NAME or NAME:OPTION=VALUE" in " ".join(refused.output.split())

    corpus = tmp_path / "lines.jsonl"
    corpus.write_text(json.dumps({"prompt": PROMPT, "response": RESPONSE}) + "\n", encoding="utf-8")
    # A wrong option is reported before the model is loaded, which does not exist here.
    starts = (["trace", "text"], ["trace-corpus", str(corpus), "--out", str(tmp_path / "other")])
    for value, message in [
        ("hops:k=0", "k: must be an integer of at least 1, got 0"),
        ("katz:damping=nan", "damping: must lie in (0, 1], got nan"),
        ("hops:k=2.5", "k: must be an integer of at least 1, got 2.5"),
        ("walks", "composition: must be one of"),
    ]:
        for start in starts:
            wrong = CliRunner().invoke(app, [*start, "--model", str(tmp_path / "none"), "--composition", value])
            assert message in str(wrong.exception)

    trace_corpus(model, tokenizer, corpus, tmp_path / "run", composition="cage", plain=True, format="csv")
    with (tmp_path / "run" / "tokens.csv").open(encoding="utf-8") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx(compose(wanted.graph, "cage", generated=wanted.generated).tolist(), rel=1e-5)
    with pytest.raises(InvalidInputError, match=r"composition|options"):
        trace_corpus(model, tokenizer, corpus, tmp_path / "run", composition="katz", plain=True, format="csv")
