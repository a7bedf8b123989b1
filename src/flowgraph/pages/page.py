"""Render one self-contained HTML page, which runs its own script and makes no network request.

Every page has the same shell (``page.html.jinja``), the same base style (``page.css``, with the colours of
:mod:`flowgraph.display.palette`) and the same script helpers (``signs.js``, ``base.js``).

Token text is data: it travels as JSON with every markup character escaped, and scripts write it by ``textContent``
only. In addition, a Content-Security-Policy names the one script and the one style sheet by their hashes, so that a
browser runs nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from flowgraph.display.palette import css_variables
from flowgraph.display.signs import visible
from flowgraph.errors import InvalidInputError

_SHELL = "page.html.jinja"
_SHARED_STYLE = "page.css"
_SHARED_SCRIPTS = ("scripts/signs.js", "scripts/base.js")
_THEME_BUTTON = Markup('<button type="button" class="small" id="theme" data-theme="auto">Theme: auto</button>')


def render_page(
    template: str,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    libraries: Sequence[str] = (),
    data_id: str = "",
    page_data: Any = None,
    **values: Any,
) -> str:
    """Render one self-contained HTML page.

    Args:
        template: Jinja source that extends ``page.html.jinja`` and fills its blocks ``title`` and ``body`` (and
            ``noscript``, the sentence shown where scripts are switched off). ``{{ theme_button }}`` in the body is the
            switch between themes. The filter ``visible`` replaces invisible characters by signs.
        styles: CSS texts of the page, after the shared ones; not escaped.
        scripts: JavaScript texts of the page, which run after the shared helpers, in one function with them; not
            escaped.
        libraries: JavaScript texts that run before that function, in the global scope; not escaped.
        data_id: id of the script element that holds the data; no data by default.
        page_data: JSON values, which the script reads as ``page``.
        **values: of the template, which escapes them.

    Returns:
        The page as HTML, with one style element and one script element.

    Raises:
        InvalidInputError: page_data holds a number that is not finite.
    """
    # Style and script are part of the page, and their hashes are what its policy allows.
    style = "\n".join([css_variables(), asset(_SHARED_STYLE), *map(_normal_lines, styles)])
    script = join_scripts(scripts, libraries)
    # A value that the template uses and no caller passes is an error, not an empty place.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({_SHELL: asset(_SHELL)}),
    )
    environment.filters["visible"] = visible
    return environment.from_string(template).render(
        policy=_content_security_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data_id=data_id,
        page_data=Markup(_embeddable(page_data)),
        theme_button=_THEME_BUTTON,
        **values,
    )


def join_scripts(scripts: Sequence[str], libraries: Sequence[str] = ()) -> str:
    """Join libraries, shared helpers and scripts; helpers and scripts are the body of one function."""
    parts = [*map(asset, _SHARED_SCRIPTS), *map(_normal_lines, scripts)]
    body = "\n".join(['"use strict";\n(() => {', *parts, "})();\n"])
    return "\n".join([*map(_normal_lines, libraries), body])


def asset(name: str) -> str:
    """Read one of the templates' files as text."""
    return _normal_lines((files("flowgraph.pages") / "templates" / name).read_text(encoding="utf-8"))


def _normal_lines(text: str) -> str:
    """Return the text with LF line ends: a browser turns CRLF into LF before it computes the hash of a script."""
    return text.replace("\r\n", "\n")


def _content_security_policy(style: str, script: str) -> Markup:
    """Return the policy that allows exactly this style sheet and this script, and no request."""
    sources = {
        "default-src": "'none'",
        "script-src": _csp_hash(script),
        "style-src": _csp_hash(style),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return Markup("; ".join(f"{directive} {source}" for directive, source in sources.items()))


def _csp_hash(content: str) -> str:
    """Return the source expression that lets a browser run exactly this inline content."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embeddable(values: Any) -> str:
    """Write JSON that can neither end nor alter the script element around it; lone surrogates stay escaped."""
    try:
        text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise InvalidInputError(
            f"page_data: must hold JSON values with finite numbers, got an error ({error}); use None for other numbers"
        ) from error
    # "</script>" and "<!--" have a meaning also inside a string.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def percent(share: float) -> str:
    """Write a share as a percentage with one decimal; a share just below 1 is 99.9 %, not 100 %."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        return "99.9 %"
    return f"{text.removesuffix('.0')} %"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values as (name with dots, text), both without invisible characters."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{path}.")
            continue
        if value is None:
            text = "none"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            text = ", ".join(map(str, value))
        else:
            text = str(value)
        yield visible(path), visible(text)
