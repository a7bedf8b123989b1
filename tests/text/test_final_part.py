"""Where the final part of a response lies, in text alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgraph import final_part, response_opening
from tests.fixtures import tokenizers as tiny
from tests.fixtures.growth import grows_linearly
from tests.fixtures.texts import answered, chat

FINAL = "<|channel|>final<|message|>7"


def part_of(text: str, opening: str = "") -> tuple[str, str]:
    part = final_part(text, opening=opening)
    return text[part.start : part.end], part.place


@pytest.mark.parametrize(
    ("text", "opening", "expected"),
    [
        ("7", "", ("7", "complete response")),
        ("<think>a</think> 7", "", (" 7", "after thinking")),
        ("<THINK>a</Think> 7", "", (" 7", "after thinking")),
        ("a</think>7", "<think>\n", ("7", "after thinking")),
        ("a</think>7", "", ("7", "after thinking")),
        ("7", "<|im_start|>assistant\n<think>\n\n</think>\n", ("7", "after thinking")),
        ("<think>a</think>1<think>b</think>7", "", ("7", "after thinking")),
        ("<think>a</think>7<think>b", "", ("7", "after thinking")),
        ("7 <think>b", "", ("7 ", "complete response")),
        ("<think>see <think> tags</think>7", "", ("7", "after thinking")),
        ("<seed:think>a</seed:think>7", "", ("7", "after thinking")),
        ("<think/>7", "", ("7", "after thinking")),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>7<|END_RESPONSE|>", "", ("7", "after thinking")),
        ("<unused94>thought\na<unused95>7", "", ("7", "after thinking")),
        ("Here is my thought process: 12?\nHere is my response: 7", "", (" 7", "after thinking")),
        ("<thinks>a</thinks>7", "", ("<thinks>a</thinks>7", "complete response")),
        ("the analysis of 7", "", ("the analysis of 7", "complete response")),
        ("analysis of 7", "", ("analysis of 7", "complete response")),
        ("analysis(7)", "", ("analysis(7)", "complete response")),
        ("analysis3 + 4.assistantfinal7", "", ("7", "final channel")),
        ("7", "<|channel|>final<|message|>", ("7", "final channel")),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>" + FINAL, "", ("7", "final channel")),
        ("<|channel|>final<|message|><think>a</think>7<|return|>", "", ("7", "after thinking")),
    ],
)  # fmt: skip
def test_final_parts(text: str, opening: str, expected: tuple[str, str]) -> None:
    assert part_of(text, opening) == expected
    assert not final_part(text, opening=opening).problem


@pytest.mark.parametrize(
    ("text", "opening", "problem"),
    [
        ("<think>12", "", "a thinking block that is not closed"),
        ("12", "<think>\n", "a thinking block that is not closed"),
        ("12", "<|im_end|>\n<|im_start|>assistant\n<think>\n", "a thinking block that is not closed"),
        ("12 <think>a</think> \n", "", "no text after the thinking"),
        ("12", "<|channel|>analysis<|message|>", "channels without a final one"),
        ("<|channel|>commentary<|message|>12<|end|>", "", "channels without a final one"),
        ("<|channel|>analysis<|message|>12<|end|><|channel|>final<|message|>", "", "no text after the mark"),
        ("analysisSo 12", "", "an analysis channel without a final one"),
    ],
)  # fmt: skip
def test_no_final_part(text: str, opening: str, problem: str) -> None:
    part = final_part(text, opening=opening)
    assert part.problem.startswith(problem)
    assert (part.start, part.end, part.place) == (len(text), len(text), "none")


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "<|channel|>final<|message|>", "<|end|>"])),
    opening=st.sampled_from(["", "<think>", "x</think>", "<|channel|>final<|message|>"]),
)
def test_a_part_lies_in_the_response_and_outside_the_thinking(text: list[str], opening: str) -> None:
    whole = "".join(text)
    part = final_part(whole, opening=opening)
    assert 0 <= part.start <= part.end <= len(whole)
    inside = whole[part.start : part.end]
    assert "</think>" not in inside
    assert "<think>" not in inside
    assert (
        bool(inside.strip()) or bool(part.problem) or not whole[: part.end].strip() or part.place == "complete response"
    )


@pytest.mark.parametrize(
    "unit", ["<think>", "</think>", "<", "<|channel|>", "<|message|>", "analysis", "assistantfinal"]
)
@pytest.mark.parametrize("start", ["", "analysisA"])
def test_hostile_repetitions_are_searched_in_linear_time(unit: str, start: str) -> None:
    assert grows_linearly(lambda text: final_part(start + text), unit)


def test_the_opening_is_what_the_template_and_a_prefill_wrote() -> None:
    tokenizer = tiny.with_template(tiny.byte_level(), tiny.CHATML.replace("assistant\n", "assistant\n<think>\n"))
    encoded = answered("7", prompt=chat("user: a </think> b"), tokenizer=tokenizer)
    assert response_opening(encoded).endswith("<|im_start|>assistant\n<think>\n")
    plain = answered("7", prompt=chat("user: <think>"))
    assert response_opening(plain) == ""
    prefilled = answered("7", prompt=chat("user: a", "assistant: <think>b"))
    assert response_opening(prefilled).endswith("assistant\n<think>b")
    assert response_opening(answered("7", prompt="Use <think> tags. Assistant: 7")) == ""
    assert response_opening(answered("7", prompt="USER: Use <think> tags. ASSISTANT: <think>")) == " <think>"
    assert response_opening(answered("7", prompt="Use <think> tags.\nAssistant: Hm.\n<think>")) == " Hm.\n<think>"
