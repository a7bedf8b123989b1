"""Find a literal text in another: complete words and numbers, in any script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from flowgraph.text.spans import Offsets

# Scripts written without spaces, or whose particles attach to a word: no word border is needed beside them.
_NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
_GROUP_MARK = r"(?:,|\{,\}|\\,|['’\u00a0\u202f\u2009])"  # noqa: RUF001
# A number as texts write it: a sign, digits that may be grouped in threes, decimals, an exponent of ten.
NUMBER = re.compile(
    rf"[-+−]?(?:\d{{1,3}}(?:{_GROUP_MARK}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{{1,3}})?|[-+−]?\.\d+",  # noqa: RUF001
    re.ASCII,
)
_SIGNS = "-+−"  # noqa: RUF001
_MAX_DIGITS = 1000
"""Longest number that is compared by value, in characters."""


def literal_spans(text: str, wanted: str) -> list[Offsets]:
    """Find all places where a text stands as complete words or as a complete number.

    A letter or digit at the border of ``wanted`` must not continue a word outside: "7" is not found in "17", "7.5",
    "1,007" or "x7". A unit may follow a number ("7km"), and scripts without spaces need no border ("是7个"). A
    number that does not occur as written is found by its value: 1234 in "1,234", 7.0 in "7".

    Args:
        text: where to search.
        wanted: what to find, with a visible character.

    Returns:
        The places, in the order of the text.

    Cost: linear in the text.
    """
    complete = [span for span in occurrences(text, wanted) if is_complete(text, span)]
    value = number_value(wanted)
    if complete or value is None:
        return complete
    same_value = []
    for match in NUMBER.finditer(text):
        start, end = match.span()
        # A sign is part of the number only where nothing stands in front of it.
        if match[0][0] in _SIGNS and not _is_sign(text, start):
            start += 1
        if number_value(text[start:end]) == value and is_complete(text, (start, end)):
            same_value.append((start, end))
    return same_value


def occurrences(text: str, wanted: str) -> Iterator[Offsets]:
    """Find all places where a text occurs, also as a part of a word."""
    for match in re.finditer(re.escape(wanted), text):
        yield match.span()


def is_complete(text: str, span: Offsets) -> bool:
    """Return whether a place in a text is not a part of a longer word or number."""
    start, end = span
    wanted = text[start:end]
    before = text[max(0, start - 24) : start]
    after = text[end : end + 24]

    # A number continues over digits, signs and separators.
    if number_value(wanted) is not None:
        return not (_continues_number_before(before, wanted) or _continues_number_after(after))

    # A word continues where two of its characters meet.
    is_joined_before = bool(before) and _is_word(before[-1]) and _is_word(wanted[0])
    is_joined_after = bool(after) and _is_word(after[0]) and _is_word(wanted[-1])
    return not (is_joined_before or is_joined_after)


def longer_word(text: str, span: Offsets) -> str:
    """Return the word or number that a place in a text belongs to, for messages."""
    start, end = span
    before = re.search(r"[^\s()\[\]]{0,20}\Z", text[max(0, start - 20) : start])
    after = re.match(r"[^\s()\[\]]{0,20}", text[end : end + 20])
    prefix = before[0] if before else ""
    suffix = after[0] if after else ""
    return prefix + text[start:end] + suffix


def number_value(text: str) -> Fraction | None:
    """Return the exact value of a number as texts write it; None for any other text."""
    if len(text) > _MAX_DIGITS or not NUMBER.fullmatch(text):
        return None
    plain = re.sub(_GROUP_MARK, "", text).replace("−", "-")  # noqa: RUF001
    return Fraction(plain)


def _is_word(character: str) -> bool:
    """Return whether a character belongs to a word of a script that separates words."""
    is_word = character.isalnum() or character == "_"
    return is_word and not _NO_SPACES.match(character)


def _continues_number_before(before: str, wanted: str) -> bool:
    """Return whether the characters before a number belong to it: a letter, a digit, a point, a sign."""
    if not before:
        return False
    last = before[-1]
    if wanted[0] in _SIGNS:
        # "10-7" holds no -7.
        return last.isalnum() or last == ")"
    if _is_word(last):
        return True
    if last in _SIGNS:
        return last != "+" and _is_sign(before, len(before) - 1)
    if last == ".":
        # ".7" is a number, and the 7 of "end.7" is one of its own.
        return not before[:-1] or not before[-2].isalpha()
    if last == "/":
        return before[-2:-1].isdigit()
    has_digit_before_mark = re.search(rf"\d{_GROUP_MARK}\Z", before) is not None
    return has_digit_before_mark and re.match(r"\d{3}(?!\d)", wanted) is not None


def _continues_number_after(after: str) -> bool:
    """Return whether the characters after a number belong to it: digits, decimals, a group of three, an exponent."""
    return re.match(rf"\d|[./]\d|{_GROUP_MARK}\d{{3}}(?!\d)|[eE][+-]?\d", after) is not None


def _is_sign(text: str, at: int) -> bool:
    """Return whether the sign at a position is that of a number, not an operation or a range."""
    before = text[max(0, at - 1) : at]
    return not before.isalnum() and before not in (")", "]", "}")
