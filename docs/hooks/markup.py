"""Rewrite the docstrings' markup for the site, and render formulas.

Docstrings use reStructuredText roles and directives, and the site is Markdown. A griffe extension turns formulas of
docstrings into the form that pages use, ``$...$``; after rendering, every formula becomes MathML, which browsers draw
without a script. Roles that name a public object become links to its page.
"""

from __future__ import annotations

import html as html_escapes
import re
from typing import Any

import griffe
from api_names import public_names
from latex2mathml.converter import convert
from mkdocs.structure.pages import Page

_INLINE_FORMULA = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:mod|func|class|meth|attr|exc|data):<code>~?([^<]*)</code>")
_DOUBLE_COLON = re.compile(r"::(</p>)")
_RENDERED_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_RENDERED_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_PUBLIC_NAME = re.compile(r"(flowgraph|rl)\.([A-Za-z_]+)(\.[A-Za-z_]+)?")


class FormulaExtension(griffe.Extension):
    """Rewrite the formulas of docstrings as Markdown when the source is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = with_markdown_formulas(obj.docstring.value)


def with_markdown_formulas(docstring: str) -> str:
    r"""Replace the directive ``math`` by ``$$`` blocks and the role ``math`` by ``$``.

    Args:
        docstring: its text.

    Example:
        >>> with_markdown_formulas("A sum :math:`a + b`.")
        'A sum $a + b$.'
        >>> with_markdown_formulas(".. math:: a\n\nText.")
        '\n$$\na\n$$\n\nText.'
    """
    docstring = _INLINE_FORMULA.sub(r"$\1$", docstring)
    lines = docstring.split("\n")
    result: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        indent = line[: len(line) - len(line.lstrip())]
        if not line.lstrip().startswith(".. math::"):
            result.append(line)
            position += 1
            continue

        # The formula: the rest of the directive's line, and the lines below it that are indented further.
        formula = [line.lstrip().removeprefix(".. math::").strip()]
        position += 1
        while position < len(lines):
            following = lines[position]
            is_deeper = following.startswith(indent + " ")
            if following.strip() and not is_deeper:
                break
            if not following.strip() and any(formula):
                break
            formula.append(following.strip())
            position += 1
        text = " ".join(part for part in formula if part)
        result += ["", f"{indent}$$", f"{indent}{text}", f"{indent}$$"]
    return "\n".join(result)


def on_page_content(html: str, page: Page | None = None, **_: Any) -> str:
    r"""Render formulas, and replace roles by the names that they mark.

    Args:
        html: the content of a page.
        page: the page, from whose place links are counted; None: names are not linked.

    Example:
        >>> on_page_content("<p>See :func:<code>flowgraph.solve</code>, schema <code>a</code>::</p>")
        '<p>See <code>flowgraph.solve</code>, schema <code>a</code>:</p>'
    """
    html = _RENDERED_BLOCK.sub(lambda found: _mathml(found[1], "block"), html)
    html = _RENDERED_INLINE.sub(lambda found: _mathml(found[1], "inline"), html)
    depth = 0 if page is None else page.url.count("/")
    linked = page is not None
    html = _ROLE.sub(lambda found: _name(found[1], "../" * depth if linked else None), html)
    return _DOUBLE_COLON.sub(r":\1", html)


def _mathml(formula: str, display: str) -> str:
    """Return a formula as MathML; its text stays as the label that a screen reader and a search find."""
    # The letter T as a superscript, since the symbol of a transpose is drawn as large as an operator.
    text = html_escapes.unescape(formula).strip().replace(r"^\top", r"^{\mathsf{T}}")
    return convert(text, display=display)


def _name(name: str, root: str | None) -> str:
    """Return a name as code, with a link where the site has a page of it."""
    code = f"<code>{name}</code>"
    found = _PUBLIC_NAME.fullmatch(name)
    if root is None or found is None:
        return code
    package, public, _ = found.groups()
    if public not in public_names(package):
        return code
    return f'<a href="{root}api/{package}/{public}/">{code}</a>'
