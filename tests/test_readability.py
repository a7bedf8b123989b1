"""The density of the code does not get worse: tokens a line, comments, tuple assignments, switched-off formatting.

The figures are per code line (not blank, comment or docstring) of both packages. They are bounds, not aims: clear
code needs no change to meet them, and no line is split to meet them.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

import flowgraph

SOURCE = Path(flowgraph.__file__).parent.parent
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def figures_of(folder: Path) -> dict[str, float]:
    """Count code lines, tokens, own-line comments, tuple assignments and formatter pragmas below a folder."""
    lines = tokens = comments = tuples = pragmas = 0
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        documented = docstring_lines(tree)
        on_line: dict[int, int] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
                on_line[token.start[0]] = on_line.get(token.start[0], 0) + 1
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            pragmas += "# fmt: skip" in line
            if stripped.startswith("#"):
                comments += 1
            elif stripped and number not in documented:
                lines += 1
                tokens += on_line.get(number, 0)
        tuples += sum(assigns_unrelated_names(node) for node in ast.walk(tree))
    return {
        "tokens a line": tokens / lines,
        "comments": 1000 * comments / lines,
        "tuple assignments": 1000 * tuples / lines,
        "formatter switched off": pragmas,
    }


def docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def assigns_unrelated_names(node: ast.AST) -> bool:
    """Tell ``a, b = x, y`` from the unpacking of one value."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


@pytest.mark.parametrize("package", ["flowgraph", "rl"])
def test_the_code_does_not_get_denser(package: str):
    figures = figures_of(SOURCE / package)
    assert figures["tokens a line"] < 8.2
    assert figures["comments"] > 42
    assert figures["tuple assignments"] < 3
    assert figures["formatter switched off"] <= 8


def test_the_figures_see_what_they_count(tmp_path: Path):
    (tmp_path / "dense.py").write_text('"""Text."""\n\n# why\na, b = 1, 2\nc, d = f()\n', encoding="utf-8")
    figures = figures_of(tmp_path)
    assert figures == {
        "tokens a line": 7,
        "comments": 500,
        "tuple assignments": 500,
        "formatter switched off": 0,
    }
