r"""Which tokens each selector finds, token by token, and every refusal by its text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flowgraph.text.regions
from flowgraph import EncodedText, InvalidInputError, NoAnswerError, RegionError, find_regions
from flowgraph.selectors import Boxed, LastLine, Regex, Span, Tokens
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import answered, chosen, text_of

SECOND: Any = "second"


def answer_text(response: str, answer: Any = None) -> str:
    encoded = answered(response, tokenizer=tiny.slow_bytes())  # one token a byte: the mask is the text
    return text_of(encoded, find_regions(encoded, answer=answer).answer)


class TestRegex:
    def test_group_one_of_the_last_match(self) -> None:
        encoded = answered("So 3 + 4 = 7. So 3 + 4 = 8.")
        mask = Regex(r"= (\d)").select(encoded, "response")
        assert chosen(encoded, mask) == ["8"]
        assert mask.nonzero().flatten().tolist() == [encoded.num_tokens - 2]

    def test_the_first_on_request(self) -> None:
        encoded = answered("So 3 + 4 = 7. So 3 + 4 = 8.")
        assert chosen(encoded, Regex(r"= (\d)", occurrence="first").select(encoded, "response")) == [" 7"]

    def test_the_whole_match_without_a_group(self) -> None:
        assert answer_text("a 12 b 345 c", r"\d+") == "345"

    @pytest.mark.parametrize(
        ("regex", "expected"),
        [
            (Regex(r"(a)(?P<name>b)", group=0), "ab"),
            (Regex(r"(a)(?P<name>b)", group=2), "b"),
            (Regex(r"(a)(?P<name>b)", group="name"), "b"),
            (Regex(r"(a)(?P<name>b)"), "a"),
            (Regex(r"X(B)", flags=re.IGNORECASE), "b"),
        ],
    )
    def test_groups_and_flags(self, regex: Regex, expected: str) -> None:
        assert answer_text("xab xb" if regex.flags else "xab", regex) == expected

    def test_empty_matches_are_passed_over(self) -> None:
        assert answer_text("so 42 it is", r"\d*") == "42"
        assert answer_text("a 1 b", r"(\d)|b") == "1"

    @pytest.mark.parametrize("pattern", [r"x*", r"\s+", r"(z)?", "$"])
    def test_nothing_visible_is_no_answer(self, pattern: str) -> None:
        with pytest.raises(NoAnswerError, match=re.escape(f"answer: {Regex(pattern)!r} must select a visible")):
            answer_text("so 42 it is", pattern)

    def test_the_response_alone_is_searched(self) -> None:
        encoded = answered("7", prompt="Answer: 42. Or")
        with pytest.raises(NoAnswerError):
            find_regions(encoded, answer=r"42")
        assert answer_text("abc", r"^a") == "a"
        with pytest.raises(NoAnswerError):
            find_regions(answered("abc", prompt="x"), answer=r"(?<=x)a")

    def test_borders_are_exact(self) -> None:
        assert answer_text("ab[cd]ef", r"\[(.*)\]") == "cd"

    def test_a_token_counts_where_a_visible_character_is_inside(self) -> None:
        encoded = answered(" apples Tom")
        assert chosen(encoded, Regex(r"s T").select(encoded, "response")) == [" apples", " Tom"]
        assert chosen(encoded, Regex(r"s ").select(encoded, "response")) == [" apples"]

    def test_every_token_of_a_split_character(self) -> None:
        encoded = answered("so 🙂.")
        assert chosen(encoded, Regex("🙂").select(encoded, "response")) == ["🙂"] * 4

    def test_right_to_left(self) -> None:
        response = "התשובה: שבע תפוחים."
        assert answer_text(response, r": (.*)\.") == "שבעתפוחים"  # a space of its own is no answer token
        encoded = answered(response)
        assert text_of(encoded, Regex(r": (\w+)").select(encoded, "response")) == "שבע"

    def test_carriage_returns(self) -> None:
        assert answer_text("3 + 4\r\n#### 7\r\n", r"#### (.*)") == "7"
        assert answer_text("Answer:\r\n 7\r\n") == "7"

    def test_an_end_token_is_not_in_the_way(self) -> None:
        encoded = answered("So 3 + 4 = 7<|im_end|>\n")
        regions = find_regions(encoded, answer=r"(\d)$")
        assert chosen(encoded, regions.answer) == [" 7"]
        assert regions.generated[-2:].tolist() == [True, True]

    def test_special_tokens_are_never_chosen(self) -> None:
        encoded = answered("7<|im_end|>8")
        assert chosen(encoded, Regex(r".*").select(encoded, "response")) == ["7", "8"]

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: Regex("(7"),
                r"pattern: must be a regular expression, got '\(7' with an error at position 0: miss",
            ),
            (lambda: Regex("ab**"), r"at position 3: multiple repeat; escape literal text with re.escape"),
            (
                lambda: Regex("(7)", group=2),
                r"group: must be a group of the pattern '\(7\)', got 2; choose one of \[0, 1\]",
            ),
            (lambda: Regex("(?P<x>7)", group="y"), r"got 'y'; choose one of \[0, 1, 'x'\]"),
            (
                lambda: Regex("7", occurrence=SECOND),
                "occurrence: must be 'last' or 'first', got 'second'; for another",
            ),
        ],
    )
    def test_what_cannot_match_is_refused_at_once(self, make: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            make()

    def test_the_message_shows_pattern_and_ending(self) -> None:
        response = "start " + "x" * 40 + " " + "y" * 79
        message = re.escape(
            "answer: Regex(pattern='#### (.*)', flags=0, group=None, occurrence='last') must select a visible, "
            f"non-special character of the response, got none in '... {'y' * 79}'; pass another Regex, "
            "Span(start, end), LastLine() or token indices"
        )
        with pytest.raises(NoAnswerError, match=message):
            find_regions(answered(response), answer="#### (.*)")


class TestBoxed:
    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            (r"so \boxed{7}.", "7"),
            (r"\boxed{1} and \boxed{2}", "2"),
            (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
            (r"\boxed{a \} b}", r"a \} b"),
            (r"\boxed{a \\} b}", r"a \\"),
            (r"\boxed{1} then \boxed{2", "1"),
            (r"\boxed{1} then \boxed{}", "1"),
            (r"\boxed{1} then \boxed{ }", "1"),
            (r"\boxed{\boxed{7} apples}", "7"),
            (r"{ \boxed{7}", "7"),
            (r"} \boxed {7} }", "7"),
            (r"\boxed{1} {2}", "1"),
            ("\\boxed{\n7\n}", "7"),
        ],
    )
    def test_last_balanced_content(self, response: str, expected: str) -> None:
        encoded = answered(response, tokenizer=tiny.slow_bytes())
        found = "".join(chosen(encoded, Boxed().select(encoded, "response")))
        assert found == expected.replace(" ", "")

    @pytest.mark.parametrize("response", [r"\boxed 7", "{7}", r"\boxed{7", r"\fbox{7}", r"\\boxed"])
    def test_none(self, response: str) -> None:
        assert not Boxed().select(answered(response), "response").any()

    def test_an_endless_repetition_is_linear(self) -> None:
        encoded = answered(r"\boxed{" * 3000 + "7}", tokenizer=tiny.slow_bytes())
        assert chosen(encoded, Boxed().select(encoded, "response")) == ["7"]

    @settings(max_examples=100, deadline=None)
    @given(text=st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "a", "b "]), max_size=12).map("".join))
    def test_twin(self, text: str) -> None:
        def reference() -> str | None:
            for start in [m.end() for m in reversed(list(re.finditer(r"(?<!\\)\\boxed\{", text)))]:
                depth, place = 1, start
                while place < len(text):
                    depth += {"{": 1, "}": -1}.get(text[place], 0)
                    if depth == 0:
                        break
                    place += 2 if text[place] == "\\" and text[place : place + 6] != "\\boxed" else 1
                if depth == 0 and text[start:place].strip():
                    return text[start:place]
            return None

        encoded = answered(text + " x", tokenizer=tiny.slow_bytes())
        found = "".join(chosen(encoded, Boxed().select(encoded, "response")))
        assert found == (reference() or "").replace(" ", "")


class TestSpan:
    @pytest.mark.parametrize(
        ("span", "expected"),
        [
            (Span(0, 2), "ab"),
            (Span(2, 3), "c"),
            (Span(-2), "ef"),
            (Span(-3, -1), "de"),
            (Span(0), "abcdef"),
            (Span(5, 6), "f"),
            (Span(-6, 1), "a"),
            ((1, 3), "bc"),
            ((-1, None), "f"),
        ],
    )
    def test_as_a_slice_of_the_response(self, span: Any, expected: str) -> None:
        assert answer_text("abcdef", span) == expected

    def test_trailing_special_tokens_do_not_count(self) -> None:
        encoded = answered("Tom 7<|im_end|>")
        assert chosen(encoded, find_regions(encoded, answer=Span(-1)).answer) == [" 7"]

    @pytest.mark.parametrize("span", [(0, 7), (6, 7), (3, 3), (4, 2), (-7, 2), (0, -7), (-2, 0), (6, None)])
    def test_outside_or_empty(self, span: Any) -> None:
        message = re.escape(
            f"answer: a span must hold characters of the response, which has 6, got {span}; pass (start,"
        )
        with pytest.raises(RegionError, match=message):
            answer_text("abcdef", span)

    def test_only_space_is_no_answer(self) -> None:
        with pytest.raises(NoAnswerError, match=r"answer: Span\(start=1, end=2\) must select a visible"):
            answer_text("a b", (1, 2))

    def test_in_the_prompt(self) -> None:
        encoded = answered("7", prompt="Tom has 3 apples. How many?")
        assert chosen(encoded, find_regions(encoded, question=(0, 9)).question) == ["Tom", " has", " 3"]
        with pytest.raises(RegionError, match="question: a span must hold characters of the prompt, which has 27"):
            find_regions(encoded, question=(0, 28))


class TestLastLine:
    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            ("one\ntwo", "two"),
            ("one\ntwo\n\n  \n", "two"),
            ("one\r\ntwo words\r\n", "two words"),
            ("one\rtwo", "two"),
            ("one", "one"),
            ("\n\n one two ", " one two"),
        ],
    )
    def test_last_line_with_text(self, response: str, expected: str) -> None:
        encoded = answered(response)
        assert text_of(encoded, LastLine().select(encoded, "response")) == expected.replace(" ", "")

    def test_it_does_not_reach_into_the_prompt(self) -> None:
        encoded = answered(" 7 apples", prompt="Q: 3 + 4?\nA:")
        assert chosen(encoded, LastLine().select(encoded, "response")) == [" 7", " apples"]

    def test_before_the_end_token(self) -> None:
        encoded = answered("3 + 4\n7\n<|im_end|>\n<|im_end|>")
        assert chosen(encoded, LastLine().select(encoded, "response")) == ["7"]


class TestTokens:
    @pytest.fixture
    def encoded(self) -> EncodedText:
        """Tokens 0..4 prompt, 5..9 response, 9 its end token."""
        encoded = answered(" 3 + 4<|im_end|>", prompt="Tom has 3 apples.")
        assert (encoded.prompt_length, encoded.num_tokens) == (5, 9)
        return encoded

    @pytest.mark.parametrize(
        "which",
        [
            [5, 6],
            torch.tensor([5, 6]),
            torch.tensor([6, 5], dtype=torch.int32),
            np.array([5, 6]),
            torch.tensor([False] * 5 + [True] * 2 + [False] * 2),
            [False] * 5 + [True] * 2 + [False] * 2,
            Tokens([5, 6]),
            Tokens(slice(5, 7)),
            Tokens(slice(-4, -2)),
        ],
    )
    def test_absolute_positions(self, encoded: EncodedText, which: Any) -> None:
        assert find_regions(encoded, answer=which).answer.nonzero().flatten().tolist() == [5, 6]

    def test_special_tokens_are_left_out(self, encoded: EncodedText) -> None:
        assert find_regions(encoded, answer=Tokens(slice(7, None))).answer.nonzero().flatten().tolist() == [7]
        with pytest.raises(NoAnswerError, match=r"answer: Tokens\(\[8\]\) must select a visible, non-special"):
            find_regions(encoded, answer=[8])

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"answer": [4]}, "answer: tokens must lie in the response, 5..8, got token 4; for any other choice use"),
            ({"answer": Tokens(slice(None))}, "answer: tokens must lie in the response, 5..8, got token 0"),
            ({"question": [5]}, r"question: tokens must lie in the prompt, 0..4, got token 5; .* Regions.from_masks"),
            ({"answer": [9]}, "answer: token indices must lie in 0..8, got 9"),
            ({"answer": [-1]}, "answer: token indices must lie in 0..8, got -1"),
            ({"answer": torch.ones(8).bool()}, r"answer: a mask must have one entry per token \(9\), got 8"),
            ({"answer": torch.ones(9)}, "answer: must be a bool mask or integer indices, got torch.float32"),
            ({"answer": torch.ones(1, 9).bool()}, r"answer: must be one-dimensional, got shape \(1, 9\)"),
        ],
    )
    def test_outside(self, encoded: EncodedText, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(RegionError, match=message):
            find_regions(encoded, **arguments)

    @pytest.mark.parametrize("nothing", [[], torch.tensor([]), Tokens(slice(5, 5))])
    def test_nothing(self, encoded: EncodedText, nothing: Any) -> None:
        with pytest.raises(NoAnswerError, match=r"answer: Tokens\(.*\) must select a visible"):
            find_regions(encoded, answer=nothing)

    def test_repr_is_short(self) -> None:
        assert repr(Tokens([1, 2])) == "Tokens([1, 2])"
        assert repr(Tokens(torch.ones(9).bool())) == "Tokens(<9 tokens>)"
        assert repr(Tokens(list(range(50)))) == "Tokens(<50 tokens>)"
        assert repr(Tokens(slice(1, 2))) == "Tokens(slice(1, 2, None))"


class TestAutomaticAnswer:
    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            ("3 + 4 = 7. The answer is 7.", "7"),
            ("Step 1: buy.\nAnswer: 12 apples", "12 apples"),
            ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
            ("The final answer is **42**.", "42"),
            ("**Answer:** 42", "42"),
            ("**Final Answer**: 42 apples.", "42 apples"),
            ("**Answer: 42.**", "42"),
            ("The answer is: 3.5.", "3.5"),
            ("Answer = -7", "-7"),
            ("answer is .5", ".5"),
            ("ANSWER: yes!", "yes"),
            ("The answer is 7. This is because 3 + 4 = 7.", "7"),
            ("The answer is Dr. Smith. He is the oldest.", "Dr. Smith"),
            ("The answer is B. The others are wrong.", "B"),
            ("The correct answer is (B) Paris.", "(B) Paris"),
            ("The answer to the question is 7.", "7"),
            ("Final Answer: The final answer is $7$. I hope it is correct.", "7"),
            ("The answer is `x + 1`.", "x + 1"),
            ("So.\n\n## Final Answer\n\n**7**\n", "7"),
            ("So.\r\nAnswer:\r\n\r\n12 apples\r\n", "12 apples"),
            ("Answer: (3 + 4) * 2", "(3 + 4) * 2"),
            ("The answer is f(x).", "f(x)"),
            ("The answers are 2 and 3", "The answers are 2 and 3"),  # no known form: the last line
            ("3 + 4 = 7\n#### 7", "7"),
            ("3 + 4 = 7 #### 7", "7"),
            ("#### 1,200.5\n", "1,200.5"),
            ("#### $7.", "$7"),
            ("#### 7\n\nQuestion: what next?\nmore", "7"),
            ("#### Step 2\nAdd.\nThe answer is 7.", "7"),
            ("#### Step 2\n\nadd", "add"),
            ("##### 5\nlast", "last"),
            ("#### twelve apples", "twelve apples"),
            ("<answer> 7 </answer> done", "7"),
            ("<answer>1</answer><answer>\n2\n</answer>", "2"),
            ("<answer>1</answer> <answer>2", "1"),
            (r"The answer is \boxed{7}.", "7"),
            (r"\boxed{7}, so the answer is 8.", "7"),
            ("Tom has 7 apples.\n", "Tom has 7 apples."),
            ("I do not know.\nAnswer:", "Answer:"),
            ("Answer: **", "Answer: **"),
            ("Answer: ...", "Answer: ..."),
            ("התשובה היא 7", "התשובה היא 7"),
            ("The answer is 🙂.", "🙂"),
        ],
    )
    def test_what_is_found(self, response: str, expected: str) -> None:
        # Spaces inside an answer are no visible characters, so they are not answer tokens.
        assert answer_text(response).replace(" ", "") == expected.replace(" ", "")
        assert answer_text(response, "auto") == answer_text(response)

    @pytest.mark.parametrize(
        ("response", "selector"),
        [
            (r"\boxed{7}", "Boxed()"),
            ("#### 7", "NUMBER_SIGN"),
            ("<answer>7</answer>", "TAG"),
            ("The answer is 7.", "PHRASE"),
            ("seven", "LastLine()"),
        ],
    )
    def test_the_choice_is_reported_by_a_name_that_can_be_used_again(self, response: str, selector: str) -> None:
        encoded = answered("3 + 4 = 7\n" + response)
        regions = find_regions(encoded)
        assert regions.answer_selector == f"auto: {selector}"
        again = eval(selector, dict(vars(flowgraph.text.regions)))
        assert torch.equal(find_regions(encoded, answer=again).answer, regions.answer)

    def test_a_long_response_stays_quick(self) -> None:
        text = "the answer is " * 2000 + "<answer>" * 2000 + "#### " * 2000
        assert find_regions(answered(text)).answer.any()

    def test_only_an_end_token(self) -> None:
        with pytest.raises(
            NoAnswerError, match=r"answer: auto: LastLine\(\) must select .* got none in ''; pass another"
        ):
            find_regions(answered([1]))

    def test_an_empty_generation_behind_a_newline_prompt(self) -> None:
        with pytest.raises(NoAnswerError):
            find_regions(answered([1], prompt="Tom has\n"))
