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
from flowgraph.selectors import AllOf, Boxed, LastLine, Literal, Regex, Span, Stated, Tokens
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import answered, chat, chosen, text_of

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
                "occurrence: must be 'last', 'first' or 'all', got 'second'; for another match narrow",
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
            "Literal, Span(start, end), LastLine() or token indices"
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
            (r"\boxed{7}, so the answer is 8.", "8"),  # the last statement counts, whatever its form
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
            ('{"answer": 7}', "JSON"),
            ("The right option is (B).", "CHOICE"),
            ("```python\n7\n```", "CodeBlock()"),
            ("seven", "LastSentence()"),
        ],
    )
    def test_the_choice_is_reported_by_a_name_that_can_be_used_again(self, response: str, selector: str) -> None:
        encoded = answered("3 + 4 = 7\n" + response)
        regions = find_regions(encoded)
        assert regions.answer_selector == f"auto: {selector}"
        again = eval(selector, dict(vars(flowgraph.text.regions)))
        assert torch.equal(find_regions(encoded, answer=again).answer, regions.answer)

    def test_a_long_response_stays_quick(self) -> None:
        text = "the answer is " * 2000 + "<answer>" * 2000 + "#### " * 2000 + "7"
        assert find_regions(answered(text)).answer.any()

    def test_only_an_end_token(self) -> None:
        with pytest.raises(
            NoAnswerError, match=r"answer: auto: LastSentence\(\) must select .* got none in ''; pass another"
        ):
            find_regions(answered([1]))

    def test_an_empty_generation_behind_a_newline_prompt(self) -> None:
        with pytest.raises(NoAnswerError):
            find_regions(answered([1], prompt="Tom has\n"))


def found(response: str, prompt: Any = "How many?", tokenizer: Any = None) -> tuple[str, str]:
    """The answer found by default, spaces removed, and how it was found."""
    encoded = answered(response, prompt=prompt, tokenizer=tokenizer or tiny.slow_bytes())
    regions = find_regions(encoded)
    return text_of(encoded, regions.answer), regions.answer_by


