"""``flowgraph-rl eval``: figures as JSON, responses as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rl import ConfigError
from rl.cli import app
from tests.fixtures.rl_commands import SHORT, invoke


def test_eval_prints_json_and_writes_every_response(trained_run: Path, saved_model: Path, tmp_path: Path):
    common = ["eval", "--model", saved_model, *SHORT, "-n", 3, "--max-response-tokens", 6]
    plain = json.loads(invoke(*common, "--json").stdout)
    assert plain["num_problems"] == 3
    assert set(plain) == {"reward", "low", "high", "best_of", "num_problems", "samples", "answer_share",
                          "truncated_share", "response_tokens"}  # fmt: skip
    out = tmp_path / "responses.jsonl"
    tuned = invoke(*common, "--adapter", trained_run, "--temperature", 1, "-k", 2, "--out", out)
    assert "best of 2" in tuned.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    alone = json.loads(
        invoke(*common[:-4], "-n", 1, "-k", 2, "--temperature", 1, "--max-response-tokens", 6, "--json").stdout,
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert alone["high"] > 0.7, "one problem says next to nothing"


def test_the_shipped_model_is_evaluated_with_no_option_at_all():
    figures = json.loads(invoke("eval", "-n", 2, "--json").stdout)
    assert figures["num_problems"] == 2
    assert figures["truncated_share"] == 0.0


def test_stop_strings_and_template_options_reach_the_evaluation(saved_model: Path, tmp_path: Path):
    out = tmp_path / "responses.jsonl"
    settings = ["-n", 8, "--max-response-tokens", 30, "--temperature", 1]
    stops = ["--stop-string", "1", "--stop-string", "b"]
    figures = json.loads(
        invoke("eval", "--model", saved_model, *SHORT, *settings, *stops, "--out", out, "--json").stdout
    )
    texts = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    assert all("1" not in text[:-1] and "b" not in text[:-1] for text in texts)
    assert any(text.endswith(("1", "b")) for text in texts)
    assert figures["truncated_share"] < 1
    refused = CliRunner().invoke(app, ["eval", *map(str, settings), "--template-option", "enable_thinking=false"])
    assert isinstance(refused.exception, ConfigError)
    assert "chat_template_kwargs: must be left out for a tokenizer without a chat template" in str(refused.exception)
