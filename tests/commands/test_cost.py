"""The command ``flowgraph cost``: the table at 100 columns, the file, and messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flowgraph as fg
from flowgraph.cli import app

OPTIONS = ["cost", "--config", "8b", "--tokens", "8192", "--responses", "16", "--machine", "h100"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_the_table_fits_and_the_file_holds_the_estimate(tmp_path: Path):
    file = tmp_path / "cost.json"
    result = CliRunner().invoke(app, [*OPTIONS, "--capacity", "sharp", "--layers", "upper", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    for name in ("scoring pass", "forward and backward", "training step", "rows", "sweeps", "capture and solve"):
        assert name in result.stdout
    assert "computed, not measured" in result.stdout
    expected = fg.estimate_cost("8b", tokens=8192, responses=16, machine="h100", capacity="sharp", layers="upper")
    assert json.loads(file.read_text()) == json.loads(json.dumps(expected.to_dict()))


def test_a_quiet_command_prints_one_line():
    result = CliRunner().invoke(app, [*OPTIONS, "--quiet", "--max-edges", "1000", "--scratch-mib", "1024"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1 or "computed" in result.stdout


def test_help_answers():
    result = CliRunner().invoke(app, ["cost", "--help"])
    assert result.exit_code == 0
    for text in ("--config", "--tokens", "--machine", "--capacity", "--layers", "Example"):
        assert text in result.stdout


def test_bad_input_has_its_message():
    result = CliRunner().invoke(app, ["cost", "--config", "4b", "--tokens", "50000"])
    assert result.exit_code == 1
    assert "tokens: must not exceed the context of Qwen3-4B, 40960, got 50000" in str(result.exception)
