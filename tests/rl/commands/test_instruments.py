"""``flowgraph-rl auc``, ``credit-bench`` and ``curves``: tables, files and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl import CheckpointError, ConfigError, CreditError, TaskError
from tests.fixtures.policies import Digits, alphabet, tiny_policy
from tests.fixtures.rl_commands import invoke
from tests.rl.alignment.test_credit_auc import DetourDigits


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.policy.loading.load_model", lambda name, dtype, **options: (tiny_policy(), alphabet()))
    monkeypatch.setattr("rl.tasks.registry.make_task", lambda task, **options: DetourDigits())


SHORT = ["--set", "max_response_tokens=8", "--set", "group_size=2"]


def test_auc_prints_tables_and_writes_rows(small: None, tmp_path: Path):
    folder = tmp_path / "new" / "auc"
    done = invoke("auc", "--rules", "oracle,flow:soft:layers=all,random", "-n", 4, *SHORT, "--out", folder)
    assert "flow:soft:layers=all" in done.output
    assert "opener" in done.output
    assert "8 responses to 4 problems" in done.output
    rows = json.loads((folder / "auc.json").read_text())
    assert [row["rule"] for row in rows] == ["oracle", "flow:soft:layers=all", "random"]
    assert (folder / "auc.png").is_file()


def test_auc_sweep_names_the_best_graph(small: None):
    done = invoke("auc", "--rules", "reach_sharp", "--sweep", "-n", 12, "--set", "max_response_tokens=16")
    assert "best of 32 graphs: reach_sharp:" in done.output


def test_auc_sweep_needs_responses_with_both_groups(small: None):
    result = invoke("auc", "--rules", "reach_sharp", "--sweep", "-n", 2, "--set", "max_response_tokens=1", code=1)
    assert isinstance(result.exception, TaskError)
    assert "must give responses with decisive tokens and detours" in str(result.exception)


def test_auc_refuses_a_task_without_masks_and_unknown_rules(small: None, monkeypatch: pytest.MonkeyPatch):
    result = invoke("auc", "--rules", "flw", code=1)
    assert isinstance(result.exception, CreditError)
    monkeypatch.setattr("rl.tasks.registry.make_task", lambda task, **options: Digits())
    result = invoke("auc", "-n", 2, *SHORT, code=1)
    assert isinstance(result.exception, TaskError)
    assert "define detours(sample, completion)" in str(result.exception)


def test_credit_bench_prints_a_table_and_continues(small: None, tmp_path: Path):
    arguments = ["credit-bench", "--rules", "flow:soft", "-n", 3, "-k", 4, *SHORT, "--out", tmp_path]
    done = invoke(*arguments)
    assert "flow:soft" in done.output
    assert "6 responses to 3 problems" in done.output
    content = json.loads((tmp_path / "credit_bench.json").read_text())
    assert content["num_rollouts"] == 4
    if not content["reliable"]:
        assert "take more rollouts (-k) or more problems (-n)" in done.output
    lines = (tmp_path / "values.jsonl").read_text()
    assert invoke(*arguments).output == done.output
    assert (tmp_path / "values.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per", "word"], "--per: must be 'token' or 'step', got 'word'; choose one of them"),
        (["--step-end", ";"], "--step-end: must come with --per step, got ';' with tokens; add --per step"),
        (["--per", "step", "--step-end", "("], "--step-end: must be a regular expression, got '('"),
        (["-k", "3"], "num_rollouts: must be an even number of at least 4"),
    ],
)
def test_credit_bench_refuses_bad_options(small: None, arguments: list[str], message: str):
    result = invoke("credit-bench", *arguments, code=1)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_curves_are_drawn_side_by_side(tmp_path: Path):
    for name, rewards in (("plain", [0.0, 0.0, 0.5, 0.5]), ("flow", [0.0, 0.5, 1.0, 1.0])):
        run = tmp_path / name
        run.mkdir()
        rows = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "curves.png"
    done = invoke("curves", tmp_path / "plain", tmp_path / "flow", "--window", 1, "--out", picture)
    # One scale for both: half the height for the plain run's best step.
    assert "▁▁▅▅" in done.output
    assert "▁▅██" in done.output
    assert "0.250" in done.output
    assert "0.625" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_curves_of_no_run_are_refused(tmp_path: Path):
    result = invoke("curves", tmp_path, code=1)
    assert isinstance(result.exception, CheckpointError)
    assert "runs: must be folders of runs with a finished step" in str(result.exception)
