"""``flowgraph-rl align``: tables, figures and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flowgraph import OutputError
from rl.commands.align import align_command
from tests.fixtures.policies import Digits, alphabet, tiny_policy


def test_align_prints_tables_and_writes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.policy.loading.load_model", lambda name, dtype, **options: (tiny_policy(), alphabet()))
    monkeypatch.setattr("rl.tasks.registry.make_task", lambda task, **options: Digits())
    app = typer.Typer()
    app.command()(align_command)
    arguments = ["--arms", "flow:share=0.2,strength=3,random", "--batches", "3", "--out", str(tmp_path / "new" / "out")]
    arguments += ["--set", "num_prompts=3", "--set", "max_response_tokens=12", "--baselines", "uniform,random"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "flow:share=0.2,strength=3" in result.output
    assert "p (Holm)" in result.output
    assert "gradients 3/3" in result.output
    values = json.loads((tmp_path / "new" / "out" / "alignment.json").read_text())
    assert {pair["baseline"] for pair in values["differences"]} == {"uniform", "random"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out: must be a folder that can be made"):
        CliRunner().invoke(app, ["--out", str(tmp_path / "file" / "x")], catch_exceptions=False)
