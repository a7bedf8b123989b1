"""``flowgraph-rl rules`` and ``report``."""

from __future__ import annotations

import re
from pathlib import Path

from rl import rule_names
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
