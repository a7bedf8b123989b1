"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

import tests.type_checker  # the import hook looks it up by name

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter
    from transformers import PreTrainedTokenizerBase

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Every argument, result and record of both packages is checked against its annotation, shapes and dtypes included. The
# hook has to stand before the first import of either package. FLOWGRAPH_CHECK_SHAPES=0 turns it off.
if os.environ.get("FLOWGRAPH_CHECK_SHAPES") != "0":
    modules = tests.type_checker.checked_modules()
    jaxtyping.install_import_hook(modules, f"{tests.type_checker.__name__}.check_calls")

# The machines that run this are shared: a slow moment is no finding.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Turn the type checks off in tests marked ``unchecked``, which pass values of a wrong type on purpose."""
    disabled = jaxtyping.config.jaxtyping_disable
    if item.get_closest_marker("unchecked"):
        jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", disabled)


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
