"""Tutorials run at toy size, and their committed notebooks are those of their scripts."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
from benchmarks.tutorials import FOLDER, ORDER, as_notebook, scripts

from tests.fixtures.tiny import tiny

NAMES = [path.stem for path in scripts()]


def test_every_tutorial_has_a_place_in_the_order():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(NAMES)
    assert [name for name in ORDER if name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_made_from_the_script(name: str):
    notebook: Any = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    script = as_notebook(FOLDER / f"{name}.py")
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells]


@pytest.mark.parametrize("name", NAMES)
def test_no_output_of_a_notebook_is_an_error(name: str):
    notebook: Any = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_the_script_runs_with_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from flowgraph import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWGRAPH_TUTORIAL_SIZE", "toy")
    monkeypatch.setattr(demo, "load_demo_model", lambda *_: tiny())
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # The random model does not prefer the answers of the tutorials, which some functions warn of.
        warnings.simplefilter("ignore", UserWarning)
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