class TestHowTheAnswerWasFound:
    @pytest.mark.parametrize(
        ("response", "expected", "by"),
        [
            (r"so \boxed{7}.", "7", "boxed"),
            ("3 + 4 = 7\n#### 7", "7", "hash"),
            ("<answer>7</answer>", "7", "tag"),
            ('{"answer": 7}', "7", "json"),
            ('{"reasoning": "3 + 4", "final_answer": "7 apples"}', "7apples", "json"),
            ("{'answer': '7'}", "7", "json"),
            ('```json\n{\n  "answer": "7"\n}\n```', "7", "json"),
            ('{"result": 7.5}', "7.5", "json"),
            ('{"answer": [3, 4]}', "[3,4]", "json"),
            ("So the answer is 7.", "7", "phrase"),
            ("The right option is (B).", "(B)", "choice"),
            ("The correct choice is **C**.", "C", "choice"),
            ("Option B is correct. The others are not.", "B", "choice"),
            ("So I would go with option (C).", "(C)", "choice"),
            ("The answer is: option B is correct.", "B", "choice"),
            ("```python\nprint(3+4)\n```", "print(3+4)", "code"),
            ("Here it is:\n\n```\nprint(3+4)\n```\n", "print(3+4)", "code"),
            ("```python\nanswer = 3 + 4\nprint(answer)\n```", "answer=3+4print(answer)", "code"),
            ("```python\nprint(3+4)\n```\nThis prints 7.", "Thisprints7.", "last sentence"),
            ("3 + 4 = 7. So Tom has 7 apples.", "SoTomhas7apples.", "last sentence"),
            ("It is 3.5 m, approx. 4 m. Tom is tall.", "Tomistall.", "last sentence"),
            ("一共三个加四个。汤姆有7个苹果。", "汤姆有7个苹果。", "last sentence"),
            ("3 + 4 = 7.\nTom has 7 apples.\n---\n\nI hope this helps!", "Tomhas7apples.", "last sentence"),
            ("Tom has 7 apples.", "Tomhas7apples.", "whole response"),
            ("I hope so.", "Ihopeso.", "whole response"),
        ],
    )
    def test_default(self, response: str, expected: str, by: str) -> None:
        text, how = found(response)
        assert text.replace(" ", "").replace("\n", "") == expected
        assert how == by

    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            (r"\boxed{12}? No. The answer is 7.", "7"),
            ("The answer is 12. No, wait.\n#### 7", "7"),
            ("<answer>12</answer> I mean <answer>7</answer>", "7"),
            (r"#### 12" + "\n" + r"so it is \boxed{7}", "7"),
            (r"\boxed{7}. (You asked for \boxed{answer}.)", "7"),
            ("<answer>7</answer> as you asked: <answer>your answer</answer>", "7"),
            (r"\boxed{7}. The answer is correct.", "7"),
            ("Is the answer 12? Or is the answer: 12? The answer is 7.", "7"),
            (r"<answer>\boxed{7}</answer>", "7"),
            ("The answer is (B).", "(B)"),
        ],
    )
    def test_place_beats_form_and_the_format_asked_for_is_no_answer(self, response: str, expected: str) -> None:
        assert found(response)[0] == expected

    def test_given_selectors_are_named(self) -> None:
        encoded = answered("So 3 + 4 = 7.")
        for answer, by in [
            ("7", "given: Literal"),
            (r"= (\d)", "given: Regex"),
            ((0, 2), "given: Span"),
            (Tokens(slice(-1, None)), "given: Tokens"),
            (LastLine(), "given: LastLine"),
        ]:
            assert find_regions(encoded, answer=answer).answer_by == by

    def test_the_end_of_an_unfinished_text_is_a_guess(self) -> None:
        encoded = answered("3 + 4 = 7. So Tom has")
        with pytest.warns(UserWarning, match="answer: should be stated before the response ends, got .* raise max_new"):
            regions = find_regions(encoded, truncated=True)
        assert regions.answer_by == "last sentence, unfinished text"
        assert text_of(encoded, regions.answer).strip() == "So Tom has"
        # A stated answer is no guess, nor is one that was asked for.
        stated = answered("The answer is 7. Check: 3 +")
        assert find_regions(stated, truncated=True).answer_by == "phrase"
        assert find_regions(encoded, answer="7", truncated=True).answer_by == "given: Literal"

    def test_a_long_response_taken_whole_is_a_guess(self) -> None:
        response = "Tom has 3 apples and he buys 4 more apples and " * 3 + "so on"
        with pytest.warns(UserWarning, match="answer: should be a part of the response, got one sentence of 146 char"):
            assert found(response)[1] == "whole response"


THOUGHTS = [
    ("<think>\nSo the answer is 12? Wait, no: 3+4=7.\n</think>\n\nTom has **7** apples.", "Tom has **7** apples."),
    ("<think>\nMaybe \\boxed{12}. Hmm, no: 3+4=7.\n</think>\n\nTom has 7 apples.", "Tom has 7 apples."),
    ("<think>3+4 is 7, easy.</think> Tom has 7 apples.", "Tom has 7 apples."),
    ("<think>The answer is 12.</think>The answer is 8.<think>No.</think> The answer is 7.", "7"),
    ("So 12.</think> The answer is 7.", "7"),
    ("<think>12</think> The answer is 7. <think>Or is the answer 12", "7"),
    ("<reasoning>#### 12</reasoning><answer>7</answer>", "7"),
    ("[THINK]The answer is 12.[/THINK]The answer is 7.", "7"),
    ("◁think▷The answer is 12.◁/think▷The answer is 7.", "7"),
    ("<|channel>thought\nThe answer is 12.<channel|>The answer is 7.", "7"),
    ("<|begin_of_thought|>12<|end_of_thought|><|begin_of_solution|>Tom has 7.<|end_of_solution|>", "Tom has 7."),
    ("analysisThe answer is 12.assistantfinalThe answer is 7.", "7"),
    (
        "<|channel|>analysis<|message|>The answer is 12.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Tom has 7 apples.<|return|>",
        "Tom has 7 apples.",
    ),
    (
        "<|channel|>final<|message|>Tom has 7.<|end|><|start|>assistant<|channel|>analysis<|message|>The answer is 12.",
        "Tom has 7.",
    ),
    ("The tag `<think>` opens a block. The answer is 7.", "7"),
]


