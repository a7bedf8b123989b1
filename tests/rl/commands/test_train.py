"""``flowgraph-rl train``: what it writes, how it resumes, what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rl.commands.run_file import read_run
from rl.commands.train import _evaluation_command
from rl.training.tracking import read_metrics
from tests.fixtures.rl_commands import SHORT, SMALL, invoke


def test_train_writes_metrics_checkpoints_rollouts_and_its_settings(trained_run: Path):
    assert [row["step"] for row in read_metrics(trained_run / "metrics.jsonl")] == [1, 2]
    assert (trained_run / "checkpoint-000002" / "policy" / "adapter_config.json").is_file()
    assert len(list((trained_run / "rollouts").iterdir())) == 2
    settings = yaml.safe_load((trained_run / "run.yaml").read_text())
    assert (settings["task"], settings["task_options"]["hops"], settings["lora"]["rank"]) == ("chain", [1, 1], 2)
    assert settings["learning_rate"] == 0.01


def test_a_longer_run_resumes_and_equals_one_that_never_stopped(trained_run: Path, saved_model: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = ["--model", saved_model, *SHORT, "--credit", "flow", *SMALL]
    invoke("train", *common, "--steps", 3, "--output", whole)
    invoke("train", *common, "--steps", 2, "--output", cut)
    result = invoke("train", *common, "--steps", 3, "--output", cut, "--resume")
    assert "resumed after step 2" in result.stderr
    assert [row["step"] for row in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3]
    ends = [load_file(folder / "checkpoint-000003" / "policy" / "adapter_model.safetensors") for folder in (whole, cut)]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name
    before = load_file(trained_run / "checkpoint-000002" / "policy" / "adapter_model.safetensors")
    assert any(not torch.equal(weight, ends[0][name]) for name, weight in before.items())
    again = invoke("train", whole / "run.yaml", "--output", cut, "--resume")
    assert "resumed after step 3" in again.stderr


def test_a_finished_run_without_its_metrics_still_ends_well(trained_run: Path, saved_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    invoke("train", "--model", saved_model, *SHORT, *SMALL, "--steps", 1, "--output", folder)
    (folder / "metrics.jsonl").unlink()
    assert "metrics and checkpoints in" in invoke("train", folder / "run.yaml", "--resume").output


def test_a_step_in_which_nothing_was_learned_is_summed_up(saved_model: Path, tmp_path: Path):
    settings = ["--set", "truncated=mask", "--set", "max_response_tokens=1", "--output", tmp_path / "run", "--steps", 1]
    assert "reward" in invoke("train", "--model", saved_model, *SHORT, *SMALL, *settings).output


def test_show_settings_prints_them_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shown = invoke("train", "--show-settings", "--set", "credit.share=0.5", "--credit", "entropy").output
    assert yaml.safe_load(shown)["credit"]["share"] == 0.5
    assert yaml.safe_load(shown)["credit"]["rule"] == "entropy"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.yaml").write_text(shown)
    assert invoke("train", "run.yaml", "--show-settings").output == shown


@pytest.mark.parametrize(
    ("flags", "options", "command"),
    [
        ({}, [], "flowgraph-rl eval --adapter runs/chain-flow"),
        (
            {"task": "wandering"},
            ["level=4:0"],
            "flowgraph-rl eval --task wandering --task-option level=4:0 --adapter runs/wandering-flow",
        ),
        (
            {"task": "chain", "model": "my base"},
            ["hops=[1,2]"],
            "flowgraph-rl eval --task-option 'hops=[1, 2]' --model 'my base' --adapter runs/chain-flow",
        ),
        ({"task": "chain", "model": "wandering"}, [], "flowgraph-rl eval --model wandering --adapter runs/chain-flow"),
    ],
)
def test_the_summary_names_the_command_that_evaluates_the_run(flags: dict, options: list[str], command: str):
    run = read_run(None, flags, credit=None, settings=[], task_options=options)
    assert _evaluation_command(run) == command
