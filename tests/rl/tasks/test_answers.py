"""Extraction cannot be gamed, and equalities are exact."""

import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgraph import MissingExtraError
from rl import TaskError
from rl.tasks import answers
from rl.tasks.answers import (
    MAX_ANSWER,
    SEARCH_WINDOW,
    check_pattern,
    equal_math,
    equal_number,
    equal_text,
    evaluate_arithmetic,
    find_answer,
    parse_number,
)
from tests.fixtures.growth import grows_linearly


def stated(text: str, pattern: str | None = None) -> str | None:
    """The text that is found."""
    span = find_answer(text, pattern)
    return None if span is None else text[slice(*span)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"so \boxed{ \frac{1}{2} } and more", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5}", "5"),
        (r"\boxed{5} \boxed{6", "5"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{ \{1 }", r"\{1"),
        ("<answer>7</answer>", "7"),
        ("<answer>\n 7\n8 \n</answer>", "7\n8"),
        ("<answer>1</answer> wait <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer> 3</answer>", "2"),
        ("I write it in <answer> tags: <answer>3</answer>", "3"),
        ("<answer>3</answer> (an <answer> tag)", "3"),
        ("steps\n#### 72", "72"),
        ("#### 1\n  ####  2 apples \nend", "2 apples"),
        (r"#### 1 <answer>2</answer> \boxed{3}", "3"),
        ("#### 1\n<answer>2</answer>", "2"),
    ],
)
def test_the_last_complete_statement_counts(text: str, answer: str):
    assert stated(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "7", "the answer is 7", r"\boxed{7", "<answer>7", "7</answer>", "<answer></answer>", "<answer> \n</answer>",
     r"\boxed{}", "####", "##### 7", "a #### 7", "### 7", "<ANSWER>7</ANSWER>", "</answer>7<answer>"],
)  # fmt: skip
def test_what_states_nothing(text: str):
    assert find_answer(text) is None


def test_a_statement_beyond_the_length_is_no_answer():
    assert stated(f"<answer>{'7' * MAX_ANSWER}</answer>") == "7" * MAX_ANSWER
    assert find_answer(f"<answer>1</answer><answer>{'7' * (MAX_ANSWER + 1)}</answer>") is None
    assert find_answer("<answer>777</answer>", max_length=2) is None


def test_a_named_format_ignores_the_others():
    text = "#### 1\n<answer>2</answer> \\boxed{3}"
    assert [stated(text, name) for name in answers.FORMATS] == ["3", "2", "1\n".strip()]
    assert stated("<answer>2</answer>", "boxed") is None


def test_a_pattern_takes_its_last_match():
    assert stated("Answer: 1\nAnswer: 2.", r"Answer: (\d+)") == "2"
    assert stated("Answer: 1", r"Reply: (\d+)") is None
    assert stated("b", r"(a)?b") is None


def test_bad_patterns():
    with pytest.raises(TaskError, match=r"pattern: must be 'boxed', 'tag', 'hash' or a regular expression, got '\('"):
        check_pattern("(")
    with pytest.raises(TaskError, match=r"pattern: must have a group that states the answer, got 'Answer'; put"):
        check_pattern("Answer")
    check_pattern(None)
    check_pattern("tag")


def test_a_catastrophic_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "PATTERN_SECONDS", 0.05)
    started = time.process_time()
    with pytest.raises(TaskError, match=r"pattern: must be searched in 0.05 s, got .* avoid repeats within repeats"):
        find_answer("a" * 60 + "b", r"((?:a|aa)+)\1c")
    assert time.process_time() - started < 5


def test_long_responses_are_searched_at_their_end():
    text = "<answer>1</answer>" + "x" * SEARCH_WINDOW
    assert find_answer(text) is None
    assert stated(text + "<answer>2</answer>") == "2"


@pytest.mark.parametrize("unit", ["\\boxed{", "{", "}", "<answer>", "</answer>", "\n####", "\\", " "])
def test_hostile_repetitions_are_searched_in_linear_time(unit: str):
    assert grows_linearly(find_answer, unit)


@given(text=st.lists(st.sampled_from(["\\boxed{", "{", "}", "<answer>", "</answer>", "\n#### ", "1", " ", "\\"])))
def test_every_span_lies_in_the_text_and_is_trimmed(text: list[str]):
    whole = "".join(text)
    span = find_answer(whole)
    if span is not None:
        start, end = span
        assert 0 <= start < end <= len(whole)
        assert whole[start:end] == whole[start:end].strip()
    if "1" not in whole:
        assert span is None or any(mark in whole[slice(*span)] for mark in "\\{}<>#")


def test_text_equality():
    assert equal_text(" New\n York ", "new york")
    assert not equal_text("new york city", "new york")


@pytest.mark.parametrize(
    ("one", "other"),
    [("2", "2.0"), ("2,000", "2000"), ("1,234,567.50", "1234567.5"), ("1/2", "0.5"), ("-1/3", "2/-6"), ("+5", "5."),
     (".5", "0.50"), ("1e3", "1000"), ("−4", "-4"), ("007", "7"), ("0.1", "1/10"), ("1/2", " 2 / 4 ")],
)  # fmt: skip
def test_equal_numbers(one: str, other: str):
    assert equal_number(one, other)
    assert equal_number(other, one)


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "5 or 6", "1,00", "12,34", "1/0", "1/2/3", "5%", "$5", "five", "nan", "inf", "1e9999", "٣", "1_000",
     "0x10", "1" * 300, "1 000", "--1", "1e", "/2"],
)  # fmt: skip
def test_what_is_no_number(text: str):
    assert parse_number(text) is None
    assert not equal_number(text, text)