class TestThinking:
    @pytest.mark.parametrize(("response", "expected"), THOUGHTS)
    def test_the_answer_stands_in_the_final_part(self, response: str, expected: str) -> None:
        assert found(response)[0] == expected.replace(" ", "")

    @pytest.mark.parametrize(
        ("response", "problem"),
        [
            (
                "<think>\nLet me see. If he ate them the answer is 0. But he did not, so I",
                "a thinking block that is not",
            ),
            (r"<think>a</think><think>\boxed{12}", "a thinking block that is not closed"),
            ("The answer is 12. <think>So.</think>", "no text after the thinking"),
            ("<|channel|>analysis<|message|>The answer is 12.", "channels without a final one"),
            ("analysisThe answer is 12.", "an analysis channel without a final one"),
        ],
    )
    def test_thinking_that_does_not_end_holds_no_answer(self, response: str, problem: str) -> None:
        message = f"answer: must stand after the thinking or in the final channel, got a response with {problem}"
        with pytest.raises(NoAnswerError, match=re.escape(message)):
            found(response)
        with pytest.raises(NoAnswerError, match="answer: LastLine.. must select .* the response has " + problem):
            answer_text(response, LastLine())

    @pytest.mark.parametrize(
        ("opening", "response", "expected"),
        [
            ("<think>\n", "The answer is 12.\n</think>\nTom has 7.", "Tom has 7."),
            ("<think>\n\n</think>\n\n", "Tom has 7.", "Tom has 7."),
            ("<think>\n", "So the answer is 12. Or", None),
            ("", "Tom has 7.", "Tom has 7."),
        ],
    )
    @pytest.mark.filterwarnings("ignore:prompt. a rendered chat must follow")
    def test_the_template_may_open_the_thinking(self, opening: str, response: str, expected: str | None) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), tiny.CHATML.replace("assistant\n", "assistant\n" + opening))
        prompts = [chat("user: What does </think> or <think> mean?"), f"Q<|im_start|>assistant\n{opening}"]
        for prompt in [*prompts, f"How many? {opening}"]:
            if expected is None:
                with pytest.raises(NoAnswerError, match="a thinking block that is not closed"):
                    found(response, prompt, tokenizer)
            else:
                assert found(response, prompt, tokenizer)[0].strip() == expected

    def test_a_prompt_that_mentions_a_tag_opens_nothing(self) -> None:
        assert found("The answer is 7.", "Think in <think> tags. How many?")[0] == "7"

    @pytest.mark.parametrize("answer", [r"answer is (\d+)", "12", Regex("12"), Boxed(), "<think>"])
    def test_what_was_asked_for_is_searched_in_the_final_part_too(self, answer: Any) -> None:
        response = r"<think>The answer is 12, \boxed{12}.</think> The answer is 7, \boxed{7}."
        if answer == r"answer is (\d+)" or answer == Boxed():
            assert answer_text(response, answer) == "7"
        else:
            with pytest.raises(NoAnswerError, match=r"alone; pass selectors.(Literal|Regex)\(..., thinking=True\)"):
                answer_text(response, answer)

    def test_unless_the_thinking_was_asked_for(self) -> None:
        response = r"<think>The answer is 12, \boxed{12}.</think> Tom has 7."
        for selector in (Regex(r"answer is (\d+)", thinking=True), Boxed(thinking=True), Literal(12, thinking=True)):
            assert answer_text(response, selector) == "12"
        assert answer_text(response, Stated(thinking=True)) == "12"
        start = response.index("12")
        assert answer_text(response, (start, start + 2)) == "12"  # positions are meant as they are
        assert repr(Regex("7", thinking=True)).endswith("occurrence='last', thinking=True)")


