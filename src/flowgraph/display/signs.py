"""Signs for invisible characters, so that token text can be shown wherever it comes from.

Control and format characters, surrogates, private-use characters, and line and paragraph separators have no glyph of
their own; some of them reorder the text around them, and some control a terminal. The script ``signs.js`` of the pages
applies the same rules.
"""

from __future__ import annotations

import re
import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories whose characters are shown as signs."""
_JOINERS = frozenset("\u200c\u200d")
"""Joiners change the shape of their neighbours in words and emoji; only a joiner on its own is shown as a sign."""
_SIGNS = {"\n": "⏎", "\t": "⇥", "\x7f": "␡"}
_FIRST_CONTROL_PICTURE = 0x2400
_ROLE = re.compile(r":\w+:`([^`]*)`")


def visible(text: str) -> str:
    """Replace each invisible character of a text by a sign.

    Example:
        >>> visible("a\\tb\\x00\\u202e")
        'a⇥b␀⟨U+202E⟩'
    """
    if text in _JOINERS:
        return _sign(text)
    shown = []
    for character in text:
        is_hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
        shown.append(_sign(character) if is_hidden else character)
    return "".join(shown)


def visible_name(token: str) -> str:
    """Name a token in a list: its visible text without spaces at the ends, or a sign for each space.

    Example:
        >>> visible_name(" apples"), visible_name("  ")
        ('apples', '␣␣')
    """
    return visible(token.strip(" ")) or "␣" * len(token)


def _sign(character: str) -> str:
    code = ord(character)
    if character in _SIGNS:
        return _SIGNS[character]
    if code < 0x20:
        return chr(_FIRST_CONTROL_PICTURE + code)
    return f"⟨U+{code:04X}⟩"


def without_roles(text: str) -> str:
    """Return a line of a docstring without the marks of its roles.

    Example:
        >>> without_roles("Norm of :math:`x`.")
        'Norm of x.'
    """
    return _ROLE.sub(r"\1", text)
