"""Public names of the packages and their docstrings, read from the sources without importing them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src"
_IMPORT = re.compile(r"^from \.([\w.]*) import (\w+) as (\w+)$", re.MULTILINE)


@cache
def public_names(package: str) -> dict[str, str]:
    """Map the public names of a package to where they are defined, as its stub lists them.

    Args:
        package: ``"flowgraph"`` or ``"rl"``.
    """
    stub = (SOURCES / package / "__init__.pyi").read_text(encoding="utf-8")
    names = {}
    for module, name, public in _IMPORT.findall(stub):
        parts = [package, module, name]
        names[public] = ".".join(part for part in parts if part)
    return names


@cache
def summary_of(place: str) -> str:
    """Return the first sentence of an object's docstring, without the markup of roles."""
    paragraph = docstring_of(place).strip().split("\n\n")[0]
    text = re.sub(r"\s+", " ", paragraph)
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    sentence = re.match(r".*?[.:](?=\s|$)", text)
    return (sentence[0] if sentence else text).rstrip(":")


@cache
def docstring_of(place: str) -> str:
    """Return the docstring of an object or a module; empty where it has none."""
    as_module = _source(place)
    if as_module is not None:
        return ast.get_docstring(_tree(as_module)) or ""
    definition = definition_of(place)
    return "" if definition is None else ast.get_docstring(definition) or ""


@cache
def definition_of(place: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Return the definition of a function or a class; of overloads, the implementation; None where there is none."""
    module, _, name = place.rpartition(".")
    source = _source(module)
    if source is None:
        return None
    for node in _tree(source).body:
        # Overloads have no docstring; the implementation comes after them.
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_definition and node.name == name and ast.get_docstring(node):
            return node
    return None


@cache
def overloads_of(place: str) -> list[ast.FunctionDef]:
    """List the overloads of a function in their order; empty where it has none."""
    module, _, name = place.rpartition(".")
    source = _source(module)
    if source is None:
        return []
    found = []
    for node in _tree(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            decorators = [decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)]
            if "overload" in decorators:
                found.append(node)
    return found


@cache
def _tree(source: Path) -> ast.Module:
    """Parse a source file."""
    return ast.parse(source.read_text(encoding="utf-8"))


def _source(module: str) -> Path | None:
    """Return the file of a module or package, or None."""
    path = SOURCES.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    package = path / "__init__.py"
    return package if package.is_file() else None
