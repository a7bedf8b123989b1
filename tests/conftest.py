"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter
    from transformers import PreTrainedTokenizerBase

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The machines that run this are shared: a slow moment is no finding.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Say last how many tests of pages were skipped for want of a browser, and how to install one."""
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if "chromium" in str(report.longrepr).lower()
    ]
    if skipped:
        terminalreporter.write_line(
            f"browser: must be on the PATH for the tests of pages, got neither chromium nor google-chrome, so "
            f"{len(skipped)} tests were skipped; install one, as in: apt-get install chromium",
            yellow=True,
        )


@pytest.fixture(scope="session")
def slow_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from tests.fixtures import tokenizers

    return tokenizers.slow_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))
