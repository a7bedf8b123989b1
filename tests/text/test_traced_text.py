"""Strings that keep the origin of their characters do what plain strings do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgraph.text.traced_text import TEMPLATE, TracedText, join, join_with, origins_of

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "add": lambda text: text + "ab",
    "add in front": lambda text: "ab" + text,
    "repeat": lambda text: text * 2,
    "index": lambda text: text[-1:] and text[-1],
    "slice": lambda text: text[1:-1],
    "reverse": lambda text: text[::-1],
    "iterate": lambda text: list(text),
    "strip": lambda text: text.strip(),
    "strip characters": lambda text: text.strip("a\n"),
    "lstrip": lambda text: text.lstrip(),
    "rstrip": lambda text: text.rstrip("b"),
    "split": lambda text: text.split(),
    "split at": lambda text: text.split("ab"),
    "split once": lambda text: text.split("a", 1),
    "rsplit": lambda text: text.rsplit("a", 1),
    "rsplit blanks": lambda text: text.rsplit(None, 1),
    "lines": lambda text: text.splitlines(),
    "lines with ends": lambda text: text.splitlines(True),
    "partition": lambda text: text.partition("ab"),
    "rpartition": lambda text: text.rpartition("ab"),
    "replace": lambda text: text.replace("a", "<x>"),
    "replace once": lambda text: text.replace("ab", "", 1),
    "replace nothing": lambda text: text.replace("", "-"),
    "prefix": lambda text: text.removeprefix("a"),
    "suffix": lambda text: text.removesuffix("b"),
    "upper": lambda text: text.upper(),
    "lower": lambda text: text.lower(),
    "title": lambda text: text.title(),
    "capitalize": lambda text: text.capitalize(),
    "join": lambda text: text.join(["1", "2"]),
    "str": str,
}


@given(text=st.text("ab \nß", max_size=12))
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_plain_text_and_keep_origins(name: str, text: str) -> None:
    plain = OPERATIONS[name](text)
    traced = OPERATIONS[name](TracedText(text, range(len(text))))
    assert traced == plain
    for piece in traced if isinstance(traced, list | tuple) else [traced]:
        origins = origins_of(piece)
        assert len(origins) == len(piece)
        if name.startswith("replace") or name in ("upper", "title", "capitalize", "lower"):
            continue
        # A character with an origin is the character of the text at that place.
        for character, origin in zip(piece, origins, strict=True):
            assert origin == TEMPLATE or text[origin] == character


def test_comparisons_are_those_of_the_text() -> None:
    traced = TracedText("abc", [0, 1, 2])
    assert traced == "abc"
    assert hash(traced) == hash("abc")
    assert "b" in traced
    assert {"abc": 1}[traced] == 1
    assert not TracedText("", [])


def test_joins() -> None:
    assert origins_of(join(["a", TracedText("bc", [4, 5])])) == [TEMPLATE, 4, 5]
    assert not isinstance(join(["a", "b"]), TracedText)
    assert origins_of(join_with("-", [TracedText("b", [4]), TracedText("c", [5])])) == [4, TEMPLATE, 5]
    # What replaces a part of a content belongs to it.
    assert origins_of(TracedText("abc", [4, 5, 6]).replace("b", "xy")) == [4, 5, 5, 6]
    with pytest.raises(TypeError):
        TracedText("a", [0]) + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + TracedText("a", [0])  # type: ignore[operator]
