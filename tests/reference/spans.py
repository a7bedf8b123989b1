"""The characters of each token, from the bytes that its name spells."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tests.fixtures import tokenizers as tiny

# GPT-2's alphabet: printable bytes by themselves, the others by the characters from 256 on.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + rank): byte for rank, byte in enumerate(OTHERS)}


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
