"""Run the tutorials and write them as notebooks with their outputs into docs/tutorials.

    python -m benchmarks.tutorials                      all of them
    python -m benchmarks.tutorials first_trace          one of them

A tutorial is a Python script in the percent format, which jupytext reads; the notebook is made from it, never edited.
Each runs in an empty folder, in a fresh kernel of this environment.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext  # pyright: ignore[reportMissingImports]
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from flowgraph import atomic_write

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "tutorials"
ORDER = ("first_trace", "which_evidence", "reasoning_steps", "graphs_and_max_flow", "train_with_credit")
TIME_LIMIT = 600
"""Seconds that a cell may take."""


def scripts() -> list[Path]:
    """List the tutorials, in the order in which they are read."""
    return [FOLDER / f"{name}.py" for name in ORDER if (FOLDER / f"{name}.py").is_file()]


def as_notebook(script: Path) -> NotebookNode:
    """Return a script as a notebook without outputs; cell ids are numbers, so that equal scripts give equal files."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def run(script: Path) -> NotebookNode:
    """Run a tutorial and return its notebook with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = as_notebook(script)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        client = NotebookClient(
            notebook, timeout=TIME_LIMIT, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute(env=environment)

    # Times of execution would change the file at each run; progress on stderr is no result.
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run the tutorials that are asked for and write their notebooks."""
    parser = argparse.ArgumentParser(description="Run tutorials and write their notebooks.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(path.stem for path in scripts())}; default: all")
    names = parser.parse_args().names
    known = {path.stem: path for path in scripts()}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"names: must be of {', '.join(known)}, got {', '.join(unknown)}; leave them out for all")

    for name in names or known:
        begun = time.perf_counter()
        notebook = run(known[name])
        target = FOLDER / f"{name}.ipynb"
        with atomic_write(target) as temporary:
            temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(
            f"{target.relative_to(ROOT)}: {time.perf_counter() - begun:.0f} s, {target.stat().st_size / 1024:.0f} KiB"
        )


if __name__ == "__main__":
    main()
