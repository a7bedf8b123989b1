"""What a text states, in the order of the text, and what ends it where it states nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flowgraph import InvalidInputError, stated_answers
from flowgraph.text.statements import last_code, last_line, last_sentence
from tests.fixtures.growth import grows_linearly


def stated(text: str, **options) -> list[tuple[str, str]]:
    return [(text[one.start : one.end], one.rule) for one in stated_answers(text, **options)]


def test_every_statement_in_the_order_of_the_text() -> None:
    text = 'Answer: 1\n#### 2\n<answer>3</answer> \\boxed{4} {"answer": 5}\nThe right option is (B).'
    expected = [("1", "phrase"), ("2", "hash"), ("3", "tag"), ("4", "boxed"), ("5", "json"), ("(B)", "choice")]
    assert stated(text) == expected
    assert stated(text, rules=("tag", "hash")) == [("2", "hash"), ("3", "tag")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The answer is \boxed{7}.", [("7", "boxed")]),
        ("<answer>The answer is 7.</answer>", [("The answer is 7.", "tag")]),
        (r"<answer> \boxed{7} </answer>", [("7", "boxed")]),
        (r"\boxed{7} <answer> </answer> \boxed{}", [("7", "boxed")]),
        (r"\boxed{answer}", [("answer", "boxed")]),  # nothing else is stated
        (r"\boxed{7} \boxed{\text{your answer}} <answer>...</answer>", [("7", "boxed")]),
        ("Option A is not correct. Option B is correct.", [("B", "choice")]),
        ("I pick a number. A is a letter.", []),
        ("The correct answer is option **C**, as shown.", [("C", "choice")]),
        ("The answer is (B), because A is wrong.", [("(B)", "choice")]),
        ("The answer is (B) Paris.", [("(B) Paris", "phrase")]),
        ("# The answer is below", [("below", "phrase")]),
        ("```python\n# the answer is x\nanswer = 7\n```", []),
        ("```\nAnswer: 7\n```", [("7", "phrase")]),
        ('{"answer": "a \\"b\\" c"}', [('a \\"b\\" c', "json")]),
        ('{"answer": "7', [("7", "phrase")]),
        ('{"answer": null, "value": 8}', [("8", "json")]),
        ('{"value": 7} is what I found', []),
        ('```json\n{"value": 7}\n```', [("7", "json")]),
    ],
)
def test_statements(text: str, expected: list[tuple[str, str]]) -> None:
    assert stated(text) == expected


def test_strict_forms() -> None:
    text = "a #### 1\n<ANSWER>2</ANSWER>"
    assert stated(text, rules=("hash", "tag")) == [("1", "hash"), ("2", "tag")]
    assert stated(text, rules=("hash", "tag"), strict=True) == []
    assert stated("#### 1 apple\nrest", rules=("hash",), strict=True) == [(" 1 apple", "hash")]


def test_the_thinking_is_not_searched() -> None:
    text = r"<think>\boxed{12}</think>\boxed{7}"
    assert stated(text) == [("7", "boxed")]
    assert stated(text, thinking=True) == [("12", "boxed"), ("7", "boxed")]
    assert stated(r"\boxed{12}", opening="<think>") == []


def test_an_unknown_form() -> None:
    with pytest.raises(
        InvalidInputError, match=r"rules: must be among boxed, hash, .*, got 'box'; choose some of them"
    ):
        stated_answers("7", ("box",))


def piece(text: str, span: tuple[int, int] | None) -> str | None:
    return None if span is None else text[slice(*span)]


def test_what_ends_a_text() -> None:
    code = "Look:\n~~~~ py\na = 1\n\nb\n~~~~\n"
    assert piece(code, last_code(code)) == "a = 1\n\nb"
    assert last_code(code + "done") is None
    assert piece(code, last_code(code + "\nI hope this helps! Let me know if you have questions.")) == "a = 1\n\nb"
    assert piece("```\ncut", last_code("```\ncut")) == "cut"
    assert last_code("```\n```") is None
    assert piece("a\r\n b \r\n\n", last_line("a\r\n b \r\n\n")) == " b"
    for text, expected in [
        ("Tom is here. He has 7! Really? Yes", "Yes"),
        ("He met Dr. Smith. So it is 3.5 km to St. Ives.", "So it is 3.5 km to St. Ives."),
        ("**Tom has 7.**\n\n***\n", "**Tom has 7.**"),
        ("Tom has 7. Let me know if you need more! Good luck!", "Tom has 7."),
        ("答えは7個です。以上です。", "以上です。"),
        ("So\n\\[\nx = 7\n\\]\n", "x = 7"),
        ("🙂", "🙂"),
        ("---", "---"),
    ]:
        assert piece(text, last_sentence(text)) == expected
    assert last_sentence(" \n") is None


@pytest.mark.parametrize(
    "unit",
    ["#### 1\n", "\\boxed{", "\\boxed{1}", "<answer>", "<answer>1</answer>", "the answer is 7. ", "```\n", '"answer":[',
     '"answer": "x', "{", "choose B ", "option is ", "I hope this helps.\n", "- \n", "\\boxed{answer} "],
)  # fmt: skip
@pytest.mark.parametrize("search", [stated_answers, last_code, last_sentence])
def test_hostile_repetitions_are_searched_in_linear_time(unit: str, search: Callable[[str], object]) -> None:
    assert grows_linearly(search, unit, 40_000)
