"""Rewrite the docstrings' markup for the site: the reference is rendered as Markdown, and docstrings use roles."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:mod|func|class|meth|attr|exc|data|math):(<code>)~?")
_FORMULA = re.compile(r"<p>\s*\.\. math::\s*(.*?)\s*</p>", re.DOTALL)
_DOUBLE_COLON = re.compile(r"::(</p>)")


def on_page_content(html: str, **_: Any) -> str:
    """Remove the names of roles and directives, and keep what they mark.

    Args:
        html: the content of a page.

    Example:
        >>> on_page_content("<p>See :func:<code>flowgraph.solve</code>, schema <code>a</code>::</p>")
        '<p>See <code>flowgraph.solve</code>, schema <code>a</code>:</p>'
    """
    html = _ROLE.sub(r"\1", html)
    html = _FORMULA.sub(_formula, html)
    return _DOUBLE_COLON.sub(r":\1", html)


def _formula(found: re.Match[str]) -> str:
    """Set the formula of a directive as code; where it stands in a block of its own, nothing is left here."""
    formula = found[1]
    return f"<pre><code>{formula}</code></pre>" if formula else ""
