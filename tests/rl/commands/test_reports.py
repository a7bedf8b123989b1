"""``flowgraph-rl rules`` and ``report``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rl import CheckpointError, CreditError, rule_names
from rl.commands.run_file import newest_rollout
from tests.fixtures.rl_commands import invoke


def test_rules_lists_all_of_them():
    shown = invoke("rules").output
    for name in rule_names():
        assert re.search(rf"^\s*{name}\s", shown, re.MULTILINE), name
    assert "a backward pass" in shown
    assert "ground truth" in shown


def test_report_writes_the_page_of_the_newest_rollout(trained_run: Path, tmp_path: Path):
    page = tmp_path / "report.html"
    shown = invoke("report", trained_run, "--out", page).output
    assert "".join(shown.split("\n")) == f"wrote {page}"
    assert "<html" in page.read_text(encoding="utf-8")


def test_report_shows_what_other_rules_would_mark(trained_run: Path, tmp_path: Path):
    page = tmp_path / "report.html"
    invoke("report", trained_run, "--out", page, "--rules", "oracle:soft,reach_sharp:soft:floor=0.5,ceiling=2")
    text = page.read_text(encoding="utf-8")
    assert "weight by oracle:soft" in text
    assert "weight by reach_sharp:soft:floor=0.5,ceiling=2" in text


def test_report_refuses_an_unknown_rule_and_a_rollout_without_its_run(trained_run: Path, tmp_path: Path):
    result = invoke("report", trained_run, "--out", tmp_path / "a.html", "--rules", "flw", code=1)
    assert isinstance(result.exception, CreditError)
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "step.safetensors"
    shutil.copy(newest_rollout(trained_run), alone)
    result = invoke("report", alone, "--out", tmp_path / "a.html", "--rules", "flow", code=1)
    assert isinstance(result.exception, CheckpointError)
    assert "must be a run, a checkpoint or a PEFT folder" in str(result.exception)