def test_numbers_are_compared_exactly():
    assert not equal_number("0.3333333333333333", "1/3")
    assert not equal_number("10000000000000000", "10000000000000001")


@given(value=st.fractions())
def test_every_fraction_is_read_back(value: Fraction):
    assert parse_number(str(value)) == value


@given(a=st.integers(0, 99), b=st.integers(1, 99), c=st.integers(1, 99))
def test_arithmetic_is_exact(a: int, b: int, c: int):
    assert evaluate_arithmetic(f"({a} - {b}) / {c} * -{b}") == Fraction(a - b, c) * -b
    assert evaluate_arithmetic(f"{a}+{b}*{c}") == a + b * c


@pytest.mark.parametrize(
    "text",
    ["", "2**9", "2 * * 9", "7//2", "1.5", "1e2", "1_0", "5!", "x", "__import__('os')", "1,2", "(1)(2)", "1 2", "()",
     "1/0", "1/(1-1)", "-" * 250 + "1" * 6 + "+", "1" * 257, "٣", "3\n", "012"],
)  # fmt: skip
def test_what_is_no_arithmetic(text: str):
    assert evaluate_arithmetic(text) is None


def test_mathematical_equality():
    assert equal_math("x^2 + 2x + 1", "(x+1)^2")
    assert equal_math(r"\sqrt{8}", r"2\sqrt{2}")
    assert equal_math("2^{10}", "1024")
    assert not equal_math("5", "5 or 6")
    assert not equal_math("5", "6")
    assert not equal_math("5", "")


@pytest.mark.parametrize(
    "hostile",
    ["9^{9^{9}}", "9^9^9", "9**9**9", "((9^{99})^{99})^{99}", "1000000!", "9!!", "(9!)!", "9^{9!}", "9^{99999999}",
     r"9^{99 \cdot 99 \cdot 99}", r"\sum_{i=1}^{99} i^{i}", r"\int_0^1 x", r"\binom{99999}{5000}", "exp(exp(exp(9)))",
     "6$ $5", r"four, so \boxed{5}", "(" * 250, "{" * 250, "\\frac{" * 40, "5" * 257, r"\left" * 50, "\x00", "=" * 200],
)  # fmt: skip
def test_hostile_mathematics_is_not_equal_and_takes_no_time(hostile: str):
    equal_math("5", "5.0")  # loads the package
    started = time.process_time()
    assert not equal_math("5", hostile)
    assert not equal_math(hostile, "5")
    assert time.process_time() - started < 5


def test_mathematics_works_outside_the_main_thread_and_in_silence(caplog: pytest.LogCaptureFixture):
    found = []
    thread = threading.Thread(target=lambda: found.append(equal_math("1/2", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]
    assert "Timeout" not in caplog.text


def test_without_math_verify_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    answers._math_verify.cache_clear()
    with pytest.raises(MissingExtraError, match=r"math-verify, got .* pip install 'flowgraph-llm\[tasks\]'"):
        equal_math("1", "1")


@pytest.mark.parametrize(
    ("text", "opening", "answer"),
    [
        ("<think>Maybe <answer>5</answer>, let me check", "", None),
        (r"<think>It is \boxed{5}? No.</think><answer>6</answer>", "", "6"),
        (r"<think>\boxed{6}</think> So it is 6.", "", None),
        ("<think>a</think><answer>6</answer><think>or <answer>5</answer>", "", "6"),
        ("<answer>5</answer><think>b</think>", "", None),
        ("It is <answer>5</answer>, let me check", "<think>\n", None),
        ("It is <answer>5</answer>? No.</think><answer>6</answer>", "<think>\n", "6"),
        ("<answer>6</answer>", "<think>\n\n</think>\n", "6"),
        ("[THINK]#### 5\n[/THINK]\n#### 6", "", "6"),
        ("<|channel|>analysis<|message|>#### 5<|end|>", "", None),
        ("<|channel|>analysis<|message|>#### 5<|end|><|channel|>final<|message|>#### 6", "", "6"),
        (r"<think>a</think>\boxed{6} (in \boxed{answer})", "", "6"),
        (r"\boxed{5} no: <answer>6</answer>", "", "6"),
        ("<answer>5</answer>\n#### 6", "", "6"),
    ],
)
def test_only_the_final_part_states_an_answer_and_its_last_statement_counts(
    text: str, opening: str, answer: str | None
):
    span = find_answer(text, opening=opening)
    assert (None if span is None else text[slice(*span)]) == answer


def test_a_pattern_reads_the_final_part_too_unless_told_otherwise():
    text = "<think>Answer: 5</think> 6"
    assert find_answer(text, r"Answer: (\d)") is None
    assert find_answer("a</think>Answer: 6", r"Answer: (\d)") == (17, 18)
    span = find_answer(text, r"Answer: (\d)", thinking=True)
    assert span is not None
    assert text[slice(*span)] == "5"
