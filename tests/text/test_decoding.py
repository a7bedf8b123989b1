"""Generated ids of every cut: which characters each brings, against the bytes that its name spells."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from flowgraph import encode
from tests.fixtures import tokenizers as tiny
from tests.fixtures.texts import check_order, response_pieces, visible_text
from tests.fixtures.tokenizers import EVERY, LOSSLESS
from tests.reference.spans import bytes_of, spans_from_bytes


@settings(max_examples=60, deadline=None)
@given(response=visible_text, data=st.data())
@pytest.mark.parametrize("name", ["byte_level", "slow_bytes"])
def test_ids_agree_with_the_bytes_of_each_token(name: str, response: str, data: st.DataObject) -> None:
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


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=60))
@pytest.mark.parametrize("name", LOSSLESS)
def test_no_ids_can_crash_it(name: str, values: list[int]) -> None:
    tokenizer = EVERY[name]()
    encoded = encode(tokenizer, "Tom?", values)
    check_order(encoded)
    assert encoded.input_ids[encoded.prompt_length :].tolist() == values


def test_a_token_may_end_inside_the_next_character() -> None:
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


def test_a_genuine_replacement_character_is_complete() -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer("\ufffdx\ufffd", add_special_tokens=False)["input_ids"]
    encoded = encode(tokenizer, "Tom?", ids)
    assert encoded.response_text == "\ufffdx\ufffd"
    assert response_pieces(encoded)[-4:] == ["x", "\ufffd", "\ufffd", "\ufffd"]


def test_decoding_window_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.byte_fallback()
    sizes: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **rest: sizes.append(len(ids)) or decode(ids, **rest))
    broken = [3 + 0xF0] * 100  # never a complete character
    encode(tokenizer, "Tom " * 100, broken + tokenizer("Tom has 3 apples. " * 50)["input_ids"][1:])
    assert max(sizes) <= 40


def test_the_first_space_of_generated_ids_survives() -> None:
    tokenizer = tiny.byte_fallback()
    ids = tokenizer("has 3", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "Tom", ids).response_text == " has 3"


def test_ids_beyond_the_vocabulary_write_nothing(slow_sentencepiece: PreTrainedTokenizerBase) -> None:
    for tokenizer in (tiny.byte_level(), tiny.slow_bytes(), slow_sentencepiece):
        first = tokenizer("Tom", add_special_tokens=False)["input_ids"]
        encoded = encode(tokenizer, "Tom", [*first, 99999])
        assert encoded.tokens[-1] == "<id 99999>"
        assert encoded.response_text.strip() == "Tom"
