"""Every Python block of the documentation runs, in the order of its page, with nothing defined before.

A page is run in a fresh namespace and in an empty folder. Where it loads the demo model, a tiny random model takes its
place; the folder ``path/or/name`` holds the same model as a checkpoint.
"""

from __future__ import annotations

import doctest
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tiny import save_tiny, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NOT_RUN = {
    "train.md": "the task countdown needs reasoning-gym; tests/rl/test_docs.py runs both blocks with fewer steps",
    "credit.md": "the rules stay in the registry; tests/rl/test_docs.py runs all blocks and removes them afterwards",
}
"""Pages whose blocks another test runs, and why."""


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [block for language, block in FENCE.findall(text) if language in ("python", "py", "pycon")]


def pages_with_python() -> list[Path]:
    return [page for page in PAGES if python_blocks(page) and page.name not in NOT_RUN]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a reader has: an empty folder with a checkpoint in it, the demo model, and no names."""
    from flowgraph import demo
    from flowgraph.capacities import registry
    from flowgraph.evaluation import registry as evaluation

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load_demo_model", lambda *_: tiny())
    # Capacities that a page registers leave the registry again.
    for name, value in vars(registry).items():
        if name.isupper() and isinstance(value, dict):
            monkeypatch.setattr(registry, name, dict(value))
    for name in ("_TASKS", "_METHODS"):
        monkeypatch.setattr(evaluation, name, dict(getattr(evaluation, name)))
    save_tiny(tmp_path / "path" / "or" / "name")
    yield {"__name__": "__main__"}
    if "matplotlib.pyplot" in __import__("sys").modules:
        from matplotlib import pyplot

        pyplot.close("all")


def run_block(block: str, names: dict[str, Any], where: str) -> None:
    """Run a block, or a session with its results."""
    if block.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block, names, where, None, 0)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        names.update(test.globs)
        assert runner.summarize(verbose=False).failed == 0, "".join(report)
        return
    exec(compile(block, where, "exec"), names)


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: page.name)
def test_the_python_of_a_page_runs_in_order(page: Path, reader: dict[str, Any]):
    with warnings.catch_warnings():
        # The random model does not prefer the answers of the pages, which some functions warn of.
        warnings.simplefilter("ignore", UserWarning)
        for number, block in enumerate(python_blocks(page), start=1):
            run_block(block, reader, f"{page.name}, Python block {number}")


def test_every_page_that_is_not_run_here_is_run_elsewhere():
    elsewhere = (ROOT / "tests" / "rl" / "test_docs.py").read_text(encoding="utf-8")
    for name in NOT_RUN:
        assert python_blocks(ROOT / "docs" / name)
        assert f'blocks("{name}", "python")' in elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_has_the_columns_of_its_head(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    columns = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        # A bar inside code is part of a cell.
        cells = re.sub(r"`[^`]*`", "code", line).strip().strip("|").split("|")
        columns = columns or len(cells)
        assert len(cells) == columns, line
        assert line.endswith("|"), line


def test_no_page_lets_a_table_row_end_in_an_empty_explanation():
    text = (ROOT / "docs" / "certificate.md").read_text(encoding="utf-8")
    assert not re.search(r"\| *\|$", text, re.MULTILINE)


def test_the_reference_shows_no_roles_and_directives():
    names: dict[str, Any] = {}
    exec((ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"), names)
    rewritten = names["on_page_content"](
        "<p>The module :mod:<code>flowgraph.pages</code>, :func:<code>~flowgraph.solve</code>, "
        "<code>a:func:b</code> and schema <code>s</code>::</p>"
        "<p>.. math::\n    h = b + N^T h,</p><p>.. math::</p><pre>g = q</pre>"
    )
    assert rewritten == (
        "<p>The module <code>flowgraph.pages</code>, <code>flowgraph.solve</code>, "
        "<code>a:func:b</code> and schema <code>s</code>:</p>"
        "<pre><code>h = b + N^T h,</code></pre><pre>g = q</pre>"
    )
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "hooks: [docs/hooks.py]" in settings
