"""Every Python block of the documentation runs, in the order of its page, with nothing defined before.

A page is run in a fresh namespace and in an empty folder. Where it loads the demo model, a tiny random model takes its
place; the folder ``path/or/name`` holds the same model as a checkpoint.
"""

from __future__ import annotations

import doctest
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper_index
from tests.fixtures.tiny import save_tiny, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NOT_RUN = {
    "train.md": "the task countdown needs reasoning-gym; tests/rl/test_docs.py runs both blocks with fewer steps",
    "credit.md": "the rules stay in the registry; tests/rl/test_docs.py runs all blocks and removes them afterwards",
    "engines.md": "the engines are not installed; tests/rl/integrations/test_engines.py checks the imports",
    "service.md": "it asks a running service; tests/rl/integrations/test_service.py runs the block with one",
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

    # The built-in tasks and methods register themselves here, not while the registries are replaced.
    from flowgraph.evaluation import catalogue as _catalogue  # noqa: F401
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


def test_every_line_of_the_paper_index_runs(reader: dict[str, Any]):
    page = ROOT / "docs" / "papers.md"
    lines = [row[2].strip("`") for row in paper_index.rows_of(page.read_text(encoding="utf-8"))]
    assert len(lines) > 60
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for block in python_blocks(page):
            run_block(block, reader, page.name)
        for line in lines:
            run_block(line, reader, f"{page.name}, {line}")


def test_every_page_that_is_not_run_here_is_run_elsewhere():
    folder = ROOT / "tests" / "rl"
    adapters = folder / "integrations"
    elsewhere = [folder / "test_docs.py", adapters / "test_engines.py", adapters / "test_service.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in elsewhere)
    for name in NOT_RUN:
        assert python_blocks(ROOT / "docs" / name)
        assert f'"{name}"' in text


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


def hook(name: str) -> Any:
    """Import a hook of the site as a module; hooks import each other by name."""
    folder = str(ROOT / "docs" / "hooks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def test_the_reference_shows_no_roles_and_directives():
    markup = hook("markup")
    docstring = markup.with_markdown_formulas(
        "One :math:`a_b`.\n\n.. math:: h = b + N^\\top h\n\nText.\n\n.. math::\n    f\n    = g\n\nEnd."
    )
    assert docstring == "One $a_b$.\n\n\n$$\nh = b + N^\\top h\n$$\n\nText.\n\n\n$$\nf = g\n$$\n\nEnd."
    rewritten = markup.on_page_content(
        "<p>The module :mod:<code>flowgraph.pages</code>, :func:<code>~flowgraph.solve</code>, "
        "<code>a:func:b</code> and schema <code>s</code>::</p>"
    )
    assert rewritten == (
        "<p>The module <code>flowgraph.pages</code>, <code>flowgraph.solve</code>, "
        "<code>a:func:b</code> and schema <code>s</code>:</p>"
    )


def test_formulas_become_mathml():
    html = hook("markup").on_page_content('<p><span class="arithmatex">\\(f &lt; g\\)</span></p>')
    assert "<math" in html
    assert "&#x0003C;" in html
    assert "arithmatex" not in html


def test_every_public_name_has_a_summary_for_the_reference():
    names = hook("api_names")
    for package in ("flowgraph", "rl"):
        for public, place in names.public_names(package).items():
            if public != "selectors":
                assert names.summary_of(place), place


def test_the_page_of_an_exception_lists_its_messages():
    messages = hook("error_messages").messages_of("flowgraph")
    found = [one for one in messages["InvalidInputError"] if one.argument == "damping"]
    assert "must lie in (0, 1]" in found[0].rule
    assert found[0].remedy == "1 is undamped"


def test_every_exception_class_stands_on_the_page_of_errors():
    names = hook("api_names")
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for package in ("flowgraph", "rl"):
        for public, place in names.public_names(package).items():
            if place.startswith(f"{package}.errors.") and public != "FlowgraphError":
                assert f"api/{package}/{public}.md" in page
