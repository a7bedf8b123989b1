"""Every script of the gallery runs at toy size, has its picture and its page, and is found from the reference."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

from benchmarks import gallery
from tests.fixtures.tiny import tiny
from tests.test_docs import hook

NAMES = [path.stem for path in gallery.scripts()]


def entries() -> Any:
    return hook("gallery_entries")


def test_every_script_has_a_place_in_a_section():
    assert sorted(entries().entry_names()) == sorted(NAMES)


def test_every_entry_has_its_picture_and_its_results():
    results = json.loads(gallery.RESULTS.read_text(encoding="utf-8"))["entries"]
    assert sorted(results) == sorted(NAMES)
    assert sorted(path.stem for path in gallery.IMAGES.glob("*.svg")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_point_of_an_entry_fits_its_thumbnail(name: str):
    entry = entries().find_entry(name)
    assert len(entry.title) <= 40
    assert len(entry.point) <= 140
    # The thumbnail is a link itself.
    assert "](" not in entry.point


@pytest.mark.parametrize("name", NAMES)
def test_the_script_runs_with_a_tiny_model(name: str, monkeypatch: pytest.MonkeyPatch):
    from flowgraph import demo

    monkeypatch.setenv("FLOWGRAPH_GALLERY_SIZE", "toy")
    monkeypatch.setattr(demo, "load_demo_model", lambda *_: tiny())
    with warnings.catch_warnings():
        # The random model does not prefer the answers of the scripts, which some functions warn of.
        warnings.simplefilter("ignore", UserWarning)
        result = gallery.run(gallery.FOLDER / f"{name}.py")
    assert result.picture.startswith(b"<?xml")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_cells_and_both_downloads(name: str):
    pages = hook("gallery")
    entry = entries().find_entry(name)
    page = pages.page_of(entry)
    for cell in entry.cells:
        assert cell.source in page
    assert f"({name}.py)" in page
    assert f"({name}.ipynb)" in page
    notebook: Any = nbformat.reads(pages.notebook_of(name), as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code == [cell.source for cell in entry.cells if not cell.is_text]


def used(text: str, tmp_path: Path) -> set[str]:
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    return {f"{package}.{name}" for package, name in hook("script_names").names_used(script)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import flowgraph as fg\nfg.solve(graph)", {"solve", "Flow"}),
        ("import flowgraph\nflowgraph.solve(graph)", {"solve", "Flow"}),
        ("from flowgraph import solve as run\nrun(graph)", {"solve", "Flow"}),
        ("import flowgraph as fg\nfg.trace(m).sensitivity(m)", {"trace", "FlowTrace", "Sensitivity"}),
        ("import flowgraph as fg\nfg.trace(m, capacity='relevance')", {"trace", "RelevanceTrace"}),
        ("import flowgraph as fg\nt = fg.trace(m)\nfor r in t.routes(3):\n    r", {"trace", "FlowTrace", "Route"}),
        (
            "import flowgraph as fg\nx = fg.FlowGraph.from_dense(m)\nfg.max_flow(x)",
            {"FlowGraph", "max_flow", "MaxFlow"},
        ),
        ("import torch\nsolve = 1\ntorch.solve(solve)", set()),
        ("import flowgraph as fg\nfg.nothing_of_this_name()", set()),
    ],
)
def test_names_are_found_through_objects(text: str, names: set[str], tmp_path: Path):
    assert used(text, tmp_path) == {f"flowgraph.{name}" for name in names}


def test_the_reference_leads_to_entries_and_tutorials():
    names = hook("api_names")
    page = hook("reference")._page_of("flowgraph", "EdgeParts", names.public_names("flowgraph")["EdgeParts"], {})
    assert "](../../gallery/edge_by_head.md)" in page
    page = hook("reference")._page_of("rl", "CreditAuc", names.public_names("rl")["CreditAuc"], {})
    assert "](../../tutorials/train_with_credit.ipynb)" in page
