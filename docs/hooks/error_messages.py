"""Collect the messages of each exception class from the sources, for the pages of the exceptions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from api_names import SOURCES

_PARTS = re.compile(r"(?P<argument>[^:]+?): (?P<rule>.+?), got (?P<got>.+?); (?P<remedy>.+)", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """One message: the argument, the rule that it breaks, and the remedy; values appear as ``…``."""

    argument: str
    rule: str
    remedy: str


@cache
def messages_of(package: str) -> dict[str, list[Message]]:
    """Map each exception class to the messages that a package raises it with, sorted by argument.

    Args:
        package: ``"flowgraph"`` or ``"rl"``.
    """
    found: dict[str, set[Message]] = {}
    for path in sorted((SOURCES / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, template in _raised(tree):
            parts = _PARTS.fullmatch(template)
            if parts is not None:
                message = Message(parts["argument"], parts["rule"], parts["remedy"])
                found.setdefault(name, set()).add(message)
    return {name: sorted(messages, key=lambda one: (one.argument, one.rule)) for name, messages in found.items()}


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Find every construction of an exception with a text, as (class, text)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        text = _template(node.args[0])
        if node.func.id.endswith("Error") and text is not None:
            yield node.func.id, re.sub(r"\s+", " ", text)


def _template(node: ast.expr) -> str | None:
    """Return the text of a string or f-string; each value in it appears as ``…``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(str(part) for part in parts)
    return None


def table_of(messages: list[Message]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| argument | rule | what to do |", "|---|---|---|"]
    for message in messages:
        cells = (message.argument, message.rule, message.remedy)
        escaped = [re.sub(r"([|<>*_`\\])", r"\\\1", cell) for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return lines
