"""What every page shares: one self-contained file that runs its own script and nothing else.

Token text is data in a page: it travels as JSON with every markup character escaped, and scripts write it by
``textContent`` only. A Content-Security-Policy that names the one script and the one style sheet by their hashes
stands behind that.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def render_page(template: str, *, style: str, script: str, page_data: Any = None, **values: Any) -> str:
    """A page from a template of this package, which gets style, script, their hashes and the data beside its values.

    Args:
        template: name of the template.
        style: CSS of our own, which is not escaped.
        script: JavaScript of our own or vendored unchanged, which is not escaped.
        page_data: JSON values for the script.
        values: for the template, which escapes them.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(asset(template)).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        page_data=Markup(_embeddable(page_data)),
        **values,
    )


def asset(name: str) -> str:
    """One of the templates' files as text."""
    text = (files("flowgraph.pages") / "templates" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")  # browsers hash what they parsed, and parsing turns CRLF into LF


def one_function(*names: str) -> str:
    """Script files as the body of one function, so that nothing of them is global."""
    return "\n".join(['"use strict";\n(() => {', *map(asset, names), "})();\n"])


def _csp_hash(content: str) -> str:
    """The source expression that lets a browser run exactly this inline content."""
    digest = hashlib.sha256(content.encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")


def _embeddable(values: Any) -> str:
    """JSON that can neither end nor alter the script element around it; lone surrogates stay escaped."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def percent(share: float) -> str:
    """A share as a percentage that says 100 only when it is all."""
    text = f"{100 * share:.1f}"
    return f"{'99.9' if text == '100.0' and share < 1 else text.removesuffix('.0')} %"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as printable names with dots, and printable texts."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield printable(prefix + str(name)), printable(", ".join(map(str, value)))
        else:
            yield printable(prefix + str(name)), printable("none" if value is None else str(value))


def printable(text: str) -> str:
    """Text whose invisible and direction-changing characters show as replacement characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
