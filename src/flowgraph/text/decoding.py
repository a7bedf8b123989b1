"""From token ids back to text: the characters that each id writes, and what the tokenizer calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowgraph.text.spans import Offsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what every decoder writes for bytes that are no complete character (yet)
CONTEXT = 8  # prompt tokens decoded in front of the response, so that its first space is not taken for padding
PENDING = 16  # tokens that may wait for one character to become complete; bounds the decoding window


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_ids: list[int]) -> tuple[str, list[Offsets]]:
    """Text of ``ids`` behind a prompt and each id's characters in it, by a window as inference servers do.

    A token ends where the decoded window ends without a replacement character. Until then its characters are
    incomplete, and all tokens that bring a part of a character share it. Two short decodes a token.
    """
    known = _vocabulary_size(tokenizer)
    context = prompt_ids[-CONTEXT:]
    everything = context + ids
    pieces: list[str] = []
    spans: list[Offsets] = []
    length = start = 0
    read, before, stable = len(context), "", 0
    head = _text(tokenizer, context, known)
    for index in range(len(context), len(everything)):
        now = _text(tokenizer, everything[start : index + 1], known)[len(head) :]
        partial = now.endswith(REPLACEMENT)
        if before and not partial and now.startswith(before):
            # What looked incomplete was meant, or no character at all: it belongs to the tokens so far.
            stable = len(before)
            spans[-1] = (spans[-1][0], length + stable)
        reached = len(now.rstrip(REPLACEMENT)) if partial else len(now)
        complete = (now and not partial) or index - read + 1 >= PENDING or index + 1 == len(everything)
        spans.append((length + stable, length + max(stable, len(now) if complete else reached + partial)))
        before, stable = now, max(stable, reached)
        if complete:
            pieces.append(now)
            length += len(now)
            start, read, before, stable = read, index + 1, "", 0
            head = _text(tokenizer, everything[start:read], known)
    return "".join(pieces), spans


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], known: int) -> str:
    """Decoded text with its special tokens; ids beyond the vocabulary (a padded embedding) write nothing."""
    written = [index for index in ids if index < known]
    return str(tokenizer.decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_name(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """A token that covers no character, by its name in the vocabulary."""
    name = tokenizer.convert_ids_to_tokens(index) if index < _vocabulary_size(tokenizer) else None
    return str(name or f"<id {index}>")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens: the named ones, and the added ones that are marked so (chat headers)."""
    marked = {index for index, token in _added_tokens(tokenizer).items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(len(tokenizer), *(index + 1 for index in _added_tokens(tokenizer)), 0)


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, Any]:
    """Tokens added to the vocabulary, by id; a backend that does not list them says so with a method."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return added if isinstance(added, Mapping) else {}