class TestLiteral:
    @pytest.mark.parametrize(
        ("literal", "response", "expected"),
        [
            (Literal("$42"), "It costs $42.", "$42"),
            (Literal("3.50"), "not 3x50 but 3.50 m", "3.50"),
            (Literal(7), "答案是7个苹果。", "7"),
            (Literal(7), "7km or 17km or 7.5km", "7"),
            (Literal(1234), "It costs $1,234, not 41,234.", "1,234"),
            (Literal("1,234"), "so 1234", "1234"),
            (Literal(7.0), "so 7", "7"),
            (Literal(-7), "10-7 is 3, but 3 - 10 = -7.", "-7"),
            (Literal("Tom"), "Tommy 和Tom。", "Tom"),
            (Literal("(a+b)"), "f(a+b) (a+b)c", "(a+b)"),
            (Literal("7", "first"), "7 and 7", "7"),
            (Literal("7", "all"), "7, 17, 7", "77"),
            (Regex(r"\d+", occurrence="all"), "7, 17", "717"),
            (AllOf(["3", Regex("fo.r")]), "3 and four", "3four"),
            ([(0, 1), (6, 10)], "3 and four", "3four"),
        ],
    )
    def test_what_is_found(self, literal: Any, response: str, expected: str) -> None:
        assert answer_text(response, literal) == expected

    def test_the_last_and_the_first_are_different_places(self) -> None:
        encoded = answered("7 and 7", tokenizer=tiny.slow_bytes())
        first, last = (Literal("7", which).select(encoded, "response") for which in ("first", "last"))
        assert int(last.nonzero()) - int(first.nonzero()) == 6

    @pytest.mark.parametrize(
        ("literal", "response", "reason"),
        [
            (Literal(7), "so 17 apples", "it stands there as a part of '17' alone; give the complete word or number"),
            (Literal(7), "so $1,007", "it stands there as a part of '$1,007' alone"),
            (Literal(7), "so 7.5", "it stands there as a part of '7.5' alone"),
            (Literal(7), "so -7", "it stands there as a part of '-7' alone"),
            (AllOf(["3", "9"]), "3 and 4", "Literal(text='9') found nothing; leave it out"),
            (
                "$42",
                "so 42 dollars",
                "neither as text nor as a regular expression, in which some of its signs have a mean",
            ),
            (Regex("$42"), "so $42", "the text holds '$42' literally, where a regular expression gives its signs"),
            (r"\b7", r"so \b7", r"pass selectors.Literal('\\b7'), or escape it"),
        ],
    )
    def test_a_refusal_says_why(self, literal: Any, response: str, reason: str) -> None:
        with pytest.raises(NoAnswerError, match=re.escape(reason)):
            answer_text(response, literal)

    @pytest.mark.unchecked
    @pytest.mark.parametrize("wrong", ["", " ", None, True, ["7"]])
    def test_no_text(self, wrong: Any) -> None:
        with pytest.raises(InvalidInputError, match="text: must be text with a visible character, or a number, got"):
            Literal(wrong)

    @pytest.mark.unchecked
    @pytest.mark.parametrize("wrong", [[], "7", [7], [torch.ones(3).bool()]])
    def test_all_of_no_selectors(self, wrong: Any) -> None:
        with pytest.raises(InvalidInputError, match="selectors: must be a list of selectors or texts, got"):
            AllOf(wrong)


class TestStrings:
    @pytest.mark.parametrize(
        ("answer", "response", "expected", "selector"),
        [
            ("$42", "It costs $42.", "$42", "Literal(text='$42')"),
            ("3.50", "3.50 and 3x50", "3.50", "Literal(text='3.50')"),
            ("(B)", "so (B) it is", "(B)", "Literal(text='(B)')"),
            ("7", "7 is in 17", "7", "Literal(text='7')"),
            ("apple", "7 apples", "apple", repr(Regex("apple"))),
            (r"\d+", r"17 or \d+", "17", repr(Regex(r"\d+"))),
            ("(a|b)", "ab", "b", repr(Regex("(a|b)"))),
        ],
    )
    def test_text_first_then_a_regular_expression(
        self, answer: str, response: str, expected: str, selector: str
    ) -> None:
        encoded = answered(response, tokenizer=tiny.slow_bytes())
        regions = find_regions(encoded, answer=answer)
        assert text_of(encoded, regions.answer) == expected
        assert regions.answer_selector == selector

    def test_signs_that_match_something_else_are_doubted(self) -> None:
        with pytest.warns(
            UserWarning, match=r"answer: the string '3.50' should stand .* it matches in '3x50': pass sel"
        ):
            assert answer_text("so 3x50", "3.50") == "3x50"
        with pytest.warns(UserWarning, match=r"it matches in '17': pass selectors.Regex\('7'\) if that is meant"):
            assert answer_text("so 17", "7") == "7"
