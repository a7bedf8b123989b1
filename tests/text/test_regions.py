"""Where question, reasoning and answer lie in an answered prompt, and the rules that masks must keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowgraph import EncodedText, InvalidInputError, NoAnswerError, RegionError, Regions, find_regions
from flowgraph.selectors import Prompt, Regex, Role
from flowgraph.text import regions as public
from flowgraph.text import selectors
from flowgraph.text.regions import validate_regions
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import answered, chat, chosen, text_of


def test_the_selectors_are_at_hand_beside_the_regions() -> None:
    names = ("AllOf", "Boxed", "CodeBlock", "LastLine", "LastSentence", "Literal", "Prompt", "Regex", "Role")
    names += ("Selector", "Span", "Stated", "Tokens")
    for name in (*names, "NUMBER_SIGN", "TAG", "JSON", "PHRASE", "CHOICE", "AUTO_ANSWER"):
        assert name in public.__all__
        assert getattr(public, name) is getattr(selectors, name)


class TestQuestion:
    def test_the_last_user_message_of_a_chat(self) -> None:
        encoded = answered("7", prompt=chat("system: Tom", "user: How many?", "assistant: 3", "user: Tom has 3"))
        regions = find_regions(encoded)
        assert chosen(encoded, regions.question) == ["Tom", " has", " 3"]
        assert regions.question_selector == "auto: Role(role='user')"
        assert regions.question.nonzero().min() > encoded.tokens.index("3")

    def test_user_text_that_the_system_message_holds_too(self) -> None:
        encoded = answered("7", prompt=chat("system: How many apples?", "user: How many apples?"))
        question = find_regions(encoded).question
        start = encoded.text.rindex("How many apples?")
        first, last = question.nonzero().flatten()[[0, -1]].tolist()
        assert encoded.spans[first][0] == start
        assert encoded.spans[last][1] == start + len("How many apples?")
        assert int(question.sum()) == last - first + 1

    def test_no_template_token_comes_with_the_space_around_a_message(self) -> None:
        encoded = answered("7", prompt=chat("user: \nTom has\n\n"))
        assert chosen(encoded, find_regions(encoded).question) == ["Tom", " has"]

    @pytest.mark.parametrize("question", ["user", "system", "assistant", Role("system"), Role("user")])
    def test_roles(self, question: Any) -> None:
        encoded = answered("7", prompt=chat("system: Tom", "user: How", "assistant: 3", "user: many"))
        role = question if isinstance(question, str) else question.role
        expected = {"user": "many", "system": "Tom", "assistant": "3"}[role]
        regions = find_regions(encoded, question=question)
        assert text_of(encoded, regions.question) == expected
        assert regions.question_selector == f"Role(role={role!r})"

    def test_a_role_of_its_own_name(self) -> None:
        encoded = answered("7", prompt=[{"role": "critic", "content": "Tom"}, {"role": "user", "content": "has"}])
        assert text_of(encoded, find_regions(encoded, question="critic").question) == "Tom"

    def test_all_parts_of_a_message(self) -> None:
        template = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        parts = [{"type": "text", "text": "Tom"}, {"type": "text", "text": "has"}]
        encoded = answered("7", prompt=[{"role": "user", "content": parts}], tokenizer=tokenizer)
        assert "".join(chosen(encoded, find_regions(encoded).question)) == "Tomhas"

    def test_plain_prompts(self) -> None:
        encoded = answered(" 7", prompt="Tom has 3", tokenizer=tiny.byte_fallback())
        for question in (None, "auto", "prompt", Prompt()):
            regions = find_regions(encoded, question=question)
            assert regions.question.nonzero().flatten().tolist() == [1, 2, 3]  # without the BOS
        assert find_regions(encoded).question_selector == "auto: Prompt()"

    def test_the_prompt_of_a_chat_is_its_messages(self) -> None:
        encoded = answered("7", prompt=chat("system: Tom", "user: has"))
        assert chosen(encoded, find_regions(encoded, question="prompt").question) == ["Tom", "ha", "s"]

    def test_a_pattern(self) -> None:
        encoded = answered("has 7", prompt="Tom has 3. Tom has 4.")
        regions = find_regions(encoded, question=r"has \d")
        assert chosen(encoded, regions.question) == [" has", " 4"]
        assert regions.question_selector == repr(Regex(r"has \d"))

    def test_a_question_is_text_before_it_is_a_pattern(self) -> None:
        encoded = answered("7", prompt="Say it. 3+4? (a+b)", tokenizer=tiny.slow_bytes())
        for question, selector in [("3+4?", "Literal(text='3+4?')"), ("(a+b)", "Literal(text='(a+b)')")]:
            regions = find_regions(encoded, question=question)
            assert text_of(encoded, regions.question) == question
            assert regions.question_selector == selector

    def test_a_role_that_is_missing(self) -> None:
        message = (
            r"question: Role\(role='system'\) needs a chat message of that role, got messages of 'user', 'assistant'; "
            r"pass Prompt\(\), a Regex or a Span of the prompt instead"
        )
        with pytest.raises(RegionError, match=message):
            find_regions(answered("7", prompt=chat("user: a", "assistant: b", "user: c")), question="system")
        with pytest.raises(RegionError, match="got a prompt without chat messages; pass"):
            find_regions(answered("7"), question="user")

    def test_nothing_found(self) -> None:
        message = (
            r"question: Regex\(pattern='z'.*\) must select a visible, non-special character of the prompt, got none in "
            r"'How many\?'; pass another Regex, Span\(start, end\), Role, Prompt\(\) or token indices"
        )
        with pytest.raises(RegionError, match=message) as caught:
            find_regions(answered("7"), question="z")
        assert not isinstance(caught.value, NoAnswerError)

    def test_a_message_of_special_tokens_only(self) -> None:
        with pytest.raises(RegionError, match=r"question: Role\(role='user'\) must select a visible"):
            find_regions(answered("7", prompt=chat("user: <|im_end|>")))


class TestFindRegions:
    def test_every_token_of_an_answered_chat(self) -> None:
        encoded = answered("So 3 + 4 = 7. #### 7<|im_end|>", prompt=chat("user: Tom has 3"))
        regions = find_regions(encoded)
        assert chosen(encoded, regions.question) == ["Tom", " has", " 3"]
        assert "".join(chosen(encoded, regions.reasoning)) == "So 3 + 4 = 7. ####"
        assert chosen(encoded, regions.answer) == [" 7"]
        assert regions.answer.nonzero().flatten().tolist() == [encoded.num_tokens - 2]
        assert regions.generated.nonzero().flatten().tolist() == [*range(encoded.prompt_length, encoded.num_tokens)]
        first_answer = int(regions.answer.nonzero()[0])
        assert regions.reasoning.nonzero().flatten().tolist() == [*range(encoded.prompt_length, first_answer)]

    def test_reasoning_ends_before_the_answer(self) -> None:
        encoded = answered("a 7 b", tokenizer=tiny.slow_bytes())
        regions = find_regions(encoded, answer="7")
        assert "".join(chosen(encoded, regions.reasoning)) == "a "
        assert not regions.reasoning[encoded.prompt_length + 3 :].any()

    def test_special_tokens_are_no_reasoning(self) -> None:
        encoded = answered("a<|im_end|>b7")
        regions = find_regions(encoded, answer="7")
        assert chosen(encoded, regions.reasoning) == ["a", "b"]
        assert int(regions.generated.sum()) == 4

    def test_a_direct_answer_has_no_reasoning(self) -> None:
        regions = find_regions(answered("7"))
        assert not regions.reasoning.any()

    def test_a_gap_in_the_answer_is_no_reasoning(self) -> None:
        encoded = answered("3 4 5 6", tokenizer=tiny.slow_bytes())
        regions = find_regions(encoded, answer=[encoded.prompt_length + 2, encoded.prompt_length + 6])
        assert chosen(encoded, regions.answer) == ["4", "6"]
        assert "".join(chosen(encoded, regions.reasoning)) == "3 "

    def test_a_selector_of_ones_own(self) -> None:
        class LastToken:
            def select(self, encoded: EncodedText, part: str) -> Tensor:
                return torch.arange(encoded.num_tokens) == encoded.num_tokens - 1

            def __repr__(self) -> str:
                return "LastToken()"

        regions = find_regions(answered("3 4"), answer=LastToken())
        assert regions.answer[-1]
        assert regions.answer_selector == "LastToken()"

    @pytest.mark.unchecked
    @pytest.mark.parametrize("wrong", [7, 1.5, slice(0, 3), (1, 2, 3), ("a", "b"), ["a"], {"a": 1}, object()])
    def test_no_selector(self, wrong: Any) -> None:
        for name in ("question", "answer"):
            message = f"{name}: must be a selector, a string, .* got .*; see flowgraph.find_regions"
            with pytest.raises(InvalidInputError, match=message):
                find_regions(answered("7"), **{name: wrong})

    def test_a_broken_pattern(self) -> None:
        with pytest.raises(
            InvalidInputError, match=r"pattern: must be a regular expression, got '\(' with an error at"
        ):
            find_regions(answered("7"), answer="(")

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.sampled_from("ab 7.\n🙂ש=:#*{}\\"), max_size=25), st.sampled_from(["", "Answer: ", "#### "]))
    def test_whatever_is_said_regions_are_lawful(self, text: str, mark: str) -> None:
        encoded = answered(text + mark + "x7<|im_end|>", prompt=chat("user: Tom has 3"))
        regions = find_regions(encoded)
        validate_regions(regions)
        assert not (encoded.special & (regions.question | regions.reasoning | regions.answer)).any()
        rest = regions.generated & ~regions.reasoning & ~regions.answer & ~encoded.special
        assert (rest.nonzero() > regions.answer.nonzero()[0]).all()


class TestFromMasks:
    def test_defaults(self) -> None:
        regions = Regions.from_masks([1, 2], [6], num_tokens=8)
        assert regions.question.tolist() == [False, True, True, False, False, False, False, False]
        assert regions.generated.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
        assert regions.reasoning.nonzero().flatten().tolist() == [3, 4, 5]
        assert regions.answer.nonzero().flatten().tolist() == [6]
        assert (regions.num_tokens, regions.question_selector, regions.answer_selector) == (8, "mask", "mask")

    def test_given_generated_tokens(self) -> None:
        regions = Regions.from_masks([0, 1], [5], generated=slice(3, None), num_tokens=6)
        assert regions.reasoning.nonzero().flatten().tolist() == [3, 4]
        step = Regions.from_masks([3], [5], generated=slice(2, None), num_tokens=6)
        assert step.reasoning.nonzero().flatten().tolist() == [2, 4]

    def test_given_reasoning(self) -> None:
        regions = Regions.from_masks([0], [3], reasoning=[2], num_tokens=4)
        assert regions.reasoning.tolist() == [False, False, True, False]

    def test_every_way_to_write_a_mask(self) -> None:
        mask = torch.tensor([False, False, False, True])
        ways: list[Any] = [mask, mask.tolist(), [3], torch.tensor([3]), mask.numpy(), slice(3, 4), slice(-1, None)]
        for answer in ways:
            regions = Regions.from_masks(slice(0, 1), answer, num_tokens=4)
            assert torch.equal(regions.answer, mask)

    def test_the_length_of_a_mask_is_enough(self) -> None:
        mask = torch.tensor([True, False, False])
        assert Regions.from_masks(mask, [2]).num_tokens == 3
        assert Regions.from_masks([0], mask.flip(0)).num_tokens == 3
        assert Regions.from_masks([0], [2], generated=[False, True, True]).num_tokens == 3

    def test_masks_are_copies(self) -> None:
        mask = torch.tensor([True, False, False])
        regions = Regions.from_masks(mask, [2])
        mask[:] = False
        assert regions.question.any()

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"question": [0], "answer": [2]},
                "num_tokens: must be given where no region is a 1-D bool mask, got None",
            ),
            ({"question": [0], "answer": [4], "num_tokens": 4}, "answer: token indices must lie in 0..3, got 4"),
            ({"question": [], "answer": [2], "num_tokens": 4}, "question: must hold at least one token, got none of 4"),
            ({"question": [0], "answer": [], "num_tokens": 4}, "answer: must hold at least one token, got none of 4"),
            ({"question": [0, 2], "answer": [2, 3], "num_tokens": 4}, "question: must not overlap answer, got token 2"),
            (
                {"question": [0], "answer": [3], "reasoning": [2, 3], "num_tokens": 4},
                "reasoning: must not overlap answer, got token 3; give it to one",
            ),
            (
                {"question": [0, 1], "answer": [3], "reasoning": [1], "num_tokens": 4},
                "question: must not overlap reasoning, got token 1",
            ),
            (
                {"question": [2], "answer": [0], "num_tokens": 4},
                "answer: must lie in the generated tokens .* got token 0; pass generated=",
            ),
            (
                {"question": [0, 3], "answer": [2], "num_tokens": 4},
                "answer: must lie in the generated tokens .* got token 2",
            ),
            (
                {"question": [3], "answer": [2], "generated": [1, 2, 3], "num_tokens": 4},
                "answer: must come after a question token, got answer from token 2 and question from token 3; check",
            ),
            (
                {"question": [0], "answer": [3], "reasoning": [1], "generated": [2, 3], "num_tokens": 4},
                "reasoning: must lie in the generated tokens .* got token 1",
            ),
            (
                {"question": [1], "answer": [3], "generated": [0, 2, 3], "num_tokens": 4},
                "generated: must not include token 0, which no earlier token can generate, got it included; pass",
            ),
            (
                {"question": torch.ones(3).bool(), "answer": torch.ones(4).bool()},
                r"answer: a mask must have one entry per token \(3\), got 4",
            ),
            ({"question": torch.ones(3), "answer": [2], "num_tokens": 3}, "question: must be a bool mask or integer"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(RegionError, match=message):
            Regions.from_masks(**arguments)

    def test_answer_next_to_the_question_is_fine(self) -> None:
        assert Regions.from_masks([0], [1], num_tokens=2).reasoning.tolist() == [False, False]


class TestRecord:
    @pytest.mark.unchecked
    @pytest.mark.parametrize("name", ["question", "reasoning", "answer", "generated"])
    @pytest.mark.parametrize(
        ("bad", "got"),
        [
            (torch.ones(4, dtype=torch.float32), r"torch.float32 of shape \(4,\)"),
            (torch.ones(1, 4).bool(), r"torch.bool of shape \(1, 4\)"),
            (torch.ones(5).bool(), r"torch.bool of shape \(5,\)"),
        ],
    )
    def test_masks_must_be_masks(self, name: str, bad: Tensor, got: str) -> None:
        regions = Regions.from_masks([0], [3], num_tokens=4)
        # The question sets the length, so one that is too long shows in the next mask.
        moved = name == "question" and len(bad) == 5
        where, size = ("reasoning", 5) if moved else (name, 4)
        got = r"torch.bool of shape \(4,\)" if moved else got
        message = rf"^{where}: must be a 1-D bool mask over {size} tokens, got {got}; build regions with find_regions"
        with pytest.raises(RegionError, match=message):
            dataclasses.replace(regions, **{name: bad})

    def test_repr_and_description(self) -> None:
        encoded = answered("So 3 + 4 = 7.", prompt="Tom has 3")
        regions = find_regions(encoded, answer="7")
        assert repr(regions) == "Regions(question=3, reasoning=5, answer=1, generated=7 of 10 tokens)"
        assert regions.describe(encoded.tokens) == (
            "question: 3 tokens (0..2) 'Tom has 3' by auto: Prompt()\n"
            "reasoning: 5 tokens (3..7) 'So 3 + 4 ='\n"
            "answer: 1 token (8) ' 7' by Literal(text='7')\n"
            "generated: 7 tokens (3..9) 'So 3 + 4 = 7.'"
        )

    def test_description_of_scattered_tokens(self) -> None:
        regions = Regions.from_masks([0, 2, 4, 6, 8], [10], reasoning=[], num_tokens=11)
        assert regions.describe().splitlines() == [
            "question: 5 tokens (0, 2, 4, 6, ...) by mask",
            "reasoning: 0 tokens",
            "answer: 1 token (10) by mask",
            "generated: 2 tokens (9..10)",
        ]
        four = Regions.from_masks([0, 2, 4, 6], [10], num_tokens=11)
        assert four.describe().startswith("question: 4 tokens (0, 2, 4, 6) by mask")
