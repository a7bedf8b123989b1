"""Complete words and numbers: what is found, and what is a part of something longer."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgraph.text.literals import literal_spans, longer_word, number_value
from tests.fixtures.growth import grows_linearly


@pytest.mark.parametrize(
    ("wanted", "text", "found"),
    [
        ("7", "7", ["7"]),
        ("7", "17 7.5 0.7 .7 1,007 7,000 7/8 3/7 -7 7e5 x7 _7", []),
        ("7", "(7) 7. 7, [5,7,8] =7 **7** 7km 7th 7% 3-7 end.7 是7个 7개", ["7"] * 13),
        ("-7", "10-7 is 3, so -7 or −7", ["-7"]),
        ("−7", "so -7", ["-7"]),
        ("1234", "$1,234 1{,}234 1'234 41,234 1,2345", ["1,234", "1{,}234", "1'234"]),
        ("7.0", "7 or 7.00", ["7", "7.00"]),
        ("7.0", "7.0 or 7", ["7.0"]),
        ("0.5", "is .5", [".5"]),
        ("1e+22", "1e22", ["1e22"]),
        ("Tom", "Tom Tommy aTom Tom's 是Tom吗 Tom", ["Tom"] * 4),
        ("苹果", "7个苹果吧", ["苹果"]),
        ("R2", "R2D2 R2", ["R2"]),
        ("$42", "US$42 $42 $420", ["$42", "$42"]),
        ("(a+b)", "f(a+b)c", ["(a+b)"]),
        ("C++", "C++ C+++", ["C++", "C++"]),
        ("naïve", "naïve naïveté", ["naïve"]),
    ],
)
def test_complete_words_and_numbers(wanted: str, text: str, found: list[str]) -> None:
    assert [text[low:high] for low, high in literal_spans(text, wanted)] == found


@given(number=st.integers(-(10**9), 10**9), other=st.integers(-(10**9), 10**9))
def test_a_number_is_found_in_every_spelling_and_in_no_other_number(number: int, other: int) -> None:
    text = f"so it is {other:,} or {other}"
    found = [text[low:high] for low, high in literal_spans(text, str(number))]
    assert bool(found) == (number == other)
    assert all(number_value(one) == number for one in found)


def test_values() -> None:
    assert number_value("1,234.50") == Fraction(2469, 2)
    assert [number_value(text) for text in ("1,23", "", "-", "7km", "9" * 2000)] == [None] * 5


def test_the_longer_word_is_quoted() -> None:
    assert longer_word("so $1,007.", (6, 7)) == "$1,007."
    assert longer_word("7", (0, 1)) == "7"


@pytest.mark.parametrize("unit", ["7", "7,", "7.", "-7", "x", "1,007", " 7"])
@pytest.mark.parametrize("literal", ["7", "70"])
def test_long_texts_are_searched_in_linear_time(unit: str, literal: str) -> None:
    assert grows_linearly(lambda text: literal_spans(text, literal), unit, 40_000)
