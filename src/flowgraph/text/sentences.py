"""Find sentences in text: where each starts, in prose with formulas, abbreviations and other scripts."""

from __future__ import annotations

import re
from itertools import pairwise

# Rules read text with one kind of line break. Every quantifier whose matching time could explode is possessive or
# bounded.
LINE_BREAKS = str.maketrans(dict.fromkeys("\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", "\n"))
"""Every kind of line break as ``\\n``; the length of a text stays the same."""
LINE = re.compile(r"[^\n]+")
_SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]}*_$]*+(?=\s)|(?:[。！？｡؟।॥۔።။។։]|．(?!\d))++[”’»」』）】》)\]]*+"  # noqa: RUF001
)
_NO_SENTENCE_START = frozenset("=+-–−/<>≤≥×÷^|,;:&%)]}")  # noqa: RUF001
_NEVER_LAST = frozenset(["dr", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "approx", "viz"])
_BEFORE_NUMBER = frozenset(["no", "nos", "eq", "eqs", "fig", "figs", "sec", "ch", "vol", "p", "pp"])
_INITIALS = re.compile(r"\b[A-Z]\.\s?[A-Z]$")
_MARKER = re.compile(r"[\W_]*(?:step\s+)?(?:\d+|[^\W\d_])", re.IGNORECASE)
_MAX_WORD = 40
"""Characters before a full stop that are read for an abbreviation."""
_MAX_LOOK_AHEAD = 12
"""Characters after a full stop that are read."""


def sentence_starts(text: str) -> list[int]:
    """Find the starts of sentences; a line break also ends a sentence."""
    starts = []
    for line in LINE.finditer(text):
        # The borders of one line: its start, the ends of its sentences, and its end.
        borders = [line.start()]
        for stop in _SENTENCE_END.finditer(text, *line.span()):
            if _ends_sentence(text, borders[-1], stop, line.end()):
                borders.append(stop.end())
        borders.append(line.end())
        for low, high in pairwise(borders):
            if has_alphanumeric(text[low:high]):
                starts.append(low)
    return starts


def _ends_sentence(text: str, begin: int, stop: re.Match[str], line_end: int) -> bool:
    """Decide whether a stop ends the sentence that began at ``begin``, from a word before it and after it.

    A single capital counts as the initial of a name only in a chain ("J. K."): "the answer is C." is far more frequent
    in reasoning.
    """
    # At the end of a line, and after the stops of other scripts, a sentence ends in any case.
    limit = min(line_end, stop.end() + _MAX_LOOK_AHEAD)
    following = text[stop.end() : limit].lstrip()
    marks = stop[0]
    if not following or marks[0] not in ".!?…":
        return True

    # What follows must be able to start a sentence.
    next_character = following[0]
    if next_character.islower() or next_character in _NO_SENTENCE_START:
        return False
    if following.startswith("* "):
        return False

    # "1, 2, ... 10" continues after an ellipsis, and so does a sum; "!" and "?" end a sentence.
    num_dots = len(marks) - len(marks.lstrip(".…"))
    if marks[:num_dots] != ".":
        return num_dots == 0 or not next_character.isdigit()

    # A single full stop may belong to an abbreviation, to an initial or to the number of a list.
    before = text[max(begin, stop.start() - _MAX_WORD) : stop.start()]
    words = before.split()
    last_word = words[-1] if words else ""
    word = last_word.lstrip("([{\"'“‘*_").casefold()  # noqa: RUF001
    if word in _NEVER_LAST or _MARKER.fullmatch(before):
        return False
    if word in _BEFORE_NUMBER and (next_character.isdigit() or next_character == "("):
        return False
    is_first_initial = len(word) == 1 and re.match(r"[A-Z]\.", following)
    is_later_initial = _INITIALS.search(before)
    return not (is_first_initial or is_later_initial)


def has_alphanumeric(text: str) -> bool:
    """Return whether a text has a letter or a digit."""
    return any(character.isalnum() for character in text)
