"""Every token's characters in the text as it was given, where tokenizers trim, collapse and normalise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from flowgraph import InvalidInputError, encode, find_regions
from flowgraph.text.spans import align, close_gaps, covers, inside, printed_pieces, selected_text
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import check_order, never_decreasing, pieces, response_pieces


def test_covers_needs_a_visible_character() -> None:
    spans = [(0, 3), (3, 4), (4, 8), (8, 8)]
    assert covers(spans, "one  two", [(2, 5)]).tolist() == [True, False, False, False]
    assert covers(spans, "one  two", [(0, 2), (5, 6)]).tolist() == [True, False, True, False]
    assert covers(spans, "one  two", []).tolist() == [False] * 4
    assert covers(spans, "one  two", [(3, 5)]).tolist() == [False] * 4


def test_inside_counts_the_white_space_of_a_content_and_not_the_templates() -> None:
    spans = [(0, 1), (1, 2), (2, 4), (4, 4)]
    assert inside(spans, "\n\nab", [(1, 4)]).tolist() == [False, True, True, False]
    assert inside(spans, "\n\nab", [(3, 4)]).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("spans", "start", "expected"),
    [
        ([(0, 1), (2, 3)], 0, [(0, 1), (1, 3)]),  # the space goes to the token after it
        ([(0, 0), (0, 1), (0, 0)], 0, [(0, 0), (0, 1), (1, 1)]),  # special tokens report (0, 0)
        ([(0, 3)], 2, [(2, 3)]),  # nothing reaches in front of the start
        ([(0, 1), (4, 5)], 0, [(0, 1), (4, 5)]),  # a visible character that no token reports belongs to no token
    ],
)
def test_close_gaps(spans: list[tuple[int, int]], start: int, expected: list[tuple[int, int]]) -> None:
    assert close_gaps(spans, "a b c", start) == expected


class TestOffsets:
    def test_trimmed_offsets_get_their_spaces_back(self) -> None:
        encoded = encode(tiny.byte_level(trim_offsets=True), "Tom  has", "  3")
        assert encoded.tokens == ("Tom", " ", " has", " ", " 3")
        assert "".join(pieces(encoded)) == encoded.text

    def test_trimmed_spaces_stay_on_their_side_of_the_response(self) -> None:
        encoded = encode(tiny.byte_level(trim_offsets=True), "Tom ", "has")
        assert encoded.spans[encoded.prompt_length][0] == 4
        check_order(encoded)

    def test_normalisation_points_into_the_given_text(self) -> None:
        encoded = encode(tiny.unigram(), "Tom", "ﬁ 7")
        assert encoded.text == "Tomﬁ 7"
        assert response_pieces(encoded)[-4:] == ["ﬁ", "ﬁ", " ", "7"]


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
    assert [text[start:end] for start, end in align(decoded, spans, text)] == expected


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
        assert never_decreasing(encoded)
        assert "7" in encoded.tokens[-1]

    def test_a_decoder_that_writes_something_else_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = tiny.SlowBytes()
        monkeypatch.setattr(tokenizer, "decode", lambda ids, **rest: "".join(chr(0x4E00 + i) for i in ids))
        message = r"tokenizer: what it decodes must agree with the text it read, got '.*' for 'tomhas.*; pass input_ids"
        with pytest.raises(InvalidInputError, match=message):
            encode(tokenizer, "Tom has " * 20, "7")


def test_shared_characters_are_printed_once() -> None:
    text = "汤姆 has 🍎."
    encoded = encode(tiny.byte_level(), "Who?", text)
    spans = list(encoded.spans)
    assert "".join(printed_pieces(encoded.tokens, spans, encoded.text)) == encoded.text
    assert len(encoded.tokens) > len(encoded.text)
    emoji = [span for span in spans if encoded.text[slice(*span)] == "🍎"]
    assert len(emoji) == 4
    assert selected_text(encoded.text, emoji) == "🍎"
    assert selected_text(encoded.text, [spans[0], *emoji]) == "W … 🍎"
    regions = find_regions(encoded, answer="🍎")
    assert "answer: 4 tokens" in regions.describe(encoded)
    assert regions.describe(encoded).count("🍎") == 3  # the answer, its selector, all generated tokens
    # One token may end inside the next character.
    assert printed_pieces(["a汤", "汤姆", "姆"], [(0, 2), (1, 3), (2, 3)], "a汤姆") == ["a汤", "姆", ""]
